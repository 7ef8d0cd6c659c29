#include "wait.h"

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>
#include <ctime>

namespace dpcomm {

int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1'000'000'000ll + t.tv_nsec;
}

namespace {

constexpr timespec kNap{0, 100'000'000};  // a missed wake-up, a hang-up or a deadline is seen after this at the latest

bool reached_now(const Flag* flag, uint32_t value) {
  return int32_t(__atomic_load_n(&flag->value, __ATOMIC_SEQ_CST) - value) >= 0;
}

// Nobody sleeps through a wake-up. Reader: announces itself (R1), then looks again (R2), then sleeps. Writer: stores
// the value (W1), then reads the announcement (W2). R1 and W1 are read-modify-writes, so both are full barriers: if R2
// missed W1 then W2 sees R1. FUTEX_WAIT itself compares once more with the value that R2 saw. tests/model_wait.py
// checks every interleaving of this, store buffers included; it fails without W1's barrier, and without R1's unless
// FUTEX_WAIT is one itself.
void nap(Flag* flag, uint32_t value) {
  const uint32_t seen = __atomic_load_n(&flag->value, __ATOMIC_RELAXED);
  __atomic_exchange_n(&flag->sleeping, 1u, __ATOMIC_SEQ_CST);              // R1
  const uint32_t again = __atomic_load_n(&flag->value, __ATOMIC_SEQ_CST);  // R2
  // Not FUTEX_PRIVATE: the ranks are processes.
  if (int32_t(again - value) < 0 && again == seen)
    syscall(SYS_futex, &flag->value, FUTEX_WAIT, seen, &kNap, nullptr, 0);
  __atomic_store_n(&flag->sleeping, 0u, __ATOMIC_RELAXED);  // only the reader writes it; a late wake-up is harmless
}

}  // namespace

bool wait_long(Flag* flag, uint32_t value, int peer, const Waiting& how) {
  const int64_t deadline = now_ns() + how.timeout_ns;
  for (int tries = 0; !reached_now(flag, value); ++tries) {
    if (tries < how.yields) {
      if (tries % 16 == 15 && load_acquire(how.failure) != 0) return false;  // on busy processors a yield may take long
      sched_yield();
      continue;
    }
    if (load_acquire(how.failure) != 0 || how.patience->give_up(peer))
      return reached_now(flag, value) && load_acquire(how.failure) == 0;
    if (now_ns() > deadline && how.patience->timed_out(flag, value, peer)) return false;
    nap(flag, value);
  }
  return true;
}

void post_and_wake(Flag* flag, uint32_t value) {
  __atomic_exchange_n(&flag->value, value, __ATOMIC_SEQ_CST);   // W1: releases everything written before
  if (__atomic_load_n(&flag->sleeping, __ATOMIC_SEQ_CST) != 0)  // W2
    syscall(SYS_futex, &flag->value, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

}  // namespace dpcomm
