// The kernels of two levels over NCCL on a machine without a GPU: the same body (csrc/nccl/step_kernel.h), played by a
// host lane, for the codings of few_kernels.cpp.
#include "core/codec_fp16.h"
#include "core/codec_none.h"
#include "cpu/lanes.h"
#include "nccl/step_kernel.h"
#include "nccl/step_kernels.h"
#include "stand_in.h"

namespace dpcomm {

namespace {

template <class Codec>
const void* key() {
  static const char only = 0;
  static const bool known = [] {
    const auto body = [](void** parameters, unsigned cta, unsigned) {
      if (cta != 0) return;
      const auto& launch = *static_cast<const InsideLaunch*>(parameters[0]);
      Tally tally;
      StepLanes<false> lanes{tally};
      run_inside<Codec>(lanes, launch);
      __atomic_fetch_add(launch.nonfinite_groups, uint64_t(tally.nonfinite_groups), __ATOMIC_RELAXED);
    };
    stand_in::register_kernel(&only, body, kCtaThreads, sizeof(InsideLaunch));
    return true;
  }();
  return known ? &only : nullptr;
}

}  // namespace

const void* inside_kernel(Dtype dtype, CodecKind codec) {
  if (dtype == Dtype::float32 && codec == CodecKind::fp16) return key<Fp16<Float32>>();
  if (codec != CodecKind::none) return nullptr;
  if (dtype == Dtype::float32) return key<None<Float32>>();
  return dtype == Dtype::int32 ? key<None<Int32>>() : nullptr;
}

}  // namespace dpcomm
