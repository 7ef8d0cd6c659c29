// How many CTAs a GPU may keep waiting.
#pragma once

namespace dpcomm {

// CTAs of our kernels that wait for peers hold their place on the device until those have come. So all that can wait at
// once, of all communicators of this process, must fit on the device, or some would wait for others that never start.
class CtaLease {
 public:
  CtaLease() = default;
  CtaLease(int device, int ctas);  // Error(resource) where so many are not left
  CtaLease(CtaLease&& other) noexcept;
  CtaLease& operator=(CtaLease&& other) noexcept;
  ~CtaLease();

  static int left(int device);  // that nobody has leased. Loads all kernels: nothing is loaded while one waits.

 private:
  int device_ = -1, ctas_ = 0;
};

}  // namespace dpcomm
