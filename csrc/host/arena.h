// The memory ranks share: a sealed memfd, or anonymous memory where ranks are threads. Allocated for real before it is
// mapped, so that touching it never raises SIGBUS. Knows nothing of what lies in it.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

#include "unique_fd.h"

namespace dpcomm {

// Bytes, rounded up to whole pages.
constexpr int64_t whole_pages(int64_t bytes) { return (bytes + 4095) / 4096 * 4096; }

// How much memory this process may still take, and what says so. system_root stands before /proc and /sys in every path
// that is read: tests fake a machine with it.
struct MemoryRoom {
  uint64_t bytes;     // UINT64_MAX: no limit found
  std::string limit;  // a file, with the controller group it belongs to
};
MemoryRoom memory_room(const std::string& system_root = "");

// Failures: Error(resource) with errnum ENOSPC, EFBIG or ENOMEM, saying what was needed, what is free and what to set.
class Arena {
 public:
  Arena() = default;

  // Our own: allocated, zeroed, sealed (nobody can shrink or grow it), mapped.
  static Arena create(size_t bytes, const std::string& system_root = "");
  // A peer's: Error(internal) unless it is sealed and exactly that long.
  static Arena adopt(UniqueFd fd, size_t bytes);
  // For ranks that are threads of this process.
  static Arena anonymous(size_t bytes, const std::string& system_root = "");
  // For this rank alone: addresses of `bytes`, of which at most `used` are ever touched.
  static Arena sparse(size_t bytes, size_t used, const std::string& system_root = "");

  Arena(Arena&& other) noexcept;
  Arena& operator=(Arena&& other) noexcept;
  ~Arena();

  char* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  int fd() const { return fd_.get(); }  // -1 after forget_fd() and for anonymous memory
  void forget_fd() { fd_.reset(); }     // nobody else will map it; the mapping stays

 private:
  void map(int flags);

  UniqueFd fd_;
  char* data_ = nullptr;
  size_t bytes_ = 0;
  uint64_t generation_ = 0;  // of the process that has the mapping: a forked child does not (MADV_DONTFORK)
};

}  // namespace dpcomm
