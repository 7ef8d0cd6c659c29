// The kernels around NCCL's own all-reduce in 16 bits: each value is read once and written once.
#include "../core/native.h"
#include "grid_lanes.cuh"
#include "native_kernels.h"

namespace dpcomm {

namespace {

// More than one CTA an SM: they only wait for memory.
template <class Codec>
__global__ void __launch_bounds__(kCtaThreads, 2) cast_values(const __grid_constant__ NativeLaunch launch) {
  GridLanes lanes{false, launch.nonfinite_groups};
  cast<Codec>(lanes, bucket_of(launch.bucket), range_of(launch), launch.nranks, launch.codes);
}

template <class Codec>
__global__ void __launch_bounds__(kCtaThreads, 2) widen_codes(const __grid_constant__ NativeLaunch launch) {
  GridLanes lanes{false, launch.nonfinite_groups};
  widen<Codec>(lanes, bucket_of(launch.bucket), range_of(launch), launch.codes);
}

}  // namespace

const void* cast_kernel(Dtype dtype, CodecKind codec) {
  return with_native_codec(dtype, codec,
                           [](auto c) { return reinterpret_cast<const void*>(&cast_values<decltype(c)>); });
}
const void* widen_kernel(Dtype dtype, CodecKind codec) {
  return with_native_codec(dtype, codec,
                           [](auto c) { return reinterpret_cast<const void*>(&widen_codes<decltype(c)>); });
}

}  // namespace dpcomm
