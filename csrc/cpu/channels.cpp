#include "channels.h"

#include <pthread.h>
#include <signal.h>

namespace dpcomm {

Channels::~Channels() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
    changed_.notify_all();
  }
  for (std::thread& t : threads_) t.join();
}

void Channels::run(int count, const std::function<void(int)>& body) {
  if (count > 1) {
    const std::lock_guard lock(mutex_);
    while (int(threads_.size()) < count - 1)
      threads_.emplace_back([this, channel = int(threads_.size()) + 1] { play(channel); });
    body_ = &body;
    count_ = count;
    running_ = count - 1;
    ++round_;
    changed_.notify_all();
  }
  body(0);
  if (count > 1) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return running_ == 0; });  // bounded: every wait inside body has a deadline
  }
}

void Channels::play(int channel) {
  sigset_t all;
  sigfillset(&all);
  pthread_sigmask(SIG_BLOCK, &all, nullptr);  // signals belong to the program's own threads
  pthread_setname_np(pthread_self(), "dpcomm-channel");
  uint64_t seen = 0;
  for (;;) {
    const std::function<void(int)>* body;
    {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [&] { return stop_ || round_ != seen; });
      if (stop_) return;
      seen = round_;
      if (channel >= count_) continue;  // this round has fewer channels
      body = body_;
    }
    (*body)(channel);
    const std::lock_guard lock(mutex_);
    if (--running_ == 0) changed_.notify_all();
  }
}

}  // namespace dpcomm
