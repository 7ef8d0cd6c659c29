// Owns a descriptor and closes it; in a forked child, where the fork guard has closed it already, it owns nothing.
#pragma once
#include <unistd.h>

#include <utility>

#include "fork_guard.h"

namespace dpcomm {

class UniqueFd {
 public:
  UniqueFd() = default;

  // Takes fd as it is; negative: none. A fork between fd's making and this line would leave it open in the child: where
  // other threads may fork, use one of the next two.
  explicit UniqueFd(int fd) {
    if (fd < 0) return;
    ForkHold hold;
    take(hold, fd);
  }

  // Under a hold that was taken before fd was made. (Do not close or replace another UniqueFd under it.)
  UniqueFd(ForkHold& hold, int fd) {
    if (fd >= 0) take(hold, fd);
  }

  // `auto s = UniqueFd::opened_by([] { return ::socket(...); });` errno is open's.
  template <class Open>
  static UniqueFd opened_by(Open open) {
    ForkHold hold;
    return UniqueFd(hold, open());
  }

  UniqueFd(UniqueFd&& other) noexcept : fd_(std::exchange(other.fd_, -1)), generation_(other.generation_) {}
  UniqueFd& operator=(UniqueFd&& other) noexcept {
    if (this == &other) return *this;
    reset();
    fd_ = std::exchange(other.fd_, -1);
    generation_ = other.generation_;
    return *this;
  }
  ~UniqueFd() { reset(); }

  // -1 in a forked child: the number may belong to somebody else there.
  int get() const { return fd_ >= 0 && generation_ == fork_generation() ? fd_ : -1; }
  explicit operator bool() const { return get() >= 0; }

  void reset() {
    const int fd = get();
    fd_ = -1;
    if (fd < 0) return;
    ForkHold hold;
    hold.untrack(fd);
    ::close(fd);
  }

  // The caller closes it from now on, and forked children keep it.
  int release() {
    const int fd = get();
    fd_ = -1;
    if (fd < 0) return fd;
    ForkHold hold;
    hold.untrack(fd);
    return fd;
  }

 private:
  void take(ForkHold& hold, int fd) {
    hold.track(fd);
    fd_ = fd;
    generation_ = fork_generation();
  }

  int fd_ = -1;
  uint64_t generation_ = 0;  // in which the descriptor exists
};

}  // namespace dpcomm
