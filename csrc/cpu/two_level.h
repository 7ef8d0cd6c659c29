// Algorithm two_level of carried engines: a call as rounds inside the host, and as all-reduces of shards between hosts.
#pragma once
#include <optional>
#include <vector>

#include "../engine.h"
#include "../host/arena.h"
#include "carried_steps.h"
#include "host_team.h"

namespace dpcomm {

class TwoLevel final : private Inside {
 public:
  // scratch_bytes: for what goes between hosts. Throws Error(argument) if it cannot hold the smallest slots.
  TwoLevel(int rank, int nranks, HostMemory memory, int64_t scratch_bytes, ControlPlane& plane, const Isa& isa);

  // Whether it takes a call that leaves the algorithm open. Sums of a host lie in user memory, in the tensor's type: in
  // float16 they may overflow where the mean does not; minima and maxima cannot.
  static bool suits(const Call& call) { return call.dtype != Dtype::float16 || call.op > Op::mean; }

  // Nothing: the call failed inside the host, and the control plane knows why, or decides.
  std::optional<Arrival> play(Carrier& carrier, const Bucket& bucket, const Header& header, double timeout_s,
                              Tally& tally);

  // What the last call sent to other hosts.
  int64_t wire_bytes() const { return wire_bytes_; }
  const Partition& partition() const { return inside_.partition(); }
  CodecKind codec_inside() const { return inside_.memory().codec; }
  int64_t bytes() const { return used_bytes_ + inside_.bytes(); }

 private:
  struct Outer {                // a shard that this rank owns
    std::vector<int> owners;    // by host
    std::vector<Mailbox*> box;  // my copies of the owners' arenas
    Team team;
    std::vector<Segment> segments;
    Bucket bucket;
  };

  bool round(LocalTurn turn, int64_t slice, int part) override { return inside_.round(turn, slice, part); }
  Shards cut(const Bucket& bucket, const Header& header, int64_t slice_bytes) const;
  int64_t slice_bytes(const Bucket& bucket, const Header& header) const;

  const Isa& isa_;
  HostTeam inside_;
  Arena scratch_;
  std::vector<Outer> outer_;  // of this rank, ascending
  int64_t used_bytes_ = 0, wire_bytes_ = 0, slot_bytes_ = 0;
};

}  // namespace dpcomm
