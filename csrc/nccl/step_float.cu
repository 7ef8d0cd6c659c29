// Kernels of codec none for float32 and float64.
#include "step_kernels.cuh"

namespace dpcomm {

const void* step_kernel_float(Dtype dtype, Algorithm algorithm) {
  if (dtype == Dtype::float32) return step_address<None<Float32>>(algorithm);
  if (dtype == Dtype::float64) return step_address<None<Float64>>(algorithm);
  return nullptr;
}

}  // namespace dpcomm
