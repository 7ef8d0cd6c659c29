// Kernels of codec fp16.
#include "p2p_kernels.cuh"

namespace dpcomm {

const void* p2p_kernel_fp16(Dtype dtype, Algorithm algorithm) {
  if (dtype == Dtype::float32) return address<Fp16<Float32>>(algorithm);
  if (dtype == Dtype::float16) return address<Fp16<Float16>>(algorithm);
  if (dtype == Dtype::bfloat16) return address<Fp16<Bfloat16>>(algorithm);
  return nullptr;
}

}  // namespace dpcomm
