// What engines on CPU share whose messages a carrier moves: their slots, and their steps, timed.
#pragma once
#include <algorithm>
#include <string>

#include "../carried/schedule.h"
#include "../host/arena.h"
#include "float_environment.h"
#include "kernels.h"
#include "times.h"
#include "wait.h"

namespace dpcomm {

// A chunk is cut into kSlices slices, so that the processor and the line both have work from early on, but not into
// smaller ones than a message is worth (it costs tens of microseconds) or larger ones than a slot.
// docs/performance.md compares them.
constexpr int kSlices = 4;
constexpr int64_t kLeastSliceBytes = 512 * 1024, kMostSliceBytes = int64_t{2} << 20;

inline int64_t slice_bytes_for(int64_t chunk_bytes, int64_t slot_bytes, int64_t least_bytes = kLeastSliceBytes) {
  return std::clamp(chunk_bytes / kSlices, std::min(least_bytes, slot_bytes), slot_bytes);
}

// Lanes of slots that a rank uses: to and from every peer and itself, everyone's results, both ways of the ring.
constexpr int64_t used_lanes(int nranks) { return 3 * int64_t{nranks} + 2; }

// Mailboxes take no memory: nobody touches them where a carrier moves the messages.
// The largest slots that perform well, at most `wished`, and fit. Throws Error(argument) where none do.
int64_t carried_slot_bytes(int nranks, int64_t scratch_bytes, int64_t wished);
int64_t carried_used_bytes(int nranks, int64_t slot_bytes);
// One rank's copies of all arenas, one after the other.
int64_t carried_arena_bytes(int nranks, int64_t slot_bytes);

// A codec's steps, timed.
class TimedSteps final : public Stepper {
 public:
  TimedSteps(const Isa& isa, const Team& team, const Bucket& bucket, const Header& header, Tally& tally)
      : isa_(isa), team_(team), bucket_(bucket), header_(header), tally_(tally) {}

  void play(const Step& step, bool in_place) override {
    const DefaultFloatEnvironment environment;
    isa_.run_step({team_, bucket_, header_, step, in_place, tally_});
  }
  void pause() override { tally_.enter(Phase::wait); }

 private:
  const Isa& isa_;
  const Team& team_;
  const Bucket& bucket_;
  const Header& header_;
  Tally& tally_;
};

}  // namespace dpcomm
