#include "segment_tables.h"

#include <algorithm>
#include <chrono>
#include <thread>

namespace dpcomm {

SegmentTables::SegmentTables() : device_(size_t(kTurns * kMost + kCaptured)) {
  void* p = nullptr;
  check_cuda(cudaHostAlloc(&p, size_t(kTurns * kMost + kCaptured) * sizeof(Segment), cudaHostAllocDefault),
             "cudaHostAlloc");
  host_ = static_cast<Segment*>(p);
}

SegmentTables::~SegmentTables() { cudaFreeHost(host_); }

const Segment* SegmentTables::put(const std::vector<Segment>& table, cudaStream_t stream, bool capturing,
                                  double timeout_s) {
  const int64_t at = place(int64_t(table.size()), capturing, timeout_s);
  std::copy(table.begin(), table.end(), host_ + at);
  check_cuda(
      cudaMemcpyAsync(device_.data() + at, host_ + at, table.size() * sizeof(Segment), cudaMemcpyHostToDevice, stream),
      "cudaMemcpyAsync of a segment table");
  return device_.data() + at;
}

int64_t SegmentTables::place(int64_t count, bool capturing, double timeout_s) {
  if (count > kMost)
    throw Error(Code::unsupported, "one call reduces " + std::to_string(kMost) + " tensors at most, and this one has " +
                                       std::to_string(count) + ". Lower bucket_cap_mb, or pass fewer at a time.");
  if (capturing) {
    if (captured_ + count > kCaptured)
      throw Error(Code::unsupported, "the graphs of this communicator have captured lists of " +
                                         std::to_string(captured_) + " tensors, and " + std::to_string(count) +
                                         " more do not fit. Lists of up to " + std::to_string(kInlineSegments) +
                                         " tensors need no room.");
    const int64_t at = kTurns * kMost + captured_;
    captured_ += count;
    return at;
  }
  turn_ = (turn_ + 1) % kTurns;
  if (users_[turn_] && !ended_within(users_[turn_].get(), timeout_s)) {
    throw Error(Code::timeout, "an earlier list is still on its way after " + std::to_string(timeout_s) + " s");
  }
  users_[turn_].reset();
  return turn_ * kMost;
}

bool ended_within(cudaEvent_t event, double timeout_s) {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::duration<double>(std::min(timeout_s, 1e8));
  for (int i = 0;; ++i) {
    // Asking would spoil a capture that another thread has under way, unless this thread says that it has none.
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    check_cuda(cudaThreadExchangeStreamCaptureMode(&mode), "cudaThreadExchangeStreamCaptureMode");
    const cudaError_t status = cudaEventQuery(event);
    cudaThreadExchangeStreamCaptureMode(&mode);
    if (status == cudaSuccess) return true;
    if (status != cudaErrorNotReady) check_cuda(status, "cudaEventQuery");
    if (std::chrono::steady_clock::now() > deadline) return false;
    if (i > 100) std::this_thread::sleep_for(std::chrono::microseconds(50));
  }
}

}  // namespace dpcomm
