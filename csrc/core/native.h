// Around an all-reduce that a library makes in 16 bits (Algorithm::native): values to plain codes, sums back to values.
//
// No exponents, so that codes can be added by whoever knows the format: what half precision cannot hold becomes
// infinite, and each addition rounds. A mean divides before it encodes, which keeps sums of N ranks in range. A message
// is the codes of the groups, one after the other; behind a segment's end they are zero.
#pragma once
#include "element.h"
#include "tile.h"

namespace dpcomm {
inline namespace DPCOMM_ISA {

// Element_: what the tensor holds. Wire_: Float16 or Bfloat16.
template <class Element_, class Wire_>
struct Native {
  using Element = Element_;
  using Wire = Wire_;
  using Acc = float;
  static constexpr bool scaled = false;
  static constexpr int32_t infinity = std::is_same_v<Wire, Float16> ? 0x7c00 : 0x7f80;  // the code
};

// play(codec) for the codec of these names; null where there is none.
template <class Play>
auto with_native_codec(Dtype dtype, CodecKind codec, const Play& play) -> decltype(play(Native<Float32, Float16>())) {
  if (codec == CodecKind::none) return nullptr;
  const bool half = codec == CodecKind::fp16;
  if (dtype == Dtype::float32) return half ? play(Native<Float32, Float16>()) : play(Native<Float32, Bfloat16>());
  if (dtype == Dtype::float16) return half ? play(Native<Float16, Float16>()) : play(Native<Float16, Bfloat16>());
  if (dtype == Dtype::bfloat16) return half ? play(Native<Bfloat16, Float16>()) : play(Native<Bfloat16, Bfloat16>());
  return nullptr;
}

// By lanes that hold a whole group together. nranks: of a mean; 1 for a sum.
template <class Codec, class Lanes>
DPCOMM_HD void cast(Lanes& lanes, const Bucket& bucket, Range range, int nranks, uint16_t* codes) {
  constexpr int vectors = Lanes::template vectors<Codec>;
  const auto divisor = Codec::Element::divisor(nranks);
  each_memory<Codec, false>(lanes, bucket, range, [&](const auto& memory, int64_t at) {
    Vec<int32_t> top{};
    DPCOMM_UNROLL
    for (int i = 0; i < vectors; ++i) {
      const Vec<uint16_t> code = Codec::Wire::narrow(Codec::Element::divided(memory(i), divisor));
      lanes.push(codes + at + i * kVec, code);
      top = map(
          [](auto t, auto c) {
            const auto magnitude = convert<int32_t>(c) & 0x7fff;
            return magnitude > t ? magnitude : t;
          },
          top, code);
    }
    if (first(lanes.group_max(max_element(top))) >= Codec::infinity) lanes.nonfinite_group();
  });
}

template <class Codec, class Lanes>
DPCOMM_HD void widen(Lanes& lanes, const Bucket& bucket, Range range, const uint16_t* codes) {
  each_memory<Codec, true>(lanes, bucket, range, [&](const auto& memory, int64_t at) {
    DPCOMM_UNROLL
    for (int i = 0; i < Lanes::template vectors<Codec>; ++i)
      memory.set(i, Codec::Element::canonical(Codec::Wire::widen(load(codes + at + i * kVec))));
  });
}

}  // namespace DPCOMM_ISA
}  // namespace dpcomm
