#include "pattern.h"

namespace dpcomm {

std::vector<int32_t> pattern_of(int rank, size_t elems) {
  std::vector<int32_t> data(elems);
  for (size_t i = 0; i < elems; ++i) data[i] = int32_t(i * 31 + size_t(rank) * 1000003);
  return data;
}

int64_t first_wrong(const std::vector<int32_t>& sums, int64_t elems, int nranks) {
  const uint32_t n = uint32_t(nranks);
  for (size_t i = 0; i < size_t(elems); ++i)
    if (uint32_t(sums[i]) != uint32_t(i) * 31 * n + 1000003 * (n * (n - 1) / 2)) return int64_t(i);
  return -1;
}

PatternCall::PatternCall(int rank) : data(pattern_of(rank, size_t(kGroup) * 64 + 1)) {
  call.addresses = {reinterpret_cast<char*>(data.data())};
  call.counts = {int64_t(data.size())};
  call.dtype = Dtype::int32;
  call.algorithm = Algorithm::direct;
}

}  // namespace dpcomm
