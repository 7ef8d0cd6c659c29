// A bucket as a table of segments: the tensors of one call, reduced in place without a flat copy.
// Each segment starts a new group, so what a group holds does not depend on its neighbours.
#pragma once
#include "portable.h"
#include "types.h"

namespace dpcomm {

struct Segment {
  char* data;  // the tensor, aligned to its element
  int64_t elems;
  int64_t first_group;  // groups of the segments before it: where it lies on the wire
};

struct Bucket {
  const Segment* segments;
  int64_t count;   // segments; at least one
  int64_t groups;  // in all of them
};

struct Range {
  int64_t first, groups;  // [first, first + groups)
};

inline namespace DPCOMM_ISA {

DPCOMM_HD int64_t groups_of(int64_t elems) { return elems / kGroup + (elems % kGroup != 0); }

// The last segment that starts at or before group g: the one that holds g, since empty ones come before it.
DPCOMM_HD int64_t segment_of(const Bucket& bucket, int64_t g) {
  int64_t low = 0, high = bucket.count;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (bucket.segments[middle].first_group <= g ? low : high) = middle;
  }
  return low;
}

// What one lane handles at once: `count` elements at x, the first of them element `at` of the message.
template <class T>
struct Unit {
  T* x;
  int count;  // less than `width` at the end of a segment, 0 behind it
  int64_t at;
};

// Calls body(unit, whole) for the units of this lane, `width` elements each, in a range of groups.
// `whole` is decided per group, so that lanes which share a group agree; it means full, and aligned for wide access.
template <class T, int width, class Lanes, class Body>
DPCOMM_HD void each_unit(const Lanes& lanes, const Bucket& bucket, Range range, Body body) {
  constexpr int units = kGroup / width;
  if (range.groups <= 0) return;
  int64_t s = segment_of(bucket, range.first);
  for (int64_t u = lanes.index(); u < range.groups * units; u += lanes.count()) {
    const int64_t g = range.first + u / units;
    while (s + 1 < bucket.count && bucket.segments[s + 1].first_group <= g) ++s;
    const Segment& segment = bucket.segments[s];
    const int64_t begin = (g - segment.first_group) * kGroup, left = segment.elems - begin;
    const int offset = int(u % units) * width;
    const int64_t mine = left - offset;
    T* x = reinterpret_cast<T*>(segment.data) + begin + offset;
    const bool aligned = kVecAlign == 1 || reinterpret_cast<uintptr_t>(segment.data) % kVecAlign == 0;
    body(Unit<T>{x, int(mine < 0 ? 0 : mine < width ? mine : width), u * width}, left >= kGroup && aligned);
  }
}

}  // namespace DPCOMM_ISA
}  // namespace dpcomm
