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

// Calls body(unit, whole) for the units of this lane, `width` elements each, in a range of groups. `whole` is decided
// per group, so that lanes which share a group agree; it means full, and aligned for wide access.
//
// Groups come in runs: the whole groups of a segment, then its short last one. All that depends on the segment is
// worked out once a run.
template <class T, int width, class Lanes, class Body>
DPCOMM_HD void each_unit(const Lanes& lanes, const Bucket& bucket, Range range, Body body) {
  constexpr int units = kGroup / width;
  const int64_t end = range.groups * units;
  int64_t u = lanes.index();
  if (u >= end) return;
  for (int64_t s = segment_of(bucket, range.first + u / units); u < end;) {
    const int64_t g = range.first + u / units;
    while (s + 1 < bucket.count && bucket.segments[s + 1].first_group <= g) ++s;
    const Segment& segment = bucket.segments[s];
    const int64_t whole_end = segment.first_group + segment.elems / kGroup;
    const bool is_short = g >= whole_end;
    const int64_t run_end = ((is_short ? whole_end + 1 : whole_end) - range.first) * units;
    const bool whole = !is_short && (kVecAlign == 1 || reinterpret_cast<uintptr_t>(segment.data) % kVecAlign == 0);
    T* const x =
        reinterpret_cast<T*>(segment.data) + (range.first - segment.first_group) * kGroup;  // of message element 0
    const int64_t left =
        segment.elems - (range.first - segment.first_group) * kGroup;  // from there to the segment's end
    for (; u < run_end && u < end; u += lanes.count()) {
      const int64_t mine = left - u * width;
      const int count = is_short ? int(mine < 0 ? 0 : mine < width ? mine : width) : width;
      body(Unit<T>{x + u * width, count, u * width}, whole);
    }
  }
}

}  // namespace DPCOMM_ISA
}  // namespace dpcomm
