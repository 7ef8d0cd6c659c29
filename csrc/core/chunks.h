// Which rank owns which groups of a bucket, and in which pieces they travel. Pure arithmetic, no memory.
//
//   bucket   |-------- chunk 0 --------|-------- chunk 1 --------|---- chunk 2 ----|     groups, cut into N chunks
//   slices   |   0   |   1   |   2    |   0   |   1   |   2    |   0   |  1  | 2 |     each chunk into equal slices
//
// Slice c of every chunk travels at the same time. Bits never depend on where the cuts are (class rank_order).
#pragma once
#include "segments.h"

namespace dpcomm {
inline namespace DPCOMM_ISA {

struct Chunks {
  int64_t groups, chunk_groups, slice_groups, slices;

  // At least one slice, even of an empty bucket: its message carries the header check.
  DPCOMM_HD static Chunks cut(int64_t groups, int parts, int64_t most_groups) {
    const int64_t chunk = (groups + parts - 1) / parts;
    const int64_t slices = chunk == 0 ? 1 : (chunk + most_groups - 1) / most_groups;
    return {groups, chunk, (chunk + slices - 1) / slices, slices};
  }
  DPCOMM_HD Range range(int64_t slice, int part) const {
    const int64_t chunk_begin = least(groups, part * chunk_groups),
                  chunk_end = least(groups, chunk_begin + chunk_groups);
    const int64_t begin = least(chunk_end, chunk_begin + slice * slice_groups);
    return {begin, least(chunk_end, begin + slice_groups) - begin};
  }

 private:
  DPCOMM_HD static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
};

// Groups that one slice may have: what the slot holds, or less where smaller slices keep more of them in flight.
template <class Codec>
DPCOMM_HD int64_t most_groups(int64_t slot_bytes, int64_t slice_bytes) {
  constexpr int64_t bytes = kGroup * sizeof(typename Codec::Code) + Codec::scaled;
  const int64_t fits = slot_bytes / bytes, wish = slice_bytes / bytes;
  return wish < 1 ? 1 : wish < fits ? wish : fits;
}

}  // namespace DPCOMM_ISA
}  // namespace dpcomm
