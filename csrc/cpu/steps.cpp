// The steps of the core, read once per instruction set, as kernels.cpp is, and with the same rule: no standard header
// with inline code.
#include "../core/codec_fp16.h"
#include "../core/codec_none.h"
#include "lanes.h"

namespace dpcomm {
inline namespace DPCOMM_ISA {

// flatten: as in kernels.cpp.
template <class Codec, bool in_place>
__attribute__((flatten)) static void run_direct(const StepCall& call) {
  StepLanes<in_place> lanes{call.tally};
  direct_step<Codec>(lanes, call.team, call.bucket, call.header, call.step);
}
template <class Codec>
__attribute__((flatten)) static void run_oneshot(const StepCall& call) {
  StepLanes<false> lanes{call.tally};
  oneshot_step<Codec>(lanes, call.team, call.bucket, call.header, call.step);
}
template <class Codec>
__attribute__((flatten)) static void run_ring(const StepCall& call) {
  StepLanes<false> lanes{call.tally};
  ring_step<Codec>(lanes, call.team, call.bucket, call.header, call.step);
}

template <class Codec>
static void run_codec(const StepCall& call) {
  switch (Algorithm(call.header.algorithm)) {
    case Algorithm::direct:
      if constexpr (!Codec::scaled)
        if (call.in_place) return run_direct<Codec, true>(call);
      return run_direct<Codec, false>(call);
    case Algorithm::oneshot:
      return run_oneshot<Codec>(call);
    case Algorithm::ring:
      return run_ring<Codec>(call);
    case Algorithm::automatic:
    case Algorithm::carrier:
      break;  // the engine has chosen
  }
}

static void run_fp16(const StepCall& call) {
  switch (Dtype(call.header.dtype)) {
    case Dtype::float32:
      return run_codec<Fp16<Float32>>(call);
    case Dtype::float16:
      return run_codec<Fp16<Float16>>(call);
    case Dtype::bfloat16:
      return run_codec<Fp16<Bfloat16>>(call);
    case Dtype::float64:
    case Dtype::int32:
    case Dtype::int64:
      break;  // refused by the engine
  }
}

static void run_none(const StepCall& call) {
  switch (Dtype(call.header.dtype)) {
    case Dtype::float32:
      return run_codec<None<Float32>>(call);
    case Dtype::float64:
      return run_codec<None<Float64>>(call);
    case Dtype::float16:
      return run_codec<None<Float16>>(call);
    case Dtype::bfloat16:
      return run_codec<None<Bfloat16>>(call);
    case Dtype::int32:
      return run_codec<None<Int32>>(call);
    case Dtype::int64:
      return run_codec<None<Int64>>(call);
  }
}

void run_step(const StepCall& call) {
  CodecKind(call.header.codec) == CodecKind::fp16 ? run_fp16(call) : run_none(call);
}

}  // namespace DPCOMM_ISA
}  // namespace dpcomm
