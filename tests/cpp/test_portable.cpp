// ./test_portable [stride]   The verbs of core/portable.h and core/element.h, compiled for one instruction set and
// compared with the compiler's own arithmetic. stride: of the floats that are tried, 1 for all 2^32 (default: all where
// the instruction set converts in hardware, every 61st elsewhere). Ends with 77 where this processor lacks the set.
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <random>
#include <thread>
#include <type_traits>
#include <vector>

#include "check.h"
#include "core/element.h"

using namespace dpcomm;

namespace {

#if defined(__F16C__) || defined(__AVX512F__)
constexpr bool kHardware = true;
#else
constexpr bool kHardware = false;
#endif

template <class To, class From>
To raw(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
uint16_t narrowest(float x) {  // the compiler's conversion, NaN as dpcomm wants it
  return std::isnan(x) ? uint16_t{0x7e00} : raw<uint16_t>(_Float16(x));
}

void test_every_half_comes_back() {
  for (uint32_t at = 0; at < 1u << 16; at += kVec) {
    Vec<uint16_t> codes;
    for (int k = 0; k < kVec; ++k) codes[k] = uint16_t(at + uint32_t(k));
    const Vec<float> values = from_half(codes);
    const Vec<uint16_t> back = to_half(values);
    for (int k = 0; k < kVec; ++k) {
      const uint16_t code = codes[k], magnitude = code & 0x7fff;
      const float want = float(raw<_Float16>(code)), value = values[k], plain = half_value(code);
      if (magnitude <= 0x7c00) {
        CHECK(raw<uint32_t>(value) == raw<uint32_t>(want));
        CHECK(raw<uint32_t>(plain) == raw<uint32_t>(want));
        CHECK(back[k] == code && half_bits(plain) == code);
      } else {
        CHECK(std::isnan(value) && raw<uint32_t>(plain) == 0x7fc00000);
        CHECK(back[k] == 0x7e00);
      }
    }
  }
  Vec<uint16_t> canonical = splat<uint16_t>(0x7e00);  // the only NaN that to_half writes
  CHECK(raw<uint32_t>(float(from_half(canonical)[0])) == 0x7fc00000);
}

// The bodies of to_half on each float, in blocks so that all loops are vectorised.
int64_t differences(uint64_t begin, uint64_t end, uint64_t stride) {
  constexpr int kBlock = 1024;
  float in[kBlock];
  uint16_t plain[kBlock], vectors[kBlock], finite[kBlock];
  int64_t wrong = 0;
  for (uint64_t at = begin; at < end; at += kBlock * stride) {
    for (int i = 0; i < kBlock; ++i) in[i] = raw<float>(uint32_t(at + uint64_t(i) * stride));
    for (int i = 0; i < kBlock; ++i) plain[i] = half_bits(in[i]);
    for (int i = 0; i < kBlock; i += kVec) store(vectors + i, to_half(load(in + i)));
    for (int i = 0; i < kBlock; i += kVec) store(finite + i, to_half_finite(load(in + i)));
    if (std::memcmp(plain, vectors, sizeof plain) == 0 && std::memcmp(plain, finite, sizeof plain) == 0) continue;
    for (int i = 0; i < kBlock; ++i) wrong += plain[i] != vectors[i] || (in[i] == in[i] && plain[i] != finite[i]);
  }
  return wrong;
}

void test_all_bodies_of_to_half_agree(uint64_t stride) {
  constexpr uint64_t kAll = uint64_t{1} << 32;
  const unsigned threads = std::max(1u, std::thread::hardware_concurrency());
  std::vector<int64_t> wrong(threads);
  std::vector<std::thread> pool;
  for (unsigned t = 0; t < threads; ++t)
    pool.emplace_back([&, t] { wrong[t] = differences(kAll / threads * t, kAll / threads * (t + 1), stride); });
  for (std::thread& thread : pool) thread.join();
  for (const int64_t w : wrong) CHECK(w == 0);
}

// 251 and 13 are odd: every exponent, and every place of the last bits that count, is met.
void test_half_rounds_as_the_compiler_does() {
  int64_t wrong = 0;
  for (uint64_t b = 0; b < uint64_t{1} << 32; b += 251) {
    const float x = raw<float>(uint32_t(b));
    wrong += half_bits(x) != narrowest(x);
  }
  for (uint32_t code = 0; code < 0x7c00; ++code) {  // the exact ties, and the floats beside them
    const float tie = (half_value(uint16_t(code)) + half_value(uint16_t(code + (code < 0x7bff)))) / 2;
    for (const float x : {tie, std::nextafter(tie, 0.0f), std::nextafter(tie, 1e9f)})
      wrong += half_bits(x) != narrowest(x) || half_bits(-x) != narrowest(-x);
  }
  CHECK(wrong == 0);
}

void test_bfloat16_rounds_to_nearest_even() {
  int64_t wrong = 0;
  for (uint64_t b = 0; b < (uint64_t{1} << 32) - 13 * kVec; b += 13 * kVec) {
    Vec<float> v;
    for (int k = 0; k < kVec; ++k) v[k] = raw<float>(uint32_t(b) + 13 * uint32_t(k));
    const Vec<uint16_t> codes = Bfloat16::narrow(v);
    for (int k = 0; k < kVec; ++k) {
      const uint32_t bits = raw<uint32_t>(float(v[k])), kept = bits >> 16, lost = bits & 0xffff;
      const bool up = lost > 0x8000 || (lost == 0x8000 && kept % 2 == 1);
      const uint32_t want = (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : kept + up;
      wrong += codes[k] != want;
    }
  }
  CHECK(wrong == 0);
  for (uint32_t code = 0; code < 1u << 16; ++code) {
    const float value = Bfloat16::widen(splat<uint16_t>(uint16_t(code)))[0];
    CHECK(raw<uint32_t>(value) == code << 16);
  }
}

template <class Element>
void check_order() {
  using T = typename Element::Acc;
  const T inf = std::numeric_limits<T>::infinity(), nan = std::numeric_limits<T>::quiet_NaN();
  const T smallest = std::numeric_limits<T>::denorm_min();
  const T values[] = {-inf, T(-2), T(-1), -smallest, T(-0.0), T(0), smallest, T(1), T(2), inf};
  for (size_t i = 0; i < std::size(values); ++i)
    for (size_t j = 0; j < std::size(values); ++j) {
      const Vec<T> a = splat<T>(0) + values[i], b = splat<T>(0) + values[j];
      Vec<T> x = a, y = b;
      for (int k = 0; k < kVec; ++k) x[k] = values[i], y[k] = values[j];  // 0 + -0 is no -0
      using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
      CHECK(raw<Bits>(T(Element::least(x, y)[0])) == raw<Bits>(values[std::min(i, j)]));
      CHECK(raw<Bits>(T(Element::most(x, y)[kVec - 1])) == raw<Bits>(values[std::max(i, j)]));
    }
  for (const T v : values)
    for (const auto& [a, b] : {std::pair{nan, v}, std::pair{v, nan}, std::pair{-nan, nan}}) {
      CHECK(std::isnan(T(Element::least(splat<T>(a), splat<T>(b))[0])));
      CHECK(std::isnan(T(Element::most(splat<T>(a), splat<T>(b))[0])));
    }
}

void test_integers_wrap_and_compare_with_their_signs() {
  const auto four = [](int32_t x) { return splat<int32_t>(x); };
  CHECK(Int32::plus(four(INT32_MAX), four(1))[0] == INT32_MIN);
  CHECK(Int32::least(four(-1), four(1))[0] == -1 && Int32::most(four(-1), four(1))[0] == 1);
  CHECK(Int64::plus(splat<int64_t>(INT64_MIN), splat<int64_t>(-1))[kVec - 1] == INT64_MAX);
  CHECK(Int64::least(splat<int64_t>(INT64_MIN), splat<int64_t>(0))[0] == INT64_MIN);
}

// The short cut for powers of two must be the same rounding, down to denormals.
template <class Element, class Bits>
void check_division() {
  using T = typename Element::Acc;
  std::mt19937_64 random(1);
  int64_t wrong = 0;
  for (int n = 1; n <= 64; ++n)
    for (int i = 0; i < 20000 / kVec; ++i) {
      Vec<T> v;
      for (int k = 0; k < kVec; ++k)
        v[k] = raw<T>(Bits(random() >> (i % 4 == 0 ? 11 : 0)));  // a quarter: denormal doubles
      const Vec<T> got = Element::divided(v, Element::divisor(n));
      for (int k = 0; k < kVec; ++k) {
        const volatile T by = T(n);
        const T want = T(v[k]) / by, have = got[k];
        wrong += std::isnan(want) ? !std::isnan(have) : raw<Bits>(want) != raw<Bits>(have);
      }
    }
  CHECK(wrong == 0);
}

void test_any_nan_becomes_the_one() {
  for (const uint32_t b : {0x7f800001u, 0x7fc00000u, 0xffc00000u, 0xff800001u, 0x7fffffffu, 0xffffffffu})
    CHECK(raw<uint32_t>(float(Float32::canonical(splat<float>(raw<float>(b)))[0])) == 0x7fc00000);
  for (const uint64_t b : {0x7ff0000000000001u, 0xfff8000000000000u, 0xffffffffffffffffu})
    CHECK(raw<uint64_t>(double(Float64::canonical(splat<double>(raw<double>(b)))[0])) == 0x7ff8000000000000);
  Vec<float> v;
  for (int k = 0; k < kVec; ++k) v[k] = k % 2 ? -0.0f : -INFINITY;
  v = Float32::canonical(v);
  CHECK(raw<uint32_t>(float(v[1])) == 0x80000000 && raw<uint32_t>(float(v[0])) == 0xff800000);
}

void test_max_element_finds_it_anywhere() {
  for (int place = 0; place < kVec; ++place) {
    Vec<int32_t> v;
    for (int k = 0; k < kVec; ++k) v[k] = k == place ? 7 : k - kVec;
    CHECK(first(max_element(v)) == 7 && max_element(v)[kVec - 1] == 7);  // in every element
    v[place] = 0x7fffffff;
    CHECK(first(max_element(v)) == 0x7fffffff);
    for (int k = 0; k < kVec; ++k) v[k] = k == place ? -5 : -6 - k;
    CHECK(first(max_element(v)) == -5);
  }
}

template <class T>
void check_partial_access() {
  for (int n = -3; n <= kVec + 3; ++n) {
    const int in = std::clamp(n, 0, kVec);
    std::vector<T> from(size_t(in), T{});  // exactly as long: AddressSanitizer sees one element more
    for (int k = 0; k < in; ++k) from[size_t(k)] = T(k + 1);
    const Vec<T> v = load_some(from.data(), n);
    for (int k = 0; k < kVec; ++k) CHECK(v[k] == (k < in ? T(k + 1) : T{}));
    std::vector<T> to(size_t(in), T(99));
    store_some(to.data(), splat<T>(T(5)), n);
    for (const T x : to) CHECK(x == T(5));
  }
  std::vector<T> bytes(kVec + 1);
  for (int k = 0; k <= kVec; ++k) bytes[size_t(k)] = T(k);
  const Vec<T> shifted = load(bytes.data() + 1);  // any alignment
  for (int k = 0; k < kVec; ++k) CHECK(shifted[k] == T(k + 1));
  store(bytes.data() + 1, splat<T>(T(3)));
  CHECK(bytes[0] == T(0) && bytes[1] == T(3) && bytes[kVec] == T(3));
#if defined(__SSE2__)
  alignas(64) T line[2 * kVec] = {};
  stream(line + kVec, shifted);
  for (int k = 0; k < kVec; ++k) CHECK(line[k] == T(0) && line[kVec + k] == T(k + 1));
#endif
}

template <class T>
void check_bits() {
  const T x = T(-1.5);
  const auto b = bits(splat<T>(x));
  CHECK(uns(b)[0] == raw<std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>(x));
  CHECK(same_bits<T>(b)[kVec - 1] == x);
}

__attribute__((noinline)) int run(uint64_t stride) {
  ::alarm(120);
  test_every_half_comes_back();
  test_all_bodies_of_to_half_agree(stride);
  test_half_rounds_as_the_compiler_does();
  test_bfloat16_rounds_to_nearest_even();
  check_order<Float32>();
  check_order<Float64>();
  test_integers_wrap_and_compare_with_their_signs();
  check_division<Float32, uint32_t>();
  check_division<Float64, uint64_t>();
  test_any_nan_becomes_the_one();
  test_max_element_finds_it_anywhere();
  check_partial_access<float>();
  check_partial_access<double>();
  check_partial_access<uint16_t>();
  check_partial_access<int64_t>();
  check_bits<float>();
  check_bits<double>();
  return finish();
}

}  // namespace

int main(int argc, char** argv) {
#if defined(__AVX512F__)
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512bw"))
    return 77;
#elif defined(__AVX2__)
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("f16c")) return 77;
#endif
  return run(argc > 1 ? uint64_t(std::atoll(argv[1])) : kHardware ? 1 : 61);
}
