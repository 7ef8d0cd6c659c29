// The kernels of one codec. All threads of a launch share a step's groups: nobody waits, so CTAs need not be resident.
#pragma once
#include "../core/select.h"
#include "../gpu/grid_lanes.cuh"
#include "step_kernel.h"
#include "step_kernels.h"

namespace dpcomm {

template <class Codec, Algorithm algorithm>
__global__ void __launch_bounds__(kCtaThreads, 1) steps(const __grid_constant__ StepLaunch launch) {
  GridLanes lanes{launch.in_place, launch.nonfinite_groups};
  run_steps<Codec, algorithm>(lanes, launch);
}

template <class Codec>
const void* step_address(Algorithm algorithm) {
  return reinterpret_cast<const void*>(of_algorithm(algorithm, &steps<Codec, Algorithm::direct>,
                                                    &steps<Codec, Algorithm::oneshot>, &steps<Codec, Algorithm::ring>));
}

}  // namespace dpcomm
