// The kernels of engine nccl on a machine without a GPU: the same bodies (csrc/nccl/step_kernel.h), played by host
// lanes. Steps are those of the CPU's instruction sets (csrc/cpu/steps.cpp), which have the same core.
#include "nccl/step_kernels.h"

#include <sched.h>

#include "cpu/kernels.h"
#include "nccl/step_kernel.h"
#include "stand_in.h"

namespace dpcomm {

namespace {

// The whole launch is played by its first CTA.
void run_here(const StepLaunch& launch) {
  const Bucket bucket = bucket_of(launch.bucket);
  static const Isa& portable = isa("portable");  // tests have no other (few_kernels.cpp)
  Tally tally;
  each_step(launch, [&](const Step& step) {
    portable.run_step({launch.team, bucket, launch.header, step, launch.in_place, tally});
  });
  __atomic_fetch_add(launch.nonfinite_groups, uint64_t(tally.nonfinite_groups), __ATOMIC_RELAXED);
}

struct OneLane {
  int index() const { return 0; }
  int count() const { return 1; }
  bool sync(bool ok) const { return ok; }
  void yield() const { sched_yield(); }
};

template <class Launch, class Body>
const void* registered(const char* key, Body body) {
  stand_in::register_kernel(
      key,
      [body](void** parameters, unsigned cta, unsigned) {
        if (cta == 0) body(*static_cast<const Launch*>(parameters[0]));
      },
      kCtaThreads, sizeof(Launch));
  return key;
}

const void* step_key() {
  static const char key = 0;
  static const void* const known = registered<StepLaunch>(&key, run_here);
  return known;
}

}  // namespace

// Those of few_kernels.cpp.
const void* step_kernel_float(Dtype dtype, Algorithm) { return dtype == Dtype::float32 ? step_key() : nullptr; }
const void* step_kernel_half(Dtype, Algorithm) { return nullptr; }
const void* step_kernel_whole(Dtype dtype, Algorithm) { return dtype == Dtype::int32 ? step_key() : nullptr; }
const void* step_kernel_fp16(Dtype dtype, Algorithm) { return dtype == Dtype::float32 ? step_key() : nullptr; }

const void* begin_kernel() {
  static const char key = 0;
  static const void* const known = registered<BeginLaunch>(&key, begin_call);
  return known;
}

const void* end_kernel() {
  static const char key = 0;
  static const void* const known =
      registered<EndLaunch>(&key, [](const EndLaunch& launch) { end_call(OneLane{}, launch); });
  return known;
}

}  // namespace dpcomm
