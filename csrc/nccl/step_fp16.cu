// Kernels of codec fp16.
#include "step_kernels.cuh"

namespace dpcomm {

const void* step_kernel_fp16(Dtype dtype, Algorithm algorithm) {
  if (dtype == Dtype::float32) return step_address<Fp16<Float32>>(algorithm);
  if (dtype == Dtype::float16) return step_address<Fp16<Float16>>(algorithm);
  if (dtype == Dtype::bfloat16) return step_address<Fp16<Bfloat16>>(algorithm);
  return nullptr;
}

}  // namespace dpcomm
