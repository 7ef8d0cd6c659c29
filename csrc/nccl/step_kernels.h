// Finds the kernels of engine nccl. The engine launches by address; what lies behind it is a GPU's kernel, or in tests
// one of host threads.
#pragma once
#include "../core/types.h"

namespace dpcomm {

// Takes one StepLaunch by value, with any number of CTAs. Null where the codec does not serve the dtype.
const void* step_kernel(Dtype dtype, CodecKind codec, Algorithm algorithm);

// Takes one InsideLaunch, likewise.
const void* inside_kernel(Dtype dtype, CodecKind codec);

// Parts of step_kernel: a translation unit each, so that they compile at the same time.
const void* step_kernel_float(Dtype dtype, Algorithm algorithm);
const void* step_kernel_half(Dtype dtype, Algorithm algorithm);
const void* step_kernel_whole(Dtype dtype, Algorithm algorithm);
const void* step_kernel_fp16(Dtype dtype, Algorithm algorithm);

const void* begin_kernel();  // takes one BeginLaunch; one CTA
const void* end_kernel();    // takes one EndLaunch; one CTA

}  // namespace dpcomm
