// Finds the kernel of a coding. The engine launches by address; what lies behind it is a GPU's kernel, or in tests one
// of host threads.
#pragma once
#include "../core/types.h"

namespace dpcomm {

// Takes one P2pCall by value; its launch bounds say how many lanes a CTA has. Null where the codec does not serve the
// dtype. One kernel for each algorithm: together they would need more registers than a lane has.
const void* p2p_kernel(Dtype dtype, CodecKind codec, Algorithm algorithm);

// Its parts: a translation unit each, so that they compile at the same time.
const void* p2p_kernel_float(Dtype dtype, Algorithm algorithm);
const void* p2p_kernel_half(Dtype dtype, Algorithm algorithm);
const void* p2p_kernel_whole(Dtype dtype, Algorithm algorithm);
const void* p2p_kernel_fp16(Dtype dtype, Algorithm algorithm);

}  // namespace dpcomm
