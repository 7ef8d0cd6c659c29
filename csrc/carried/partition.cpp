#include "partition.h"

#include <algorithm>
#include <climits>

namespace dpcomm {

Partition::Partition(int rank, std::vector<std::vector<int>> hosts) : hosts_(std::move(hosts)), smallest_(INT_MAX) {
  for (size_t h = 0; h < hosts_.size(); ++h) {
    const std::vector<int>& ranks = hosts_[h];
    shards_ = std::max(shards_, int(ranks.size()));
    smallest_ = std::min(smallest_, int(ranks.size()));
    const auto found = std::find(ranks.begin(), ranks.end(), rank);
    if (found != ranks.end()) host_ = int(h), local_ = int(found - ranks.begin());
  }
}

std::vector<int> Partition::owners(int shard) const {
  std::vector<int> owners;
  for (const std::vector<int>& ranks : hosts_) owners.push_back(ranks[size_t(shard) % ranks.size()]);
  return owners;
}

uint64_t Partition::hash() const {
  uint64_t h = 0xcbf29ce484222325;  // FNV-1a over whole words
  for (const std::vector<int>& ranks : hosts_) {
    for (const int r : ranks) h = (h ^ uint64_t(r + 1)) * 0x100000001b3;
    h *= 0x100000001b3;
  }
  return h;
}

}  // namespace dpcomm
