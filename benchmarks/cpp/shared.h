// Memory and a barrier for the yardsticks, whose ranks share memory without any of dpcomm's code. A wait in here ends
// when the coordinator kills the rank: it is the one with the deadline.
#pragma once
#include <fcntl.h>
#include <sys/mman.h>

#include <atomic>
#include <new>

#include "pipes.h"

namespace turns {

struct alignas(64) Flag {
  std::atomic<uint64_t> v{0};
};

inline void wait_for(const Flag& flag, uint64_t value, bool crowded) {
  for (int spins = 0; flag.v.load(std::memory_order_acquire) < value; ++spins)
    if (crowded || spins > 2000)
      sched_yield();
    else
      __builtin_ia32_pause();
}

// `bytes` of zeros that all ranks map; they meet in here. Rank 0 makes it, and the others open it by way of /proc.
inline char* share(Pipes& pipes, int rank, size_t bytes) {
  int fd = rank == 0 ? ::memfd_create("rivals", 0) : -1;
  // Allocated for real: touching memory that is not there would be a bus error.
  if (rank == 0 && (fd < 0 || ::posix_fallocate(fd, 0, off_t(bytes)) != 0))
    throw std::runtime_error("no shared memory of " + std::to_string(bytes) + " bytes");
  const std::string path = "/proc/" + std::to_string(getpid()) + "/fd/" + std::to_string(fd);
  const std::string path_of_0 = pipes.exchange(path)[0];
  if (rank != 0) fd = ::open(path_of_0.c_str(), O_RDWR);
  void* memory = fd < 0 ? MAP_FAILED : ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (memory == MAP_FAILED) throw std::runtime_error("cannot map the shared memory of rank 0");
  pipes.exchange("mapped");
  ::close(fd);
  return static_cast<char*>(memory);
}

class Barrier {
 public:
  Barrier(Flag* flags, int rank, int nranks, bool crowded)  // a flag for each rank
      : flags_(flags), rank_(rank), nranks_(nranks), crowded_(crowded) {}
  void meet() {
    flags_[rank_].v.store(++epoch_, std::memory_order_release);
    for (int r = 0; r < nranks_; ++r) wait_for(flags_[r], epoch_, crowded_);
  }

 private:
  Flag* flags_;
  const int rank_, nranks_;
  const bool crowded_;
  uint64_t epoch_ = 0;
};

inline bool crowded(int nranks) { return nranks > ::sysconf(_SC_NPROCESSORS_ONLN); }

}  // namespace turns
