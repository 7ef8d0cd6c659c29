#include "channels.h"

#include <chrono>
#include <system_error>

#include "../error.h"
#include "../host/signals_blocked.h"

namespace dpcomm {

Channels::~Channels() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
    changed_.notify_all();
  }
  for (std::thread& t : threads_) t.join();
}

void Channels::start(int count) {
  try {
    const SignalsBlocked inherited;
    while (int(threads_.size()) < count - 1)
      threads_.emplace_back([this, channel = int(threads_.size()) + 1] { play(channel); });
  } catch (const std::system_error& error) {
    throw resource_error("starting the thread of a channel", error.code().value());
  }
}

void Channels::run(int count, const std::function<void(int)>& body, const std::function<void()>& idle) {
  if (count == 1) return body(0);
  {
    const std::lock_guard lock(mutex_);
    body_ = &body;
    count_ = count;
    running_ = count - 1;
    ++round_;
    changed_.notify_all();
  }
  struct Join {  // whatever happens here: the threads work on the caller's memory
    Channels& channels;
    const std::function<void()>& idle;
    ~Join() { channels.join(idle); }
  } join{*this, idle};
  body(0);
}

// Bounded: every wait inside body has a deadline.
void Channels::join(const std::function<void()>& idle) {
  std::unique_lock lock(mutex_);
  while (!changed_.wait_for(lock, std::chrono::milliseconds(100), [&] { return running_ == 0; })) {
    lock.unlock();  // it may take Python's lock, whose holder may be waiting for ours
    idle();
    lock.lock();
  }
}

void Channels::play(int channel) {
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
