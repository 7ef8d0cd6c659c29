// Kernels of codec none for the 16-bit types.
#include "step_kernels.cuh"

namespace dpcomm {

const void* step_kernel_half(Dtype dtype, Algorithm algorithm) {
  if (dtype == Dtype::float16) return step_address<None<Float16>>(algorithm);
  if (dtype == Dtype::bfloat16) return step_address<None<Bfloat16>>(algorithm);
  return nullptr;
}

}  // namespace dpcomm
