// Signals belong to the program's own threads: a new thread inherits the mask of the one that starts it.
#pragma once
#include <pthread.h>
#include <signal.h>

namespace dpcomm {

struct SignalsBlocked {
  SignalsBlocked() {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
  }
  ~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &before, nullptr); }
  SignalsBlocked(const SignalsBlocked&) = delete;
  sigset_t before;
};

}  // namespace dpcomm
