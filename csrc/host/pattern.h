// What engines move in their first call: whole numbers, different on each rank and at each place, so that the sum is
// known. Memory that two ranks see at different addresses or not at all shows in it.
#pragma once
#include <vector>

#include "../engine.h"

namespace dpcomm {

std::vector<int32_t> pattern_of(int rank, size_t elems);

// The first place where `sums` are not those of the patterns of all ranks, of `elems` places; -1: none.
int64_t first_wrong(const std::vector<int32_t>& sums, int64_t elems, int nranks);

// A call that adds the pattern up, in place.
struct PatternCall {
  std::vector<int32_t> data;
  Call call;
  explicit PatternCall(int rank);
  int64_t first_wrong(int nranks) const { return dpcomm::first_wrong(data, int64_t(data.size()), nranks); }
};

}  // namespace dpcomm
