// One call on the engine's stream, as its caller sees it.
#pragma once
#include <algorithm>

#include "engine.h"

namespace dpcomm {

class NcclEngine::OnStream final : public Pending {
 public:
  OnStream(NcclEngine& engine, EventPool::Lent ended) : engine_(engine), ended_(std::move(ended)) {}

  void join(uintptr_t stream, double, const std::function<bool()>&) override {
    engine_.refuse_fork();
    const CurrentDevice current(engine_.device_);
    try {
      check_cuda(cudaStreamWaitEvent(reinterpret_cast<cudaStream_t>(stream), ended_.get(), 0), "cudaStreamWaitEvent");
    } catch (const Error& error) {
      engine_.throw_cuda(error, {}, stream);
    }
  }

  bool synchronize(double timeout_s, const std::function<bool()>& interrupted) override {
    engine_.refuse_fork();
    const Clock::time_point until = after(timeout_s);
    while (!done()) {
      if (Clock::now() - engine_.failed_at_.load() > kLetGo) throw engine_.stuck_error();
      if (Clock::now() >= until) return false;
      if (interrupted && interrupted()) return false;
      const double left = std::chrono::duration<double>(until - Clock::now()).count();
      ended_within(ended_.get(), std::clamp(left, 0.0, 0.1));
    }
    return true;
  }

  bool done() override {
    if (engine_.in_forked_child()) return false;  // whoever only lets go of it learns nothing
    try {
      return ended_within(ended_.get(), 0);
    } catch (const Error&) {
      return true;  // the context is lost: it will not run any more, and error() says why
    }
  }

  // A call that was seen to end well stays well, whatever comes later.
  std::exception_ptr error() override {
    if (well_ || !done()) return nullptr;
    try {
      if (engine_.failed()) throw engine_.cause_error(nullptr, true);
      ended_within(ended_.get(), 0);
      well_ = true;
    } catch (const Error&) {
      return std::current_exception();
    }
    return nullptr;
  }

 private:
  // After a failure NCCL is told to end its work. What it has not ended by then, only the end of the process will.
  static constexpr std::chrono::seconds kLetGo{10};

  NcclEngine& engine_;
  const EventPool::Lent ended_;
  bool well_ = false;
};

}  // namespace dpcomm
