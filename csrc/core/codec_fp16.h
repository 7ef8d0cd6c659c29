// Codec fp16: half precision times a power of two per group, so that 1e-30 and 1e30 both survive.
//
// The group's exponent k puts its largest finite magnitude times 2^k into [2^14, 2^15): nothing overflows. Multiplying
// by a power of two is exact. Elements below 2^-29 of the maximum lose bits (half denormals), below about 2^-39 they
// vanish. NaN and Inf have codes of their own and travel alone: their neighbours keep their values.
#pragma once
#include "element.h"

namespace dpcomm {
inline namespace DPCOMM_ISA {

// Element_: what the tensor holds. Values widen to float before they are encoded and are rounded to it after decoding.
template <class Element_ = Float32>
struct Fp16 {
  using Element = Element_;
  using Code = uint16_t;
  using Acc = float;
  static constexpr bool scaled = true;
  struct Scale {
    Uniform<int32_t> k;
    bool special;  // the group holds a NaN or an infinity: rare
  };

  // `values(i)` is vector i of this lane's share of the group.
  template <class Lanes, class Values>
  DPCOMM_HD static Scale scale(Lanes& lanes, const Values& values) {
    auto top = lanes.group_max(largest<Lanes>(values, [](auto m) { return m; }));
    const bool special = first(top) >= kInfinity;
    if (special) {  // leave the non-finite ones out of the maximum
      lanes.nonfinite_group();
      top = lanes.group_max(largest<Lanes>(values, [](auto m) { return m >= kInfinity ? decltype(m){} : m; }));
    }
    const auto k = 127 + 14 - (top >> 23);  // 14 - floor(log2(maximum)); denormals count as exponent -127 ...
    const auto clamped = k < kMost ? k : uniform(kMost);  // ... and are clamped like all below 2^-112
    return {top == 0 ? uniform(0) : clamped, special};
  }
  DPCOMM_HD static Vec<Code> encode(const Scale& s, const Vec<float>& v) {
    const auto up = power_of_two(s.k);
    const Vec<float> scaled_up = map([up](auto x) { return x * up; }, v);
    return s.special ? to_half(scaled_up) : to_half_finite(scaled_up);
  }
  DPCOMM_HD static Vec<float> decode(const Scale& s, const Vec<Code>& c) {
    const auto down = power_of_two(-s.k);
    const Vec<float> v = map([down](auto x) { return x * down; }, from_half(c));
    if constexpr (kNanSurvives) return v;
    return Element::canonical(v);
  }
  DPCOMM_HD static int8_t to_wire(const Scale& s) { return static_cast<int8_t>(first(s.k)); }
  DPCOMM_HD static Scale from_wire(int8_t k) { return {uniform<int32_t>(k), true}; }

 private:
  static constexpr int32_t kInfinity = 0x7f800000;
  static constexpr int32_t kMost = 126;  // 2^126 and 2^-126 are both normal

  DPCOMM_HD static Uniform<float> power_of_two(const Uniform<int32_t>& k) { return same_bits<float>((k + 127) << 23); }

  // Magnitudes compare as integers: exact in any order, on any hardware.
  template <class Lanes, class Values, class Keep>
  DPCOMM_HD static Uniform<int32_t> largest(const Values& values, Keep keep) {
    constexpr int vectors = Lanes::template vectors<Fp16>, chains = vectors > 1 ? 2 : 1;
    Vec<int32_t> top[chains] = {};
    DPCOMM_UNROLL
    for (int i = 0; i < vectors; ++i)
      top[i % chains] = map(
          [keep](auto t, auto x) {
            const auto m = keep(bits(x) & 0x7fffffff);
            return m > t ? m : t;
          },
          top[i % chains], values(i));
    return max_element(map([](auto a, auto b) { return a > b ? a : b; }, top[0], top[chains - 1]));
  }
};

}  // namespace DPCOMM_ISA
}  // namespace dpcomm
