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

struct Float16 {
  uint16_t code;
  explicit operator float() const { return canonical(float(bits_of<_Float16>(code))); }
  static Float16 nearest(float x) { return {std::isnan(x) ? uint16_t{0x7e00} : bits_of<uint16_t>(_Float16(x))}; }
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
struct Arithmetic<Float16> {
  using Acc = float;
  static Acc widen(Float16 x) { return float(x); }
  static Float16 narrow(Acc x) { return Float16::nearest(x); }
};
// Whole numbers wrap; min and max look at them signed.
template <>
struct Arithmetic<int32_t> {
  using Acc = uint32_t;
  static Acc widen(int32_t x) { return uint32_t(x); }
  static int32_t narrow(Acc x) { return int32_t(x); }
};
template <>
struct Arithmetic<int64_t> {
  using Acc = uint64_t;
  static Acc widen(int64_t x) { return uint64_t(x); }
  static int64_t narrow(Acc x) { return int64_t(x); }
};

template <class Acc>
Acc lesser(Acc a, Acc b, bool greater_instead) {
  if constexpr (std::is_integral_v<Acc>) {
    using Signed = std::make_signed_t<Acc>;
    return (Signed(a) < Signed(b)) != greater_instead ? a : b;
  }
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

// One group of accumulators on its way over the wire: fp16, or the tensor's own type.
template <class Stored>
void travel(std::vector<typename Arithmetic<Stored>::Acc>& group, bool fp16) {
  using A = Arithmetic<Stored>;
  if constexpr (std::is_same_v<typename A::Acc, float>)
    if (fp16) return through_fp16(group.data(), int64_t(group.size()));
  for (auto& v : group) v = A::widen(A::narrow(v));
}

template <class Stored>
class Groups {
 public:
  using A = Arithmetic<Stored>;
  using Group = std::vector<typename A::Acc>;

  // in[r]: one group as rank r has it, of n elements. divisor: of a mean.
  Groups(std::vector<const Stored*> in, int64_t n, Op op, bool fp16, size_t divisor)
      : in_(std::move(in)), n_(n), op_(op), fp16_(fp16), divisor_(divisor) {}

  // Contributions travel through fp16, are added in rank order, divided, and the result travels.
  std::vector<Stored> rank_order() const {
    Group total = sum();
    finish(total);
    if (fp16_) travel<Stored>(total, true);
    return stored(total);
  }
  // What a host has before hosts exchange it.
  std::vector<Stored> of_host() const { return stored(sum()); }
  // The sum starts at rank `first` and travels from each rank to the next.
  std::vector<Stored> ring(size_t first) const {
    if (in_.size() == 1) return stored(widened(0));
    Group message = widened(first);
    travel<Stored>(message, fp16_);
    for (size_t hop = 1; hop < in_.size(); ++hop) {
      add(message, widened((first + hop) % in_.size()));
      if (hop + 1 == in_.size()) finish(message);
      travel<Stored>(message, fp16_);
    }
    return stored(message);
  }

 private:
  Group widened(size_t rank) const {
    Group v;
    for (int64_t i = 0; i < n_; ++i) v.push_back(A::widen(in_[rank][i]));
    return v;
  }
  Group sum() const {
    Group total = contribution(0);
    for (size_t r = 1; r < in_.size(); ++r) add(total, contribution(r));
    return total;
  }
  Group contribution(size_t rank) const {
    Group v = widened(rank);
    if (fp16_) travel<Stored>(v, true);
    return v;
  }
  void add(Group& total, const Group& more) const {
    for (size_t i = 0; i < total.size(); ++i) total[i] = combined(op_, total[i], more[i]);
  }
  void finish(Group& total) const {
    if constexpr (!std::is_integral_v<Stored>)
      if (op_ == Op::mean)
        for (auto& v : total) v /= static_cast<typename A::Acc>(divisor_);
  }
  static std::vector<Stored> stored(const Group& group) {
    std::vector<Stored> out;
    for (const auto v : group) out.push_back(A::narrow(v));
    return out;
  }

  const std::vector<const Stored*> in_;
  const int64_t n_;
  const Op op_;
  const bool fp16_;
  const size_t divisor_;
};

// Class two_level: the sum of each host, then rank order between hosts. `inside`: whether fp16 is what goes inside
// them.
template <class Stored>
std::vector<Stored> two_level(const std::vector<const Stored*>& in, const std::vector<std::vector<int>>& hosts,
                              int64_t n, Op op, bool fp16, bool inside) {
  std::vector<std::vector<Stored>> sums;
  std::vector<const Stored*> between;
  for (const std::vector<int>& ranks : hosts) {
    std::vector<const Stored*> of_host;
    for (const int r : ranks) of_host.push_back(in[size_t(r)]);
    sums.push_back(Groups<Stored>(of_host, n, op, inside, 1).of_host());
  }
  for (const auto& sum : sums) between.push_back(sum.data());
  const std::vector<Stored> y = Groups<Stored>(between, n, op, fp16, in.size()).rank_order();
  return inside ? Groups<Stored>({y.data()}, n, Op::sum, true, 1).of_host() : y;
}

}  // namespace expected
