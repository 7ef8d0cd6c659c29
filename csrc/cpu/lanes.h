// A rank played by one thread: its single lane holds whole groups where they matter, and its registers are the
// processor's vectors.
#pragma once
#include "../core/all_reduce.h"
#include "kernels.h"

namespace dpcomm {
inline namespace DPCOMM_ISA {

struct HostLanes {
  static constexpr bool puts_off = true;
  template <class Codec>
  static constexpr int vectors = Codec::scaled ? kGroup / kVec : 8;
  const KernelCall& call;
  bool streaming = false;  // stores into slots pass the caches by; asked for anew with each slice

  int index() const { return 0; }
  int count() const { return 1; }
  bool sync(bool ok) const { return ok; }
  Uniform<int32_t> group_max(Uniform<int32_t> m) const { return m; }

  bool wait(Flag* flag, uint32_t value, int peer) {
    if (load_acquire(call.waiting.failure) != 0) return false;  // once a slice: somebody gave up
    if (reached(load_acquire(&flag->value), value)) return true;
    phase(Phase::wait);
    int& spins = *call.waiting.spins;
    for (int i = 0; i < spins; ++i) {
      pause();
      if (!reached(load_acquire(&flag->value), value)) continue;
      spins = spins * 2 < call.waiting.most_spins ? spins * 2 : call.waiting.most_spins;
      return true;
    }
    spins = spins / 2 > kLeastSpins ? spins / 2 : kLeastSpins;
    return wait_long(flag, value, peer, call.waiting);
  }
  void post(Flag* flag, uint32_t value) const {
#if defined(__SSE2__)
    if (streaming) _mm_sfence();  // streaming stores are not ordered by the flag's
#endif
    post_and_wake(flag, value);
  }

  template <class T>
  DPCOMM_HD void push(T* to, const Vec<T>& v) const {
#if defined(__SSE2__)
    if (streaming) return stream(to, v);
#endif
    store(to, v);
  }

  void phase(Phase p) {
    call.tally.enter(p);
    if (p == Phase::put) streaming = call.stores.next(call.tally) == Store::streaming;
  }
  void nonfinite_group() const { ++call.tally.nonfinite_groups; }

 private:
  static constexpr int kLeastSpins = 2;

  static void pause() {
#if defined(__SSE2__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }
};

// The same, one step at a time: whoever runs the steps waits before and sends afterwards. in_place: what is reduced
// goes into user memory only.
template <bool in_place>
struct StepLanes {
  static constexpr bool puts_off = true;
  template <class Codec>
  static constexpr int vectors = Codec::scaled ? kGroup / kVec : 8;
  Tally& tally;

  int index() const { return 0; }
  int count() const { return 1; }
  bool sync(bool ok) const { return ok; }
  Uniform<int32_t> group_max(Uniform<int32_t> m) const { return m; }
  bool wait(Flag*, uint32_t, int) const { return true; }
  void post(Flag*, uint32_t) const {}
  void phase(Phase p) { tally.enter(p); }
  void nonfinite_group() const { ++tally.nonfinite_groups; }

  template <class T>
  DPCOMM_HD void push(T* to, const Vec<T>& v) const {
    if constexpr (!in_place) store(to, v);
  }
};

}  // namespace DPCOMM_ISA
}  // namespace dpcomm
