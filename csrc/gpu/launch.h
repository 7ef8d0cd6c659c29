// What kernels of GPU engines have in common: plain data, the same for host and device code.
#pragma once
#include "../core/segments.h"

namespace dpcomm {

constexpr int kCtaThreads = 512;     // at most: 16 groups at once; 128 registers each, so that one CTA fits on every SM
constexpr int kInlineSegments = 96;  // of one launch that come by value with it

}  // namespace dpcomm
