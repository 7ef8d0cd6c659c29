// The kernels of one codec. All threads of a launch share a step's groups: nobody waits, so CTAs need not be resident.
#pragma once
#include "../core/select.h"
#include "step_kernel.h"
#include "step_kernels.h"

namespace dpcomm {
inline namespace DPCOMM_ISA {

struct GridLanes {
  static constexpr bool puts_off = false;  // other warps fill the time
  template <class Codec>
  static constexpr int vectors = 1;
  static_assert(kGroup == 32 * kVec, "group_max is a reduction over one warp");

  bool in_place;
  uint64_t* nonfinite_groups;

  __device__ int index() const { return int(blockIdx.x * blockDim.x + threadIdx.x); }
  __device__ int count() const { return int(gridDim.x * blockDim.x); }  // whole warps: a group's lanes loop alike
  __device__ bool sync(bool ok) const { return ok; }
  __device__ bool wait(Flag*, uint32_t, int) const { return true; }
  __device__ void post(Flag*, uint32_t) const {}
  __device__ int32_t group_max(int32_t m) const { return __reduce_max_sync(~0u, m); }
  template <class T>
  __device__ void push(T* to, const Vec<T>& v) const {
    if (!in_place) store(to, v);
  }
  __device__ void phase(Phase) const {}
  __device__ void nonfinite_group() const {
    if (threadIdx.x % 32 == 0) atomicAdd(reinterpret_cast<unsigned long long*>(nonfinite_groups), 1ull);
  }
};

}  // namespace DPCOMM_ISA

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
