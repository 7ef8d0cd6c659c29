// What an all-reduce must answer, in one thread and without the core: half precision is the compiler's own _Float16,
// scales come from frexp, NaNs from the standard library.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "core/types.h"

namespace expected {

using dpcomm::Op;

template <class To, class From>
To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// A NaN as dpcomm writes it: positive, quiet, without a payload.
template <class Real>
Real canonical(Real x) {
  return std::isnan(x) ? std::numeric_limits<Real>::quiet_NaN() : x;
}

struct Bfloat16 {
  uint16_t code;
  explicit operator float() const { return bits_of<float>(uint32_t{code} << 16); }
  static Bfloat16 nearest(float x) {
    if (std::isnan(x)) return {0x7fc0};
    const uint32_t b = bits_of<uint32_t>(x), kept = b >> 16, lost = b & 0xffff;
    return {uint16_t(kept + (lost > 0x8000 || (lost == 0x8000 && kept % 2 == 1)))};
  }
};

// How each element type is summed: Acc, and the way there and back.
template <class Stored>
struct Arithmetic {
  using Acc = Stored;
  static Acc widen(Stored x) { return x; }
  static Stored narrow(Acc x) { return canonical(x); }
};
template <>
struct Arithmetic<Bfloat16> {
  using Acc = float;
  static Acc widen(Bfloat16 x) { return float(x); }
  static Bfloat16 narrow(Acc x) { return Bfloat16::nearest(x); }
};
template <>
struct Arithmetic<int64_t> {
  using Acc = uint64_t;  // wraps; min and max look at it signed
  static Acc widen(int64_t x) { return uint64_t(x); }
  static int64_t narrow(Acc x) { return int64_t(x); }
};

template <class Acc>
Acc lesser(Acc a, Acc b, bool greater_instead) {
  if constexpr (std::is_integral_v<Acc>) return (int64_t(a) < int64_t(b)) != greater_instead ? a : b;
  if (std::isnan(a) || std::isnan(b)) return std::numeric_limits<Acc>::quiet_NaN();
  if (a == b) return std::signbit(a) != greater_instead ? a : b;  // -0 < +0
  return (a < b) != greater_instead ? a : b;
}

template <class Acc>
Acc combined(Op op, Acc a, Acc b) {
  if (op == Op::min || op == Op::max) return lesser(a, b, op == Op::max);
  return a + b;
}

// One group to the wire and back: fp16 times a power of two that puts the largest finite magnitude into [2^14, 2^15).
inline void through_fp16(float* v, int64_t n) {
  float top = 0;
  for (int64_t i = 0; i < n; ++i)
    if (std::isfinite(v[i])) top = std::max(top, std::fabs(v[i]));
  int exponent = 0;
  std::frexp(top, &exponent);  // top = f * 2^exponent, f in [0.5, 1)
  const int k = top == 0 ? 0 : std::min(15 - exponent, 126);
  for (int64_t i = 0; i < n; ++i) v[i] = canonical(std::ldexp(float(_Float16(std::ldexp(v[i], k))), -k));
}

// in[r]: one segment as rank r has it.
template <class Stored>
std::vector<Stored> reduced(const std::vector<const Stored*>& in, int64_t n, Op op) {
  using A = Arithmetic<Stored>;
  std::vector<Stored> out;
  for (int64_t i = 0; i < n; ++i) {
    auto total = A::widen(in[0][i]);
    for (size_t r = 1; r < in.size(); ++r) total = combined(op, total, A::widen(in[r][i]));
    if constexpr (!std::is_integral_v<Stored>)
      if (op == Op::mean) total /= static_cast<typename A::Acc>(in.size());
    out.push_back(A::narrow(total));
  }
  return out;
}

inline std::vector<float> reduced_fp16(const std::vector<const float*>& in, int64_t n, Op op) {
  std::vector<float> out;
  for (int64_t at = 0; at < n; at += dpcomm::kGroup) {
    const int64_t length = std::min<int64_t>(n - at, dpcomm::kGroup);
    std::vector<float> total;
    for (const float* x : in) {
      std::vector<float> v(x + at, x + at + length);
      through_fp16(v.data(), length);
      if (total.empty()) {
        total = v;
        continue;
      }
      for (int64_t i = 0; i < length; ++i) total[size_t(i)] += v[size_t(i)];
    }
    if (op == Op::mean)
      for (float& t : total) t /= float(in.size());
    through_fp16(total.data(), length);
    out.insert(out.end(), total.begin(), total.end());
  }
  return out;
}

}  // namespace expected
