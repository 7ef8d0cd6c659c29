// How the elements of each dtype are widened, added, compared and rounded. Everything that an operation means is here.
#pragma once
#include "portable.h"
#include "types.h"

namespace dpcomm {
inline namespace DPCOMM_ISA {

// Real: Acc is float or double, Bits the integer of its size. Stored is what lies in memory and on the wire.
template <class Acc_, class Bits, int64_t kNan>
struct Real {
  using Acc = Acc_;
  static constexpr bool real = true;

  DPCOMM_HD static Vec<Acc> plus(const Vec<Acc>& a, const Vec<Acc>& b) {
    return map([](auto x, auto y) { return x + y; }, a, b);
  }
  // NaN wins, -0 < +0: bit patterns order like integers once those of negative values are mirrored.
  DPCOMM_HD static Vec<Acc> least(const Vec<Acc>& a, const Vec<Acc>& b) {
    return map([](auto x, auto y) { return x != x ? x : y != y ? y : order(x) < order(y) ? x : y; }, a, b);
  }
  DPCOMM_HD static Vec<Acc> most(const Vec<Acc>& a, const Vec<Acc>& b) {
    return map([](auto x, auto y) { return x != x ? x : y != y ? y : order(x) < order(y) ? y : x; }, a, b);
  }
  // One IEEE division. Dividing by a power of two and multiplying by its inverse are the same rounding of the same
  // number, and the latter is several times faster.
  struct Divisor {
    Acc by, inverse;
    bool exact;
  };
  DPCOMM_HD static Divisor divisor(int n) { return {static_cast<Acc>(n), 1 / static_cast<Acc>(n), (n & (n - 1)) == 0}; }
  DPCOMM_HD static Vec<Acc> divided(const Vec<Acc>& a, const Divisor& d) {
    const Acc by = d.by, inverse = d.inverse;
    if (d.exact) return map([inverse](auto x) { return x * inverse; }, a);
    return map([by](auto x) { return x / by; }, a);
  }
  DPCOMM_HD static Vec<Acc> not_a_number() { return splat(bit_cast<Acc>(static_cast<Bits>(kNan))); }
  // One NaN for all: which operand's payload survives an addition is the compiler's choice.
  DPCOMM_HD static Vec<Acc> canonical(const Vec<Acc>& a) {
    return map([](auto x) { return x != x ? alike(x, bit_cast<Acc>(static_cast<Bits>(kNan))) : x; }, a);
  }

 private:
  DPCOMM_HD static auto order(const auto& x) {
    const auto b = bits(x);
    constexpr int top = sizeof(Bits) * 8 - 1;
    return b ^ ((b >> top) & static_cast<Bits>(~(Bits{1} << top)));
  }
};
using Real32 = Real<float, int32_t, 0x7fc00000>;
using Real64 = Real<double, int64_t, 0x7ff8000000000000>;

// Whole numbers wrap: added as unsigned, where that is defined.
template <class Acc_>
struct Whole {
  using Acc = Acc_;
  using Stored = Acc_;
  static constexpr bool real = false;
  struct Divisor {};  // whole numbers have no mean
  DPCOMM_HD static Divisor divisor(int) { return {}; }

  DPCOMM_HD static Vec<Acc> plus(const Vec<Acc>& a, const Vec<Acc>& b) {
    return map([](auto x, auto y) { return same_bits<Acc>(uns(x) + uns(y)); }, a, b);
  }
  DPCOMM_HD static Vec<Acc> least(const Vec<Acc>& a, const Vec<Acc>& b) {
    return map([](auto x, auto y) { return x < y ? x : y; }, a, b);
  }
  DPCOMM_HD static Vec<Acc> most(const Vec<Acc>& a, const Vec<Acc>& b) {
    return map([](auto x, auto y) { return x < y ? y : x; }, a, b);
  }
  DPCOMM_HD static Vec<Acc> widen(const Vec<Stored>& v) { return v; }
  DPCOMM_HD static Vec<Stored> narrow(const Vec<Acc>& v) { return v; }
};

struct Float32 : Real32 {
  using Stored = float;
  DPCOMM_HD static Vec<float> widen(const Vec<float>& v) { return v; }
  DPCOMM_HD static Vec<float> narrow(const Vec<float>& v) { return v; }
};
struct Float64 : Real64 {
  using Stored = double;
  DPCOMM_HD static Vec<double> widen(const Vec<double>& v) { return v; }
  DPCOMM_HD static Vec<double> narrow(const Vec<double>& v) { return v; }
};
struct Float16 : Real32 {
  using Stored = uint16_t;
  DPCOMM_HD static Vec<float> widen(const Vec<uint16_t>& v) { return from_half(v); }
  DPCOMM_HD static Vec<uint16_t> narrow(const Vec<float>& v) { return to_half(v); }
};
struct Bfloat16 : Real32 {
  using Stored = uint16_t;
  DPCOMM_HD static Vec<float> widen(const Vec<uint16_t>& v) {
    return map([](auto x) { return same_bits<float>(convert<uint32_t>(x) << 16); }, v);
  }
  // Round to nearest even: add half of the last place that stays, less one if that place is even.
  DPCOMM_HD static Vec<uint16_t> narrow(const Vec<float>& v) {
    return map(
        [](auto x) {
          const auto b = uns(bits(x));
          const auto rounded = (b + 0x7fffu + (b >> 16 & 1u)) >> 16;
          return convert<uint16_t>(x != x ? decltype(b){} + 0x7fc0u : rounded);
        },
        v);
  }
};
using Int32 = Whole<int32_t>;
using Int64 = Whole<int64_t>;

}  // namespace DPCOMM_ISA
}  // namespace dpcomm
