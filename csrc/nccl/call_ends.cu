// The kernels at both ends of a call.
#include "step_kernel.h"
#include "step_kernels.h"

namespace dpcomm {

namespace {

struct EndLanes {
  __device__ int index() const { return int(threadIdx.x); }
  __device__ int count() const { return int(blockDim.x); }
  __device__ bool sync(bool ok) const { return __syncthreads_and(ok); }
  __device__ void yield() const { __nanosleep(200); }
};

__global__ void __launch_bounds__(kCtaThreads, 1) begin(const __grid_constant__ BeginLaunch launch) {
  if (threadIdx.x == 0) begin_call(launch);
}

__global__ void __launch_bounds__(kCtaThreads, 1) end(const __grid_constant__ EndLaunch launch) {
  end_call(EndLanes{}, launch);
}

}  // namespace

const void* begin_kernel() { return reinterpret_cast<const void*>(&begin); }
const void* end_kernel() { return reinterpret_cast<const void*>(&end); }

}  // namespace dpcomm
