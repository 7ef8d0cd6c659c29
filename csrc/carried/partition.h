// Who is on which host, and who owns which shard (core/shards.h), as one rank sees it. Pure arithmetic.
//
//   hosts {0 1 2} {3 4}     three shards, as many as the largest host has ranks
//   shard s                 belongs to local rank s % (ranks of the host) of each host: 0 3, 1 4, 2 3
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace dpcomm {

class Partition {
 public:
  // hosts: the ranks of each, ascending; none is empty, and `rank` is on one of them.
  Partition(int rank, std::vector<std::vector<int>> hosts);

  const std::vector<std::vector<int>>& hosts() const { return hosts_; }
  int nhosts() const { return int(hosts_.size()); }
  int host() const { return host_; }    // which of them this rank is on,
  int local() const { return local_; }  // and which of its ranks it is
  int size() const { return int(here().size()); }
  int rank_of(int local) const { return here()[std::size_t(local)]; }  // of this host, as all ranks know it

  int shards() const { return shards_; }
  int owned() const { return (shards_ - local_ + size() - 1) / size(); }    // by this rank
  int most_owned() const { return (shards_ + smallest_ - 1) / smallest_; }  // by any rank
  int shard(int nth) const { return local_ + nth * size(); }                // of those that this rank owns
  std::vector<int> owners(int shard) const;                                 // by host
  uint64_t hash() const;                                                    // the same for equal placements

 private:
  const std::vector<int>& here() const { return hosts_[std::size_t(host_)]; }

  std::vector<std::vector<int>> hosts_;
  int host_ = 0, local_ = 0, shards_ = 0, smallest_;
};

}  // namespace dpcomm
