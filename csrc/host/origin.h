// The process that an engine was made in. A forked child has a copy of the engine, but not its threads, its descriptors
// or the memory behind it.
#pragma once
#include <cstdint>

#include "fork_guard.h"

namespace dpcomm {

class Origin {
 public:
  Origin();

  int pid() const { return pid_; }
  bool in_forked_child() const { return fork_generation() != generation_; }
  // Throws Error(fork) in a forked child; `advice` ends its text.
  void refuse_fork(const char* advice = "Create it after the fork, or use the spawn start method.") const;

 private:
  const uint64_t generation_;
  const int pid_;
};

}  // namespace dpcomm
