// Stands in for csrc/cpu/kernels.cpp where the engine is tested: two element types, plain stores, one instruction set.
// All kernels take minutes to compile with each sanitizer; tests of the extension run them.
#include <cstdlib>

#include "core/codec_fp16.h"
#include "core/codec_none.h"
#include "cpu/lanes.h"
#include "cpu/local_rounds.h"

namespace dpcomm {

namespace {

template <class Codec>
bool play(const KernelCall& call) {
  HostLanes lanes{call};
  return all_reduce<Codec>(lanes, call.team, call.bucket, call.header);
}

template <class Codec, bool in_place>
void play_step(const StepCall& call) {
  StepLanes<in_place> lanes{call.tally};
  all_reduce_step<Codec>(lanes, call.team, call.bucket, call.header, call.step);
}

template <class Codec>
bool play_local(const LocalCall& call) {
  HostLanes lanes{call.call};
  return local_round<Codec>(lanes, call.call.team, call.call.bucket, Op(call.call.header.op), call.shards, call.turn,
                            call.slice, call.part);
}

template <class Codec>
void play_plain_step(const StepCall& call) {
  call.in_place ? play_step<Codec, true>(call) : play_step<Codec, false>(call);
}

}  // namespace

namespace portable {
bool run(const KernelCall& call) {
  if (CodecKind(call.header.codec) == CodecKind::fp16) return play<Fp16<Float32>>(call);
  if (Dtype(call.header.dtype) == Dtype::float32) return play<None<Float32>>(call);
  if (Dtype(call.header.dtype) == Dtype::int32) return play<None<Int32>>(call);
  std::abort();  // a test asks for what is not here
}
void run_step(const StepCall& call) {
  if (CodecKind(call.header.codec) == CodecKind::fp16) return play_step<Fp16<Float32>, false>(call);
  if (Dtype(call.header.dtype) == Dtype::float32) return play_plain_step<None<Float32>>(call);
  if (Dtype(call.header.dtype) == Dtype::int32) return play_plain_step<None<Int32>>(call);
  std::abort();
}
bool run_local(const LocalCall& call) {
  const Header& header = call.call.header;
  if (CodecKind(header.codec) == CodecKind::fp16) return play_local<Fp16<Float32>>(call);
  if (Dtype(header.dtype) == Dtype::float32) return play_local<None<Float32>>(call);
  if (Dtype(header.dtype) == Dtype::int32) return play_local<None<Int32>>(call);
  std::abort();
}
}  // namespace portable
namespace avx2 {
bool run(const KernelCall&) { std::abort(); }
void run_step(const StepCall&) { std::abort(); }
bool run_local(const LocalCall&) { std::abort(); }
}  // namespace avx2
namespace avx512 {
bool run(const KernelCall&) { std::abort(); }
void run_step(const StepCall&) { std::abort(); }
bool run_local(const LocalCall&) { std::abort(); }
}  // namespace avx512

}  // namespace dpcomm
