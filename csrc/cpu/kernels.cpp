// The core, read once per instruction set (-DDPCOMM_ISA=name and that name's -m flags). No standard header with inline
// code may be included from here: the linker could keep the AVX-512 copy for everyone.
#include "../core/codec_fp16.h"
#include "../core/codec_none.h"
#include "lanes.h"

namespace dpcomm {
inline namespace DPCOMM_ISA {

// flatten: every lambda of the core must be inlined; called, it spills its captures for each group.
template <class Codec>
__attribute__((flatten)) static bool run_direct(const KernelCall& call) {
  HostLanes lanes{call};
  return direct<Codec>(lanes, call.team, call.bucket, call.header);
}
template <class Codec>
__attribute__((flatten)) static bool run_oneshot(const KernelCall& call) {
  HostLanes lanes{call};
  return oneshot<Codec>(lanes, call.team, call.bucket, call.header);
}
template <class Codec>
__attribute__((flatten)) static bool run_ring(const KernelCall& call) {
  HostLanes lanes{call};
  return ring<Codec>(lanes, call.team, call.bucket, call.header);
}
// core/all_reduce.h with a function for each algorithm: tests/test_kernels.py reads the loops of each by its name.
template <class Codec>
static bool run_codec(const KernelCall& call) {
  switch (Algorithm(call.header.algorithm)) {
    case Algorithm::direct:
      return run_direct<Codec>(call);
    case Algorithm::oneshot:
      return run_oneshot<Codec>(call);
    case Algorithm::ring:
      return run_ring<Codec>(call);
    case Algorithm::automatic:
    case Algorithm::carrier:
      break;  // the engine has chosen
  }
  return false;
}

static bool run_fp16(const KernelCall& call) {
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
  return false;
}

static bool run_none(const KernelCall& call) {
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

bool run(const KernelCall& call) {
  return CodecKind(call.header.codec) == CodecKind::fp16 ? run_fp16(call) : run_none(call);
}

}  // namespace DPCOMM_ISA
}  // namespace dpcomm
