// Kernels of two levels: what the ranks of a host do before and after an exchange between hosts.
#include "../core/select.h"
#include "../gpu/grid_lanes.cuh"
#include "step_kernel.h"
#include "step_kernels.h"

namespace dpcomm {

namespace {

template <class Codec>
__global__ void __launch_bounds__(kCtaThreads, 1) inside(const __grid_constant__ InsideLaunch launch) {
  GridLanes lanes{false, launch.nonfinite_groups};
  run_inside<Codec>(lanes, launch);
}

}  // namespace

const void* inside_kernel(Dtype dtype, CodecKind codec) {
  Header header{};
  header.dtype = uint8_t(dtype);
  header.codec = uint8_t(codec);
  return with_codec(header, [](auto coding) { return reinterpret_cast<const void*>(&inside<decltype(coding)>); });
}

}  // namespace dpcomm
