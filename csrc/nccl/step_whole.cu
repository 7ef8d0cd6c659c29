// Kernels of codec none for whole numbers.
#include "step_kernels.cuh"

namespace dpcomm {

const void* step_kernel_whole(Dtype dtype, Algorithm algorithm) {
  if (dtype == Dtype::int32) return step_address<None<Int32>>(algorithm);
  if (dtype == Dtype::int64) return step_address<None<Int64>>(algorithm);
  return nullptr;
}

}  // namespace dpcomm
