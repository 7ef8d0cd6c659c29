// What differs between compilers and instruction sets: the only core file that may ask which one is reading.
//
// The host build reads the core once per instruction set (-DDPCOMM_ISA=name), each time in an inline namespace of that
// name, so that the linker can never hand a function compiled with AVX-512 to the portable path.
//
// Vec<T> is kVec neighbouring values. On the host it is a compiler vector, on the GPU eight values in registers that
// move as 16-byte accesses. map(f, a, b) applies one expression to both kinds: f is written with + & < ?: and works on
// whole vectors (host) or element by element (GPU).
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__CUDACC__)
#include <cuda_fp16.h>
#define DPCOMM_HD __host__ __device__ __forceinline__
#if defined(__CUDA_ARCH__)
#define DPCOMM_UNROLL _Pragma("unroll")
#else
#define DPCOMM_UNROLL
#endif
#else
#if defined(__SSE2__)
#include <immintrin.h>
#endif
#define DPCOMM_HD inline __attribute__((always_inline))
#define DPCOMM_UNROLL _Pragma("GCC unroll 64")  // completely, all loops of the core are shorter
#endif
#ifndef DPCOMM_ISA
#if defined(__CUDACC__)
#define DPCOMM_ISA cuda  // nvcc's host half must not share names with the CPU's code: its Vec is another
#else
#define DPCOMM_ISA portable
#endif
#endif

namespace dpcomm {
inline namespace DPCOMM_ISA {

template <class To, class From>
DPCOMM_HD To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// ---- flags -------------------------------------------------------------------------------------------------------
// What a lane wrote before store_release is visible to whoever reads that value with load_acquire, on any device.

DPCOMM_HD uint32_t load_acquire(const uint32_t* flag) {
#if defined(__CUDA_ARCH__)
  uint32_t value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value;
#else
  return __atomic_load_n(flag, __ATOMIC_ACQUIRE);
#endif
}
DPCOMM_HD void store_release(uint32_t* flag, uint32_t value) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
#else
  __atomic_store_n(flag, value, __ATOMIC_RELEASE);
#endif
}
DPCOMM_HD uint64_t load_acquire(const uint64_t* word) {
#if defined(__CUDA_ARCH__)
  uint64_t value;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");
  return value;
#else
  return __atomic_load_n(word, __ATOMIC_ACQUIRE);
#endif
}
DPCOMM_HD void store_release(uint64_t* word, uint64_t value) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(word), "l"(value) : "memory");
#else
  __atomic_store_n(word, value, __ATOMIC_RELEASE);
