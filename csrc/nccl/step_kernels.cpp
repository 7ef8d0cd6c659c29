#include "step_kernels.h"

namespace dpcomm {

const void* step_kernel(Dtype dtype, CodecKind codec, Algorithm algorithm) {
  if (codec == CodecKind::fp16) return step_kernel_fp16(dtype, algorithm);
  if (codec != CodecKind::none) return nullptr;
  switch (dtype) {
    case Dtype::float32:
    case Dtype::float64:
      return step_kernel_float(dtype, algorithm);
    case Dtype::float16:
    case Dtype::bfloat16:
      return step_kernel_half(dtype, algorithm);
    case Dtype::int32:
    case Dtype::int64:
      return step_kernel_whole(dtype, algorithm);
  }
  return nullptr;
}

}  // namespace dpcomm
