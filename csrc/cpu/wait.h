// Waiting for a flag and waking who waits: spin, yield, then sleep in the kernel. Compiled once, used by every
// instruction set: nothing inline in here.
#pragma once
#include <cstdint>

#include "../core/mailbox.h"

namespace dpcomm {

int64_t now_ns();  // monotonic

// What else can end a wait. Asked every few yields and after every nap, so never more than 100 ms apart.
class Patience {
 public:
  virtual bool give_up(int peer) = 0;  // true: it has recorded the cause
  // Records the cause. False: nobody is late any more.
  virtual bool timed_out(const Flag* flag, uint32_t value, int peer) = 0;

 protected:
  ~Patience() = default;
};

// Polls with a pause between before the first yield; `crowded`: where ranks share processors. Then about 150 us of
// yields before the first nap: two ranks that the scheduler has put on one processor give it to each other that way and
// stay runnable, so that it moves one of them; napping, they looked like one task and stayed (docs/performance.md).
constexpr int kSpins = 200, kSpinsCrowded = 2, kYields = 500;

struct Waiting {
  // Polls with a pause between, then polls with sched_yield between, then naps. Spinning pays while the peer runs on
  // another processor; put on the same one by the scheduler, a spinning rank keeps its peer from running. So the number
  // halves when spinning was in vain and doubles when it was not; it outlives the call.
  int* spins;
  int most_spins;
  int yields;
  int64_t timeout_ns;  // of one wait: a peer that makes progress is alive
  const uint64_t* failure;
  Patience* patience;
};

// After the spins. True once the flag has reached the value; false when it never will: the failure word is set then.
bool wait_long(Flag* flag, uint32_t value, int peer, const Waiting& how);

// Publishes the value and wakes the reader if it sleeps.
void post_and_wake(Flag* flag, uint32_t value);

}  // namespace dpcomm
