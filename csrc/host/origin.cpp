#include "origin.h"

#include <unistd.h>

#include "../error.h"

namespace dpcomm {

Origin::Origin() : generation_(fork_generation()), pid_(getpid()) {}

void Origin::refuse_fork(const char* advice) const {
  if (!in_forked_child()) return;
  throw Error(Code::fork, "[dpcomm:FORK] communicator created in pid " + std::to_string(pid_) + ", used in pid " +
                              std::to_string(getpid()) + ". " + advice);
}

}  // namespace dpcomm
