// Between hosts, with several ranks on them: each shard (core/shards.h) is reduced among its owners, one on each host,
// while the ranks of a host gather what comes next and spread what has arrived. The same for CPU and GPU.
//
//   round c    gather c        every host's sum of slice c
//              Player::round   hosts exchange: give c, reduce c - 2, take c - 4     (schedule.h)
//              spread c - 2    what this host's owners reduced
//              spread c - 4    what they took from other hosts
//
// Ranks of one host have the same place among hosts, so they do the same in the same order; a rank that owns several
// shards plays them a round at a time, since its peers on a larger host play one each, at once.
#pragma once
#include <optional>

#include "../core/shards.h"
#include "partition.h"
#include "schedule.h"

namespace dpcomm {

// What moves values inside the host.
class Inside {
 public:
  // False: the call cannot be finished, and the first cause has been proposed.
  virtual bool round(LocalTurn turn, int64_t slice, int part) = 0;

 protected:
  ~Inside() = default;
};

// `players`: of the shards that this rank owns; `host`: which of the hosts this is. Returns how the first exchange that
// did not end well ended; nothing where that happened inside the host.
std::optional<Arrival> play(std::vector<Player>& players, Inside& inside, const Shards& shards, int host);

// What hosts are told of a call: the algorithm between them, which follows from the size of a shard.
Header header_between(const Header& header, int64_t groups, const Partition& partition);

// The groups [first, first + groups) of a bucket as a bucket of their own, in `table`, which keeps its capacity.
Bucket part_of(const Bucket& bucket, Range range, int64_t element_bytes, std::vector<Segment>& table);

}  // namespace dpcomm
