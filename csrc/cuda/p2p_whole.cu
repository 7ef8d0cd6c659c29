// Kernels of codec none for whole numbers.
#include "p2p_kernels.cuh"

namespace dpcomm {

const void* p2p_kernel_whole(Dtype dtype, Algorithm algorithm) {
  if (dtype == Dtype::int32) return address<None<Int32>>(algorithm);
  if (dtype == Dtype::int64) return address<None<Int64>>(algorithm);
  return nullptr;
}

}  // namespace dpcomm
