// Events and streams, lent and taken back. Making an event is a call into the driver that others may wait for. A stream
// is never destroyed: torch's allocator records events on it when tensors die that it has worked on, whenever that is.
#pragma once
#include <cuda_runtime_api.h>

#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "cuda_check.h"

namespace dpcomm {

class EventPool {
 public:
  using Lent = std::shared_ptr<CUevent_st>;

  explicit EventPool(int first) : home_(std::make_shared<Home>()) {
    for (int i = 0; i < first; ++i) home_->free.push_back(make());
  }
  // Of the device that is current. It may outlive the pool.
  Lent take() {
    cudaEvent_t event = nullptr;
    {
      const std::lock_guard lock(home_->mutex);
      if (!home_->free.empty()) {
        event = home_->free.back();
        home_->free.pop_back();
      }
    }
    if (!event) event = make();
    return Lent(event, [home = home_](cudaEvent_t e) {
      const std::lock_guard lock(home->mutex);
      home->free.push_back(e);
    });
  }

 private:
  struct Home {
    std::mutex mutex;
    std::vector<cudaEvent_t> free;
    ~Home() {
      for (const cudaEvent_t e : free) cudaEventDestroy(e);
    }
  };
  static cudaEvent_t make() {
    cudaEvent_t event = nullptr;
    check_cuda(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreateWithFlags");
    return event;
  }
  std::shared_ptr<Home> home_;
};

// A stream of the highest priority, of the given device, for one user at a time.
class StreamLoan {
 public:
  explicit StreamLoan(int device) : device_(device) {
    {
      const std::lock_guard lock(home().mutex);
      std::vector<cudaStream_t>& free = home().free[device];
      if (!free.empty()) {
        stream_ = free.back();
        free.pop_back();
        return;
      }
    }
    const CurrentDevice current(device);
    int least = 0, greatest = 0;
    check_cuda(cudaDeviceGetStreamPriorityRange(&least, &greatest), "cudaDeviceGetStreamPriorityRange");
    check_cuda(cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking, greatest), "cudaStreamCreateWithPriority");
  }
  ~StreamLoan() {
    const std::lock_guard lock(home().mutex);
    home().free[device_].push_back(stream_);
  }
  StreamLoan(const StreamLoan&) = delete;
  cudaStream_t get() const { return stream_; }

 private:
  struct Home {
    std::mutex mutex;
    std::map<int, std::vector<cudaStream_t>> free;  // by device
  };
  static Home& home() {
    static Home* const home = new Home;  // loans may end while the process does
    return *home;
  }
  const int device_;
  cudaStream_t stream_ = nullptr;
};

}  // namespace dpcomm
