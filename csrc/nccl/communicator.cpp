#include "communicator.h"

#include <chrono>
#include <vector>

namespace dpcomm {

using nccl::Result;

namespace {

constexpr double kYieldS = 0.1;  // that ncclCommAbort waits for a call of NCCL's that is on its way
constexpr double kLetGoS = 2;
constexpr auto kLook = std::chrono::microseconds(200);
// NCCL from 2.27 on finishes each group of a non-blocking communicator on a thread of its own, in some 10 us.
constexpr auto kSpin = std::chrono::microseconds(100);

}  // namespace

std::unique_ptr<NcclCommunicator, NcclCommunicator::LetGo> NcclCommunicator::make(const nccl::Library& library) {
  return std::unique_ptr<NcclCommunicator, LetGo>(new NcclCommunicator(library));
}

void NcclCommunicator::LetGo::operator()(NcclCommunicator* comm) const {
  comm->abort();  // nothing, if it was closed
  if (comm->close(kLetGoS)) {
    delete comm;
    return;
  }
  static auto* const kept = new std::vector<NcclCommunicator*>;  // its thread is still in NCCL
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  kept->push_back(comm);
  comm->ender_.detach();
}

std::string NcclCommunicator::text(Result result, const char* what) const {
  const std::string kind = library_.api.GetErrorString(result);
  const char* last = library_.api.GetLastError(nullptr);  // says most: first, for what peers are told is cut off
  return std::string(what) + ": " + (last && *last ? std::string(last) + " (" + kind + ")" : kind);
}

void NcclCommunicator::took(Result result, const char* what) const {
  if (result != Result::success && result != Result::in_progress) throw Broken(text(result, what));
}

void NcclCommunicator::connect(const nccl::UniqueId& id, int rank, int nranks, const std::function<bool()>& stopped) {
  nccl::Config config;
  config.blocking = 0;
  {
    const std::lock_guard lock(mutex_);
    if (aborting_) throw Broken("aborted");
    nccl::Comm joining = nullptr;
    const Result result = library_.api.CommInitRankConfig(&joining, nranks, id, rank, &config);
    comm_ = joining;
    took(result, "ncclCommInitRankConfig");
  }
  settle("ncclCommInitRankConfig", stopped);
}

void NcclCommunicator::group(const std::function<void(const nccl::Api&, nccl::Comm)>& body,
                             const std::function<bool()>& stopped) {
  Result result;
  {
    const std::lock_guard lock(mutex_);
    if (aborting_ || unsettled_) throw Broken("aborted");
    took(library_.api.GroupStart(), "ncclGroupStart");
    try {
      body(library_.api, comm_);
    } catch (...) {
      library_.api.GroupEnd();  // closes what was opened; the first error counts
      throw;
    }
    result = library_.api.GroupEnd();
    took(result, "ncclGroupEnd");
  }
  if (result == Result::in_progress) settle("ncclGroupEnd", stopped);
}

void NcclCommunicator::settle(const char* what, const std::function<bool()>& stopped) {
  for (const auto start = std::chrono::steady_clock::now();;) {
    {
      const std::lock_guard lock(mutex_);
      if (aborting_) throw Broken("aborted");
      Result now = Result::success;
      took(library_.api.CommGetAsyncError(comm_, &now), "ncclCommGetAsyncError");
      took(now, what);
      if (now == Result::success) return;
    }
    if (std::chrono::steady_clock::now() - start < kSpin) {
      std::this_thread::yield();
      continue;
    }
    if (stopped()) {
      unsettled_ = true;
      throw Broken(std::string(what) + " was given up");
    }
    std::this_thread::sleep_for(kLook);
  }
}

std::string NcclCommunicator::async_error() {
  const std::unique_lock lock(mutex_, std::try_to_lock);  // else somebody is in a call, and learns it there
  if (!lock || aborting_ || !comm_) return "";
  Result now = Result::success;
  const Result asked = library_.api.CommGetAsyncError(comm_, &now);
  if (asked != Result::success) return text(asked, "ncclCommGetAsyncError");
  return now == Result::success || now == Result::in_progress ? "" : text(now, "NCCL");
}

void NcclCommunicator::abort() {
  if (aborting_.exchange(true)) return;
  ender_ = std::thread([this] {
    // A call that is on its way may itself wait for the GPU, which waits for this. Whoever has the lock later sees
    // that NCCL is not to be called any more, so it is not held while NCCL aborts, which may last for ever.
    const auto until = std::chrono::steady_clock::now() + std::chrono::duration<double>(kYieldS);
    std::unique_lock lock(mutex_, std::try_to_lock);
    while (!lock && (!comm_ || std::chrono::steady_clock::now() < until)) {  // what makes it waits for no GPU
      std::this_thread::sleep_for(kLook);
      static_cast<void>(lock.try_lock());
    }
    if (lock) lock.unlock();
    if (comm_) library_.api.CommAbort(comm_);
    abort_returned_ = true;
  });
}

bool NcclCommunicator::close(double timeout_s) {
  const auto until = std::chrono::steady_clock::now() + std::chrono::duration<double>(timeout_s);
  if (!aborting_.exchange(true) && comm_)
    ender_ = std::thread([this] {
      const std::lock_guard lock(mutex_);
      Result now = library_.api.CommFinalize(comm_);
      while (now == Result::in_progress) {
        std::this_thread::sleep_for(kLook);
        if (library_.api.CommGetAsyncError(comm_, &now) != Result::success) break;
      }
      library_.api.CommDestroy(comm_);
      abort_returned_ = true;
    });
  if (!comm_) abort_returned_ = true;
  while (!abort_returned_ && std::chrono::steady_clock::now() < until) std::this_thread::sleep_for(kLook);
  if (!abort_returned_) return false;
  if (ender_.joinable()) ender_.join();  // it has done its work
  return true;
}

}  // namespace dpcomm
