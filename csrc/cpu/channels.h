// The threads that play a call's channels beside the caller.
#pragma once
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace dpcomm {

class Channels {
 public:
  Channels() = default;
  ~Channels();
  Channels(const Channels&) = delete;
  Channels& operator=(const Channels&) = delete;

  // Threads for channels 1 ... count - 1; throws Error(resource) where one cannot be had.
  void start(int count);

  // body(0) here, body(1) ... body(count - 1) on a thread each; returns when all have, also if body(0) throws. While it
  // waits for the others it calls idle every 100 ms. One caller at a time; allocates nothing.
  void run(int count, const std::function<void(int)>& body, const std::function<void()>& idle);

 private:
  void play(int channel);
  void join(const std::function<void()>& idle);

  std::mutex mutex_;
  std::condition_variable changed_;
  const std::function<void(int)>* body_ = nullptr;  // of the current round
  uint64_t round_ = 0;
  int count_ = 0, running_ = 0;  // channels of the round, those of its threads that have not ended
  bool stop_ = false;
  std::vector<std::thread> threads_;  // [channel - 1]
};

}  // namespace dpcomm
