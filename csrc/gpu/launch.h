// What kernels of GPU engines have in common: plain data, the same for host and device code.
#pragma once
#include "../core/segments.h"

namespace dpcomm {

constexpr int kCtaThreads = 512;     // at most: 16 groups at once; 128 registers each, so that one CTA fits on every SM
constexpr int kInlineSegments = 96;  // of one launch that come by value with it
constexpr int kGroupsOfCta = kCtaThreads / 32;

struct BucketTable {
  int64_t count, groups;
  const Segment* segments;  // in device memory; null where they are in `few`
  Segment few[kInlineSegments];
};

inline namespace DPCOMM_ISA {

DPCOMM_HD Bucket bucket_of(const BucketTable& table) {
  return {table.segments ? table.segments : table.few, table.count, table.groups};
}

}  // namespace DPCOMM_ISA
}  // namespace dpcomm
