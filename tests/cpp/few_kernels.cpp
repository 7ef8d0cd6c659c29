// Stands in for csrc/cpu/kernels.cpp where the engine is tested: two element types, plain stores, one instruction set.
// All kernels take minutes to compile with each sanitizer; tests of the extension run them.
#include <cstdlib>

#include "core/codec_fp16.h"
#include "core/codec_none.h"
#include "cpu/lanes.h"

namespace dpcomm {

namespace {

template <class Codec>
bool play(const KernelCall& call) {
  HostLanes lanes{call};
  return all_reduce<Codec>(lanes, call.team, call.bucket, call.header);
}

}  // namespace

namespace portable {
bool run(const KernelCall& call) {
  if (CodecKind(call.header.codec) == CodecKind::fp16) return play<Fp16<Float32>>(call);
  if (Dtype(call.header.dtype) == Dtype::float32) return play<None<Float32>>(call);
  if (Dtype(call.header.dtype) == Dtype::int32) return play<None<Int32>>(call);
  std::abort();  // a test asks for what is not here
}
}  // namespace portable
namespace avx2 {
bool run(const KernelCall&) { std::abort(); }
}  // namespace avx2
namespace avx512 {
bool run(const KernelCall&) { std::abort(); }
}  // namespace avx512

}  // namespace dpcomm
