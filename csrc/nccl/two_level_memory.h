// What two levels of engine nccl work in: slots in device memory, for messages between hosts and inside this one.
#pragma once
#include <memory>
#include <vector>

#include "../carried/two_level.h"
#include "scratch.h"

namespace dpcomm {

// Who is where; equal on all ranks. hosts: the ranks of each, ascending; none: no two levels.
struct NcclHosts {
  std::vector<std::vector<int>> hosts;
  CodecKind codec = CodecKind::none;  // inside a host, in calls that have one
};

class TwoLevelMemory {
 public:
  // scratch_bytes: of this rank, at most. slice_bytes: 0: what performs best. Throws Error(argument) if they cannot
  // hold the smallest slots.
  TwoLevelMemory(int rank, int nranks, const NcclHosts& hosts, int64_t scratch_bytes, int64_t slice_bytes);

  const Partition& partition() const { return partition_; }
  // What travels inside the host in calls with this codec: what no codec encodes between hosts goes plainly there, too.
  CodecKind inside(CodecKind codec) const { return codec == CodecKind::none ? codec : codec_; }
  CodecKind codec_inside() const { return codec_; }
  const Team& team(int nth) const { return outer_[size_t(nth)]->team; }  // of the owners of my nth shard, by host
  int64_t bytes() const;

  // How a call is cut. header: between hosts.
  Shards cut(int64_t groups, const Header& header) const;

  // Slots inside the host, by local rank: what I give to an owner, what a rank has given me (my own too), what an owner
  // shows to all.
  char* given(int owner) { return inside_slot(0, owner); }
  char* contribution(int rank) { return inside_slot(1, rank); }
  char* shown(int owner) { return inside_slot(2, owner); }
  int64_t inside_slot_bytes() const { return inside_bytes_; }

 private:
  struct Outer {
    Scratch scratch;
    Team team;
  };
  char* inside_slot(int kind, int rank) { return inside_.data() + (kind * partition_.size() + rank) * inside_bytes_; }

  const Partition partition_;
  const CodecKind codec_;
  int64_t inside_bytes_;  // of a slot; the same on all ranks of a host
  DeviceArray<char> inside_;
  std::vector<std::unique_ptr<Outer>> outer_;
};

}  // namespace dpcomm
