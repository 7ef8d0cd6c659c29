#include "cta_lease.h"

#include <algorithm>
#include <cerrno>
#include <climits>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "../gpu/cuda_check.h"
#include "../gpu/device.h"
#include "p2p_call.h"
#include "p2p_kernels.h"

namespace dpcomm {

namespace {

// CTAs of any of our kernels that run at once on the device.
int capacity(int device) {
  const CurrentDevice current(device);
  if (!attribute(cudaDevAttrCooperativeLaunch, device))
    throw Error(Code::unsupported, "GPU " + std::to_string(device) + " has no cooperative launch.");
  int least = INT32_MAX;
  for (const void* kernel : kernels_of(p2p_kernel)) {
    const int threads = threads_of(kernel, device);
    int per_sm = 0;
    check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, kernel, threads, 0),
               "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
    least = std::min(least, per_sm);
  }
  return least * attribute(cudaDevAttrMultiProcessorCount, device);
}

// Of this process: another process has the device in turns with it.
struct Budget {
  std::mutex mutex;
  std::map<int, int> capacity, leased;  // by device

  static Budget& all() {
    static Budget* const budget = new Budget;  // leases may end while the process does
    return *budget;
  }
  int left(int device) {  // under the mutex
    if (!capacity.contains(device)) capacity[device] = dpcomm::capacity(device);
    return capacity[device] - leased[device];
  }
};

}  // namespace

CtaLease::CtaLease(int device, int ctas) {
  Budget& budget = Budget::all();
  const std::lock_guard lock(budget.mutex);
  const int left = budget.left(device);
  if (ctas > left)
    throw resource_error("GPU " + std::to_string(device) + " runs " + std::to_string(budget.capacity[device]) +
                             " CTAs at once, of which live communicators of this process have leased " +
                             std::to_string(budget.leased[device]) + ", and " + std::to_string(ctas) +
                             " more would wait for ever: close communicators, or give them fewer with max_ctas=",
                         EBUSY);
  budget.leased[device] += ctas;
  device_ = device, ctas_ = ctas;
}

CtaLease::CtaLease(CtaLease&& other) noexcept
    : device_(std::exchange(other.device_, -1)), ctas_(std::exchange(other.ctas_, 0)) {}

CtaLease& CtaLease::operator=(CtaLease&& other) noexcept {
  std::swap(device_, other.device_);
  std::swap(ctas_, other.ctas_);
  return *this;
}

CtaLease::~CtaLease() {
  if (ctas_ == 0) return;
  Budget& budget = Budget::all();
  const std::lock_guard lock(budget.mutex);
  budget.leased[device_] -= ctas_;
}

int CtaLease::left(int device) {
  Budget& budget = Budget::all();
  const std::lock_guard lock(budget.mutex);
  return budget.left(device);
}

}  // namespace dpcomm
