// The ranks of this host that share memory, as one of them sees it: what they do around an all-reduce between hosts
// (core/local.h). Failures are the business of the control plane between all ranks.
#pragma once
#include <memory>
#include <vector>

#include "../carried/two_level.h"
#include "../host/control_plane.h"
#include "kernels.h"
#include "shm_engine.h"

namespace dpcomm {

// Where the ranks of all hosts are, and the memory of those of this one.
struct HostMemory {
  std::vector<std::vector<int>> hosts;  // their ranks, ascending; hosts by their lowest rank
  CodecKind codec;                      // inside a host
  Geometry geometry;
  std::vector<char*> arenas;    // of this host's ranks, as mapped here
  std::shared_ptr<void> owner;  // of the mappings
};

class HostTeam final : private Patience {
 public:
  HostTeam(int rank, HostMemory memory, ControlPlane& plane, const Isa& isa);

  const Partition& partition() const { return partition_; }
  int64_t bytes() const { return memory_.geometry.arena_bytes; }
  const HostMemory& memory() const { return memory_; }
  // Groups that one message takes, of elements of a dtype, in a call with this codec.
  int64_t message_groups(Dtype dtype, CodecKind codec) const;

  // Before the rounds of a call. header: of the whole call.
  void begin(const Bucket& bucket, const Header& header, const Shards& shards, double timeout_s, Tally& tally);
  // False: it cannot be finished, and the control plane knows why, or decides.
  bool round(LocalTurn turn, int64_t slice, int part);

 private:
  bool give_up(int) override { return false; }  // the failure word is the control plane's
  bool timed_out(const Flag* flag, uint32_t value, int peer) override;
  // What no codec encodes between hosts goes plainly inside them, too.
  CodecKind inside(CodecKind codec) const { return codec == CodecKind::none ? codec : memory_.codec; }

  const HostMemory memory_;
  const Partition partition_;
  ControlPlane& plane_;
  const Isa& isa_;
  const int rank_;  // of all
  std::vector<Mailbox*> box_;
  Team t_{};
  int spins_;
  // Of the current call.
  const Bucket* bucket_ = nullptr;
  Header header_{};
  const Shards* shards_ = nullptr;
  int64_t timeout_ns_ = 0;
  Tally* tally_ = nullptr;
};

}  // namespace dpcomm