#endif
}
// Adds one and returns what was there; whoever counts later sees what those before have written. One device only.
DPCOMM_HD uint32_t count_up(uint32_t* counter) {
#if defined(__CUDA_ARCH__)
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  return before;
#else
  return __atomic_fetch_add(counter, 1, __ATOMIC_ACQ_REL);
#endif
}
// Writes `desired` if the word is still zero; the first caller wins, on any device.
DPCOMM_HD void set_once(uint64_t* word, uint64_t desired) {
#if defined(__CUDA_ARCH__)
  __threadfence_system();  // what led to it is visible before it
  atomicCAS_system(reinterpret_cast<unsigned long long*>(word), 0ull, static_cast<unsigned long long>(desired));
#else
  uint64_t expected = 0;
  __atomic_compare_exchange_n(word, &expected, desired, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
#endif
}

// ---- vectors -----------------------------------------------------------------------------------------------------

DPCOMM_HD int32_t bits(float x) { return bit_cast<int32_t>(x); }
DPCOMM_HD int32_t mask(bool c) { return -int32_t{c}; }  // all bits or none, as comparing vectors answers

#if defined(__CUDACC__)
constexpr int kVec = 8;               // two 16-byte loads of floats, one 16-byte store of halves
constexpr int kVecAlign = 16;         // what a whole access needs
constexpr bool kNanSurvives = false;  // arithmetic answers any NaN with 0x7fffffff
template <class T>
struct alignas(16) Vec {
  T at[kVec];
};
template <class F, class... T>
DPCOMM_HD auto map(F f, const Vec<T>&... v) {
  Vec<std::decay_t<decltype(f(v.at[0]...))>> out;
  DPCOMM_UNROLL
  for (int k = 0; k < kVec; ++k) out.at[k] = f(v.at[k]...);
  return out;
}
template <class T>
DPCOMM_HD Vec<T> splat(T x) {
  Vec<T> v;
  DPCOMM_UNROLL
  for (int k = 0; k < kVec; ++k) v.at[k] = x;
  return v;
}
template <class T>
DPCOMM_HD T element(const Vec<T>& v, int k) {
  return v.at[k];
}
template <class T>
DPCOMM_HD void set_element(Vec<T>& v, int k, T x) {
  v.at[k] = x;
}
DPCOMM_HD int64_t bits(double x) { return bit_cast<int64_t>(x); }
DPCOMM_HD uint32_t uns(int32_t x) { return static_cast<uint32_t>(x); }
DPCOMM_HD uint64_t uns(int64_t x) { return static_cast<uint64_t>(x); }
template <class T>
DPCOMM_HD T alike(T, T value) {
  return value;
}  // `value` in the shape of the other; 0 + NaN is another NaN on a GPU
template <class T, class F>
DPCOMM_HD T same_bits(F x) {
  return bit_cast<T>(x);
}
template <class T, class F>
DPCOMM_HD T convert(F x) {
  return static_cast<T>(x);
}
template <class T>
using Uniform = T;
template <class T>
DPCOMM_HD Uniform<T> uniform(T x) {
  return x;
}
template <class T>
DPCOMM_HD T first(T x) {
  return x;
}

#else
#if defined(__AVX512F__)
constexpr int kVec = 16;
#elif defined(__AVX__)
constexpr int kVec = 8;
#else
constexpr int kVec = 4;  // one register of floats: gcc 12 compares longer vectors element by element
#endif
constexpr int kVecAlign = 1;
constexpr bool kNanSurvives = true;  // a canonical NaN times a number is a canonical NaN
template <class T>
struct VecOf {
  typedef T type __attribute__((vector_size(kVec * sizeof(T))));
};
template <class T>
using Vec = typename VecOf<T>::type;
template <class F, class... V>
DPCOMM_HD auto map(F f, const V&... v) {
  return f(v...);
}
template <class T>
DPCOMM_HD Vec<T> splat(T x) {
  return x - Vec<T>{};
}
template <class V>
DPCOMM_HD auto element(const V& v, int k) {
  return v[k];
}
template <class V, class T>
DPCOMM_HD void set_element(V& v, int k, T x) {
  v[k] = x;
}
DPCOMM_HD Vec<int32_t> bits(Vec<float> v) { return (Vec<int32_t>)v; }
DPCOMM_HD Vec<int64_t> bits(Vec<double> v) { return (Vec<int64_t>)v; }
DPCOMM_HD Vec<int32_t> mask(Vec<int32_t> v) { return v; }
DPCOMM_HD Vec<uint32_t> uns(Vec<int32_t> v) { return (Vec<uint32_t>)v; }
DPCOMM_HD Vec<uint64_t> uns(Vec<int64_t> v) { return (Vec<uint64_t>)v; }
template <class V, class T>
DPCOMM_HD V alike(const V&, T value) {
  return V{} + value;
}
template <class T, class V>
DPCOMM_HD auto same_bits(V v) {
  if constexpr (std::is_arithmetic_v<V>)
    return bit_cast<T>(v);
  else
    return (Vec<T>)v;
}
template <class T, class V>
DPCOMM_HD auto convert(V v) {
  if constexpr (std::is_arithmetic_v<V>)
    return static_cast<T>(v);
  else
    return __builtin_convertvector(v, Vec<T>);
}
// One value for a whole group. On the host it stays in a vector register, every element alike: going through a scalar
// register and back costs 13 cycles in the longest chain of a group.
template <class T>
using Uniform = Vec<T>;
template <class T>
DPCOMM_HD Uniform<T> uniform(T x) {
  return splat(x);
}
template <class V>
DPCOMM_HD auto first(V v) {
  return v[0];
}
#endif

// Whole vectors. `from` and `to` are aligned to kVecAlign.
template <class T>
DPCOMM_HD Vec<T> load(const T* from) {
#if defined(__CUDACC__)
  return *reinterpret_cast<const Vec<T>*>(from);
#else
  Vec<T> v;
  memcpy(&v, from, sizeof v);
  return v;
#endif
}
template <class T>
DPCOMM_HD void store(T* to, const Vec<T>& v) {
#if defined(__CUDACC__)
  *reinterpret_cast<Vec<T>*>(to) = v;
#else
  memcpy(to, &v, sizeof v);
#endif
}
// The first n of a vector (n may be negative or past the end); zeros where nothing is read. Any alignment.
template <class T>
DPCOMM_HD Vec<T> load_some(const T* from, int n) {
  Vec<T> v = splat<T>(T{});
  DPCOMM_UNROLL
  for (int k = 0; k < kVec; ++k)
    if (k < n) set_element(v, k, from[k]);
  return v;
}
template <class T>
DPCOMM_HD void store_some(T* to, const Vec<T>& v, int n) {
  DPCOMM_UNROLL
  for (int k = 0; k < kVec; ++k)
    if (k < n) to[k] = element(v, k);
}
// Past the cache, for lines that another core reads next. `to` is aligned to the vector; sfence before the flag.
#if defined(__SSE2__) && !defined(__CUDACC__)
template <class T>
DPCOMM_HD void stream(T* to, const Vec<T>& v) {
  constexpr int bytes = sizeof(v);
  char* out = reinterpret_cast<char*>(to);
  const char* in = reinterpret_cast<const char*>(&v);
#if defined(__AVX512F__)
  if constexpr (bytes % 64 == 0) {
    for (int i = 0; i < bytes; i += 64) _mm512_stream_si512((__m512i*)(out + i), _mm512_loadu_si512(in + i));
    return;
  }
#endif
#if defined(__AVX__)
  if constexpr (bytes % 32 == 0) {
    for (int i = 0; i < bytes; i += 32)
      _mm256_stream_si256((__m256i*)(out + i), _mm256_loadu_si256((const __m256i*)(in + i)));
    return;
  }
#endif
  if constexpr (bytes % 16 == 0) {
    for (int i = 0; i < bytes; i += 16)
      _mm_stream_si128((__m128i*)(out + i), _mm_loadu_si128((const __m128i*)(in + i)));
  } else {  // four codes of two bytes
    static_assert(bytes == 8);
    _mm_stream_si64((long long*)out, bit_cast<long long>(v));
  }
}
#endif

DPCOMM_HD Uniform<int32_t> max_element(const Vec<int32_t>& v) {
#if defined(__CUDACC__)
  int32_t m = v.at[0];
  DPCOMM_UNROLL
  for (int k = 1; k < kVec; ++k) m = v.at[k] > m ? v.at[k] : m;
  return m;
#else
  Vec<int32_t> lane, m = v;
  for (int k = 0; k < kVec; ++k) lane[k] = k;
  for (int step = kVec / 2; step > 0; step /= 2) {
    const Vec<int32_t> other = __builtin_shuffle(m, lane ^ step);
    m = m > other ? m : other;
  }
  return m;
#endif
}

// ---- half precision ----------------------------------------------------------------------------------------------
// Definition: round to nearest even, any NaN becomes 0x7e00 and comes back as 0x7fc00000. The hardware bodies below
// are second bodies of it; tests/cpp/test_portable.cpp compares them on every input.

// c ? a : b, where c is a mask. As arithmetic: gcc turns nested ?: of single values into jumps, and a loop with jumps
// is not vectorised.
template <class I, class A>
DPCOMM_HD I pick(I c, A a, I b) {
  return b ^ ((a ^ b) & c);
}

// `x` is a float, or on the host a Vec<float>.
template <class F>
DPCOMM_HD auto half_bits(F x) {
  const auto b = bits(x), m = b & 0x7fffffff;
  const auto normal = (m - (112 << 23) + 0xfff + (m >> 13 & 1)) >> 13;
  const auto tiny = bits(same_bits<float>(m) + 0.5f) - 0x3f000000;  // the adder rounds
  const auto h = pick(mask(m >= 0x47800000), 0x7c00, pick(mask(m < 0x38800000), tiny, normal));
  return convert<uint16_t>(pick(mask(m > 0x7f800000), 0x7e00, h | (b >> 16 & 0x8000)));
}
// `h` is a uint16_t, or on the host a Vec<uint16_t>.
template <class H>
DPCOMM_HD auto half_value(H h) {
  const auto b = convert<int32_t>(h), m = (b & 0x7fff) << 13, normal = m + (112 << 23);
  const auto tiny = bits(same_bits<float>(m + (113 << 23)) - 6.103515625e-05f);  // 2^-14
  const auto magnitude = pick(mask(m >= 0x0f800000), m + (224 << 23), pick(mask(m < 0x00800000), tiny, normal));
  return same_bits<float>(pick(mask(m > 0x0f800000), 0x7fc00000, magnitude | (b & 0x8000) << 16));
}

DPCOMM_HD Vec<uint16_t> to_half(const Vec<float>& v) {
#if defined(__CUDA_ARCH__)
  return map([](float x) { return x != x ? uint16_t{0x7e00} : __half_as_ushort(__float2half_rn(x)); }, v);
#elif defined(__AVX512F__) && !defined(__CUDACC__)
  const __m256i h = _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __mmask16 nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
  return (Vec<uint16_t>)_mm256_mask_mov_epi16(h, nan, _mm256_set1_epi16(0x7e00));
#elif defined(__F16C__) && !defined(__CUDACC__)
  const __m256 nan = _mm256_cmp_ps((__m256)v, (__m256)v, _CMP_UNORD_Q);
  const __m256 x = _mm256_blendv_ps((__m256)v, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000)), nan);
  return (Vec<uint16_t>)_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  return map([](auto x) { return half_bits(x); }, v);
#endif
}
// The same, where no element is a NaN.
DPCOMM_HD Vec<uint16_t> to_half_finite(const Vec<float>& v) {
#if defined(__AVX512F__) && !defined(__CUDACC__)
  return (Vec<uint16_t>)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__) && !defined(__CUDACC__)
  return (Vec<uint16_t>)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  return to_half(v);
#endif
}
DPCOMM_HD Vec<float> from_half(const Vec<uint16_t>& h) {
#if defined(__CUDA_ARCH__)
  return map(
      [](uint16_t x) {
        const float y = __half2float(__ushort_as_half(x));
        return y != y ? bit_cast<float>(0x7fc00000) : y;  // the hardware answers 0x7fffffff
      },
      h);
#elif defined(__AVX512F__) && !defined(__CUDACC__)
  return (Vec<float>)_mm512_cvtph_ps((__m256i)h);
#elif defined(__F16C__) && !defined(__CUDACC__)
  return (Vec<float>)_mm256_cvtph_ps((__m128i)h);
#else
  return map([](auto x) { return half_value(x); }, h);
#endif
}

}  // namespace DPCOMM_ISA
}  // namespace dpcomm
