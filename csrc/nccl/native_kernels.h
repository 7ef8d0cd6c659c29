// Finds the kernels around NCCL's own all-reduce in 16 bits; see step_kernels.h.
#pragma once
#include <vector>

#include "../core/types.h"

namespace dpcomm {

// Take one NativeLaunch by value, with any number of CTAs. codec: fp16 or bf16. Null where it does not serve the dtype.
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
