// From what a header names to the template arguments that serve it. The list of all codecs is here.
#pragma once
#include "codec_fp16.h"
#include "codec_none.h"
#include "header.h"

namespace dpcomm {
inline namespace DPCOMM_ISA {

// The function of an algorithm; null where the engine has not chosen one of the core's.
template <class Function>
constexpr Function* of_algorithm(Algorithm algorithm, Function* direct, Function* oneshot, Function* ring) {
  switch (algorithm) {
    case Algorithm::direct:
      return direct;
    case Algorithm::oneshot:
      return oneshot;
    case Algorithm::ring:
      return ring;
    case Algorithm::automatic:
    case Algorithm::native:
    case Algorithm::two_level:
      break;
  }
  return nullptr;
}

// What play(codec) returns for the header's codec and dtype. Where the codec does not serve the dtype, which engines
// refuse, it is not called, and the result is false or nothing.
template <class Play>
auto with_codec(const Header& header, const Play& play) -> decltype(play(None<Float32>())) {
  if (CodecKind(header.codec) == CodecKind::bf16) return decltype(play(None<Float32>()))();
  const bool fp16 = CodecKind(header.codec) == CodecKind::fp16;
  switch (Dtype(header.dtype)) {
    case Dtype::float32:
      return fp16 ? play(Fp16<Float32>()) : play(None<Float32>());
    case Dtype::float16:
      return fp16 ? play(Fp16<Float16>()) : play(None<Float16>());
    case Dtype::bfloat16:
      return fp16 ? play(Fp16<Bfloat16>()) : play(None<Bfloat16>());
    case Dtype::float64:
      if (!fp16) return play(None<Float64>());
      break;
    case Dtype::int32:
      if (!fp16) return play(None<Int32>());
      break;
    case Dtype::int64:
      if (!fp16) return play(None<Int64>());
      break;
  }
  return decltype(play(None<Float32>()))();
}

}  // namespace DPCOMM_ISA
}  // namespace dpcomm
