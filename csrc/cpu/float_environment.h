// Rounding and denormals as IEEE says while a call runs: torch.set_flush_denormal(True) would change bits otherwise.
#pragma once
#include <cstdint>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace dpcomm {

class DefaultFloatEnvironment {
 public:
  DefaultFloatEnvironment() : saved_(read()) { write(kDefault); }
  ~DefaultFloatEnvironment() { write(saved_); }
  DefaultFloatEnvironment(const DefaultFloatEnvironment&) = delete;
  DefaultFloatEnvironment& operator=(const DefaultFloatEnvironment&) = delete;

 private:
#if defined(__SSE2__)
  static constexpr uint64_t kDefault = 0x1f80;  // MXCSR: all exceptions masked, nearest even, no flushing
  static uint64_t read() { return _mm_getcsr(); }
  static void write(uint64_t value) { _mm_setcsr(static_cast<unsigned>(value)); }
#elif defined(__aarch64__)
  static constexpr uint64_t kDefault = 0;  // FPCR
  static uint64_t read() {
    uint64_t v;
    asm volatile("mrs %0, fpcr" : "=r"(v));
    return v;
  }
  static void write(uint64_t v) { asm volatile("msr fpcr, %0" ::"r"(v)); }
#else
#error "say how this processor's rounding mode and flush-to-zero are set"
#endif
  const uint64_t saved_;
};

}  // namespace dpcomm
