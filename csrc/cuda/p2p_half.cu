// Kernels of codec none for the 16-bit types, which widen to float for the sum.
#include "p2p_kernels.cuh"

namespace dpcomm {

const void* p2p_kernel_half(Dtype dtype, Algorithm algorithm) {
  if (dtype == Dtype::float16) return address<None<Float16>>(algorithm);
  if (dtype == Dtype::bfloat16) return address<None<Bfloat16>>(algorithm);
  return nullptr;
}

}  // namespace dpcomm
