// The core, read once per instruction set (-DDPCOMM_ISA=name and that name's -m flags). No standard header with inline
// code may be included from here: the linker could keep the AVX-512 copy for everyone.
#include "../core/codec_fp16.h"
#include "../core/codec_none.h"
#include "lanes.h"

namespace dpcomm {
inline namespace DPCOMM_ISA {

// flatten: every lambda of the core must be inlined; called, it spills its captures for each group.
template <class Codec, Store how>
__attribute__((flatten)) static bool run_direct(const KernelCall& call) {
  HostLanes<how> lanes{call};
  return direct<Codec>(lanes, call.team, call.bucket, call.header);
}
template <class Codec, Store how>
__attribute__((flatten)) static bool run_oneshot(const KernelCall& call) {
  HostLanes<how> lanes{call};
  return oneshot<Codec>(lanes, call.team, call.bucket, call.header);
}
template <class Codec>
static bool run_codec(const KernelCall& call) {
  const bool streaming = call.store == Store::streaming;
  if (Algorithm(call.header.algorithm) == Algorithm::oneshot)
    return streaming ? run_oneshot<Codec, Store::streaming>(call) : run_oneshot<Codec, Store::plain>(call);
  return streaming ? run_direct<Codec, Store::streaming>(call) : run_direct<Codec, Store::plain>(call);
}

bool run(const KernelCall& call) {
  if (CodecKind(call.header.codec) == CodecKind::fp16) return run_codec<Fp16>(call);
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
  return false;
}

}  // namespace DPCOMM_ISA
}  // namespace dpcomm
