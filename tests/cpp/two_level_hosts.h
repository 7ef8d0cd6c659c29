// Hosts and codings that tests of two levels play, over the carrier of threads and over NCCL's stand-in.
#pragma once
#include <vector>

#include "core_steps.h"

namespace two_level {

using Hosts = std::vector<std::vector<int>>;

// Equal hosts, hosts of one rank, owners of one, two and three shards, ranks that alternate between hosts.
inline const std::vector<Hosts> kHosts = {{{0, 1}, {2, 3}},         {{0, 2}, {1, 3}},    {{0, 1, 2}, {3}},
                                          {{0}, {1, 2, 3, 4}},      {{0, 1}, {2, 3, 4}}, {{0, 1}, {2, 3}, {4, 5}},
                                          {{0, 4}, {1, 2, 3}, {5}}, {{0}, {1}, {2, 3}}};
inline const std::vector<steps::Kind> kCodings = {{dpcomm::CodecKind::none, dpcomm::Dtype::float32},
                                                  {dpcomm::CodecKind::none, dpcomm::Dtype::int32},
                                                  {dpcomm::CodecKind::fp16, dpcomm::Dtype::float32}};

inline int size_of(const Hosts& hosts) {
  int ranks = 0;
  for (const auto& host : hosts) ranks += int(host.size());
  return ranks;
}

}  // namespace two_level
