// Where the segment tables of large lists lie for the kernel: in device memory, copied there on the launch's stream.
//
// A table of a direct launch is used once: eight places take turns. A table that is captured into a graph is copied
// again with every replay, so its place is never given to anybody else.
#pragma once
#include <cstdint>
#include <vector>

#include "../core/segments.h"
#include "cuda_check.h"
#include "events.h"
#include "launch.h"

namespace dpcomm {

class SegmentTables {
 public:
  static constexpr int64_t kMost = 32768;  // segments of one launch
  SegmentTables();
  ~SegmentTables();
  SegmentTables(const SegmentTables&) = delete;

  // Enqueues the copy and returns the table's address on the device. Afterwards call used() with the launch's event.
  const Segment* put(const std::vector<Segment>& table, cudaStream_t stream, bool capturing, double timeout_s);
  void used(const EventPool::Lent& by) { users_[turn_] = by; }

 private:
  static constexpr int kTurns = 8;
  static constexpr int64_t kCaptured = 2 * kMost;  // in all graphs together
  int64_t place(int64_t count, bool capturing, double timeout_s);

  Segment* host_ = nullptr;  // pinned; the same places as on the device
  DeviceArray<Segment> device_;
  int turn_ = 0;
  EventPool::Lent users_[kTurns];
  int64_t captured_ = 0;  // segments of places that are taken for good
};

// Waits for an event on the host; false when the time ran out.
bool ended_within(cudaEvent_t event, double timeout_s);

}  // namespace dpcomm
