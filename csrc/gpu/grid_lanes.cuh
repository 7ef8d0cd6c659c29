// Lanes of kernels that wait for nobody: all threads of a launch share a range of groups, so CTAs need not be resident.
#pragma once
#include "../core/protocol.h"
#include "launch.h"

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

}  // namespace dpcomm
