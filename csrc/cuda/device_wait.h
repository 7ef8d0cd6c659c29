// How a lane waits on a GPU: it polls its own memory, and every 10 us looks whether anybody gave up, and at the clock.
#pragma once
#if !defined(__CUDA_ARCH__)
#include <sched.h>
#include <time.h>
#endif

#include "../core/protocol.h"

namespace dpcomm {
inline namespace DPCOMM_ISA {

struct DeviceWait {
  uint64_t* failure;            // of my rank
  const uint64_t* first_cause;  // of all ranks; further away
  uint64_t timeout_ns;
  uint32_t sequence;  // of this call, for the failure word
  int rank;

  // Acquires the flag. False: the failure word is set.
  DPCOMM_HD bool operator()(const Flag* flag, uint32_t value, int peer) const {
    if (reached(load_acquire(&flag->value), value)) return true;
    const uint64_t start = now_ns();
    for (uint64_t looked = start; !reached(load_acquire(&flag->value), value); yield()) {
      const uint64_t now = now_ns();
      if (now - looked < kLookNs) continue;
      looked = now;
      if (given_up()) return false;
      if (now - start < timeout_ns) continue;
      set_once(failure, pack({Cause::timeout, uint8_t(rank), uint8_t(peer), Field::none, sequence}));
      return false;
    }
    return true;
  }

  // Another CTA of my rank, or another rank.
  DPCOMM_HD bool given_up() const {
    if (load_acquire(failure) != 0) return true;
    const uint64_t cause = load_acquire(first_cause);
    if (cause != 0) set_once(failure, cause);
    return cause != 0;
  }

 private:
  static constexpr uint64_t kLookNs = 10'000;

#if defined(__CUDA_ARCH__)
  __device__ static uint64_t now_ns() {
    uint64_t t;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
    return t;
  }
  __device__ static void yield() {}
#else
  static uint64_t now_ns() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return uint64_t(t.tv_sec) * 1'000'000'000 + uint64_t(t.tv_nsec);
  }
  static void yield() { sched_yield(); }
#endif
};

}  // namespace DPCOMM_ISA
}  // namespace dpcomm
