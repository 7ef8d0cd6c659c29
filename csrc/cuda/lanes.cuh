// A rank played by one CTA. A lane is a thread and moves one vector of eight elements at once, so a group is one warp.
#pragma once
#include "../core/all_reduce.h"

namespace dpcomm {
inline namespace DPCOMM_ISA {

struct CtaLanes {
  static constexpr bool puts_off = false;  // other warps fill the time
  template <class Codec>
  static constexpr int vectors = 1;
  static_assert(kGroup == 32 * kVec, "group_max is a reduction over one warp");

  uint64_t* failure;  // of the team
  unsigned long long* nonfinite_groups;
  uint64_t timeout_ns;  // of one wait: a peer that makes progress is alive
  uint32_t sequence;    // of this call, for the failure record
  int rank;

  __device__ int index() const { return int(threadIdx.x); }
  __device__ int count() const { return int(blockDim.x); }  // whole warps: the lanes of a group loop alike
  __device__ bool sync(bool ok) const { return __syncthreads_and(ok); }

  // One lane acquires or releases; the barrier in sync() before or after extends that to all lanes of the CTA.
  __device__ bool wait(const Flag* flag, uint32_t value, int peer) const {
    if (reached(load_acquire(&flag->value), value)) return true;
    const uint64_t start = now_ns();
    for (uint64_t looked = start; !reached(load_acquire(&flag->value), value);) {
      const uint64_t now = now_ns();
      if (now - looked < kLookNs) continue;
      looked = now;
      if (load_acquire(failure) != 0) return false;  // somebody gave up
      if (now - start < timeout_ns) continue;
      set_once(failure, pack({Cause::timeout, uint8_t(rank), uint8_t(peer), Field::none, sequence}));
      return false;
    }
    return true;
  }
  __device__ void post(Flag* flag, uint32_t value) const { store_release(&flag->value, value); }

  __device__ int32_t group_max(int32_t m) const { return __reduce_max_sync(~0u, m); }
  template <class T>
  __device__ void push(T* to, const Vec<T>& v) const {
    store(to, v);
  }

  __device__ void phase(Phase) const {}  // times are taken on the host
  __device__ void nonfinite_group() const {
    if (threadIdx.x % 32 == 0) atomicAdd(nonfinite_groups, 1ull);
  }

 private:
  // Between two looks at the failure word, which lies further away than the flag.
  static constexpr uint64_t kLookNs = 10'000;

  __device__ static uint64_t now_ns() {
    uint64_t t;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
    return t;
  }
};

}  // namespace DPCOMM_ISA
}  // namespace dpcomm
