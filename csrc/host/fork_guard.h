// What a forked child must not keep: our descriptors. A child that held a rank's sockets open (a DataLoader worker)
// would make a dead rank look alive to its peers. Knows nothing of what the descriptors are for.
#pragma once
#include <cstdint>

namespace dpcomm {

// Differs in a forked child from what it was in the parent: whatever was made in another generation is unusable here.
uint64_t fork_generation();

// While one exists no thread of this process can fork. Whoever makes or closes a descriptor holds one around the system
// call and the note of it, or a fork in between would leave the child a descriptor nobody knows of (or close a foreign
// one). Held for moments only, never around anything that blocks, and not twice by one thread.
class ForkHold {
 public:
  ForkHold();
  ~ForkHold();
  ForkHold(const ForkHold&) = delete;
  ForkHold& operator=(const ForkHold&) = delete;

  void track(int fd);  // a forked child closes fd; if it cannot be noted (bad_alloc) fd is closed here
  void untrack(int fd) noexcept;
};

}  // namespace dpcomm
