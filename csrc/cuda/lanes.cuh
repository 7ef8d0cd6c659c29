// A rank played by one CTA. A lane is a thread and moves one vector of eight elements at once, so a group is one warp.
#pragma once
#include "../core/all_reduce.h"
#include "device_wait.h"

namespace dpcomm {
inline namespace DPCOMM_ISA {

struct CtaLanes {
  static constexpr bool puts_off = false;  // other warps fill the time
  template <class Codec>
  static constexpr int vectors = 1;
  static_assert(kGroup == 32 * kVec, "group_max is a reduction over one warp");

  DeviceWait patience{};
  uint64_t* nonfinite_groups = nullptr;

  __device__ int index() const { return int(threadIdx.x); }
  __device__ int count() const { return int(blockDim.x); }  // whole warps: the lanes of a group loop alike
  __device__ bool sync(bool ok) const { return __syncthreads_and(ok); }

  // One lane acquires or releases; the barrier in sync() before or after extends that to all lanes of the CTA.
  __device__ bool wait(const Flag* flag, uint32_t value, int peer) const { return patience(flag, value, peer); }
  __device__ void post(Flag* flag, uint32_t value) const { store_release(&flag->value, value); }

  __device__ int32_t group_max(int32_t m) const { return __reduce_max_sync(~0u, m); }
  template <class T>
  __device__ void push(T* to, const Vec<T>& v) const {
    store(to, v);
  }

  __device__ void phase(Phase) const {}  // the host cannot see it
  __device__ void nonfinite_group() const {
    if (threadIdx.x % 32 == 0) atomicAdd(reinterpret_cast<unsigned long long*>(nonfinite_groups), 1ull);
  }
};

}  // namespace DPCOMM_ISA
}  // namespace dpcomm
