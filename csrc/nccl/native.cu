// The kernels around NCCL's own all-reduce in 16 bits: each value is read once and written once.
#include "../core/native.h"
#include "native_kernels.h"
#include "step_kernels.cuh"

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

using Kernel = void (*)(NativeLaunch);

// of(codec) for the codec of these names.
template <class Of>
const void* kernel_for(Dtype dtype, CodecKind codec, Of of) {
  const bool half = codec == CodecKind::fp16;
  Kernel kernel = nullptr;
  if (dtype == Dtype::float32) kernel = half ? of(Native<Float32, Float16>()) : of(Native<Float32, Bfloat16>());
  if (dtype == Dtype::float16) kernel = half ? of(Native<Float16, Float16>()) : of(Native<Float16, Bfloat16>());
  if (dtype == Dtype::bfloat16) kernel = half ? of(Native<Bfloat16, Float16>()) : of(Native<Bfloat16, Bfloat16>());
  return reinterpret_cast<const void*>(kernel);
}

}  // namespace

const void* cast_kernel(Dtype dtype, CodecKind codec) {
  return kernel_for(dtype, codec, [](auto c) -> Kernel { return &cast_values<decltype(c)>; });
}
const void* widen_kernel(Dtype dtype, CodecKind codec) {
  return kernel_for(dtype, codec, [](auto c) -> Kernel { return &widen_codes<decltype(c)>; });
}

}  // namespace dpcomm
