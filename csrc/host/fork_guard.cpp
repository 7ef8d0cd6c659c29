#include "fork_guard.h"

#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <vector>

#include "../error.h"

namespace dpcomm {
namespace {

struct Registry {
  std::mutex mutex;
  std::vector<int> fds;
  std::atomic<uint64_t> generation{1};
};

Registry* the_registry = nullptr;  // for the handlers: they must not meet the guard of a function's static

void before_fork() { the_registry->mutex.lock(); }

void after_fork_in_parent() { the_registry->mutex.unlock(); }

// Other threads do not exist here and may have held malloc's lock: only close(2), and no allocation. clear() keeps the
// vector's memory.
void after_fork_in_child() {
  for (const int fd : the_registry->fds) ::close(fd);
  the_registry->fds.clear();
  the_registry->generation.fetch_add(1, std::memory_order_relaxed);
  the_registry->mutex.unlock();
}

// Never destroyed: objects with static storage may still close descriptors while the process exits.
Registry& registry() {
  static Registry& made = []() -> Registry& {
    the_registry = new Registry;
    const int failed = pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
    if (failed != 0) throw resource_error("pthread_atfork", failed);
    return *the_registry;
  }();
  return made;
}

}  // namespace

uint64_t fork_generation() { return registry().generation.load(std::memory_order_relaxed); }

ForkHold::ForkHold() { registry().mutex.lock(); }

ForkHold::~ForkHold() { registry().mutex.unlock(); }

void ForkHold::track(int fd) {
  try {
    registry().fds.push_back(fd);
  } catch (...) {
    ::close(fd);
    throw;
  }
}

void ForkHold::untrack(int fd) noexcept {
  auto& fds = registry().fds;
  const auto at = std::find(fds.begin(), fds.end(), fd);
  if (at == fds.end()) return;
  *at = fds.back();
  fds.pop_back();
}

}  // namespace dpcomm
