// The kernels around an all-reduce that a library makes in 16 bits (core/native.h), and what they are told. Whoever
// launches does so by address; what lies behind it is a GPU's kernel, or in tests one of host threads.
#pragma once
#include <vector>

#include "../core/chunks.h"
#include "launch.h"

namespace dpcomm {

// A slice of a bucket, to or from codes. Plain data, the same for host and device code.
struct NativeLaunch {
  BucketTable bucket;
  int64_t most_groups;  // of a slice
  int64_t slice;
  uint16_t* codes;
  int nranks;                  // of a mean; 1: a sum
  uint64_t* nonfinite_groups;  // in device memory
};
static_assert(sizeof(NativeLaunch) <= 4096, "what a kernel may be given by value on every GPU");

inline namespace DPCOMM_ISA {

// The kernel works it out: given as two numbers, nvcc 13.0 no longer sees that stores of neighbours can be one.
DPCOMM_HD Range range_of(const NativeLaunch& launch) {
  return Chunks::cut(launch.bucket.groups, 1, launch.most_groups).range(launch.slice, 0);
}

}  // namespace DPCOMM_ISA

// Take one NativeLaunch by value, with any number of CTAs. Null where the codec is not fp16 or bf16, or does not serve
// the dtype.
const void* cast_kernel(Dtype dtype, CodecKind codec);
const void* widen_kernel(Dtype dtype, CodecKind codec);

inline std::vector<const void*> native_kernels() {
  std::vector<const void*> kernels;
  for (const Dtype dtype : {Dtype::float32, Dtype::float16, Dtype::bfloat16})
    for (const CodecKind codec : {CodecKind::fp16, CodecKind::bf16})
      for (const void* kernel : {cast_kernel(dtype, codec), widen_kernel(dtype, codec)})
        if (kernel) kernels.push_back(kernel);
  return kernels;
}

}  // namespace dpcomm
