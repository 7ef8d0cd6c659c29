// Codec fp16: half precision times a power of two per group, so that 1e-30 and 1e30 both survive.
//
// The group's exponent k puts its largest finite magnitude times 2^k into [2^14, 2^15): nothing overflows. Multiplying
// by a power of two is exact. Elements below 2^-29 of the maximum lose bits (half denormals), below about 2^-39 they
// vanish. NaN and Inf have codes of their own and travel alone: their neighbours keep their values.
#pragma once
#include "element.h"

namespace dpcomm {
inline namespace DPCOMM_ISA {

struct Fp16 {
  using Element = Float32;
  using Code = uint16_t;
  using Acc = float;
  static constexpr bool scaled = true;
  struct Scale {
    int32_t k;
  };

  // `values(i)` is vector i of this lane's share of the group.
  template <class Lanes, class Values>
  DPCOMM_HD static Scale scale(Lanes& lanes, const Values& values) {
    int32_t top = lanes.group_max(largest<Lanes>(values, [](auto m) { return m; }));
    if (top >= kInfinity) {  // rare: leave the non-finite ones out of the maximum
      lanes.nonfinite_group();
      top = lanes.group_max(largest<Lanes>(values, [](auto m) { return m >= kInfinity ? decltype(m){} : m; }));
    }
    if (top == 0) return {0};
    const int32_t k = 127 + 14 - (top >> 23);  // 14 - floor(log2(maximum)); denormals count as exponent -127 ...
    return {k < kMost ? k : kMost};            // ... and are clamped like all below 2^-112
  }
  DPCOMM_HD static Vec<Code> encode(Scale s, const Vec<float>& v) {
    const float up = power_of_two(s.k);
    return to_half(map([up](auto x) { return x * up; }, v));
  }
  DPCOMM_HD static Vec<float> decode(Scale s, const Vec<Code>& c) {
    const float down = power_of_two(-s.k);
    const Vec<float> v = map([down](auto x) { return x * down; }, from_half(c));
#if defined(__CUDACC__)
    return Element::canonical(v);
#else
    return v;
#endif
  }
  DPCOMM_HD static int8_t to_wire(Scale s) { return static_cast<int8_t>(s.k); }
  DPCOMM_HD static Scale from_wire(int8_t k) { return {k}; }

 private:
  static constexpr int32_t kInfinity = 0x7f800000;
  static constexpr int32_t kMost = 126;  // 2^126 and 2^-126 are both normal

  DPCOMM_HD static float power_of_two(int32_t k) { return bit_cast<float>((127 + k) << 23); }

  // Magnitudes compare as integers: exact in any order, on any hardware.
  template <class Lanes, class Values, class Keep>
  DPCOMM_HD static int32_t largest(const Values& values, Keep keep) {
    Vec<int32_t> top = splat<int32_t>(0);
    DPCOMM_UNROLL
    for (int i = 0; i < Lanes::template vectors<Fp16>; ++i)
      top = map(
          [keep](auto t, auto x) {
            const auto m = keep(bits(x) & 0x7fffffff);
            return m > t ? m : t;
          },
          top, values(i));
    return max_element(top);
  }
};

}  // namespace DPCOMM_ISA
}  // namespace dpcomm
