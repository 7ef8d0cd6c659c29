// The threads that play a call's channels beside the caller. Started at the first call that has several.
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

  // body(0) here, body(1) ... body(count - 1) on a thread each; returns when all have. One caller at a time.
  void run(int count, const std::function<void(int)>& body);

 private:
  void play(int channel);

  std::mutex mutex_;
  std::condition_variable changed_;
  const std::function<void(int)>* body_ = nullptr;  // of the current round
  uint64_t round_ = 0;
  int count_ = 0, running_ = 0;  // channels of the round, those of its threads that have not ended
  bool stop_ = false;
  std::vector<std::thread> threads_;  // [channel - 1]
};

}  // namespace dpcomm
