// What every contender of the comparison shares: how it is asked, fed, checked and timed. Only allreduce() differs.
//
//   coordinator -> rank   check VARIANT FLOATS SEED             rank -> coordinator   checked WRONG
//                         run VARIANT FLOATS CALLS hot|cold SEED                      ran NANOSECONDS NANOSECONDS ...
//                         (end of file: end)
//
// Timing follows benchmarks/measure.py: calls back to back without a barrier, after an untimed one in which the ranks
// meet. Before values could overflow half precision the buffer is filled anew, and the ranks meet anew. A cold call
// comes after the buffer has been flushed from all caches (and after a tiny all-reduce, since ranks flush for
// different times); what the contender keeps for itself stays where it is.
#pragma once
#if !defined(__x86_64__)
#error "the comparison flushes caches with an instruction of x86-64"
#endif
#include <emmintrin.h>
#include <sched.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "pipes.h"

namespace turns {

constexpr int kPeriod = 1021;         // values repeat; a prime, so that no group or chunk looks like another
constexpr int kMostCallsAFill = 10;   // as benchmarks/measure.py
constexpr double kHalfHeadroom = 15;  // sums start below 1, and half precision ends at 2^16
constexpr int64_t kMeetFloats = 64;

class Contender {
 public:
  virtual ~Contender() = default;
  virtual std::string version() = 0;                     // of the library, and what it chose
  virtual void select(const std::string& variant) = 0;   // throws std::runtime_error if there is no such variant
  virtual void allreduce(float* x, int64_t floats) = 0;  // sum, in place
  virtual double tolerance() { return 0; }               // relative, of the selected variant
  virtual void meet(float* zeros) { allreduce(zeros, kMeetFloats); }
  virtual void resize(int64_t) {}  // before calls of another size
  virtual void flush(float* x, int64_t floats) { flush_lines(x, floats); }

  static void flush_lines(const float* x, int64_t floats) {
    for (int64_t i = 0; i < floats; i += 16) _mm_clflush(x + i);
    _mm_mfence();
  }
};

// A variant that sends half precision: the sum of non-negative terms is off by one rounding of each term and one of
// itself, at most 2^-11 each; the rest is for their product and the fp32 sum.
constexpr double kHalfTolerance = 1.01 / 1024;

struct Free {
  void operator()(float* x) const { std::free(x); }
};
using Buffer = std::unique_ptr<float[], Free>;
inline Buffer allocate(int64_t floats) {
  auto* x = static_cast<float*>(std::aligned_alloc(4096, size_t(floats * 4 + 4095) / 4096 * 4096));
  if (!x) throw std::runtime_error("no memory for " + std::to_string(floats * 4) + " bytes");
  return Buffer(x);
}

class Rank {
 public:
  Rank(Pipes& pipes, Contender& contender, int rank, int nranks)
      : pipes_(pipes), contender_(contender), rank_(rank), nranks_(nranks), zeros_(allocate(kMeetFloats)) {
    std::fill_n(zeros_.get(), kMeetFloats, 0.f);
  }

  void serve() {
    pipes_.write("ready " + std::to_string(getpid()) + " " + contender_.version());
    for (std::string line; !(line = pipes_.read()).empty();) {
      std::istringstream words(line);
      std::string what, variant, cache;
      int64_t floats = 0, calls = 0;
      uint64_t seed = 0;
      words >> what >> variant >> floats;
      if (what == "run") words >> calls >> cache;
      words >> seed;
      if (!words) throw std::runtime_error("not understood: " + line);
      contender_.select(variant);
      resize(floats);
      if (what == "run")
        run(calls, cache == "cold", seed);
      else
        pipes_.write("checked " + std::to_string(check(seed)));
    }
  }

 private:
  void resize(int64_t floats) {
    if (floats == floats_) return;
    x_.reset();  // first: two buffers of the largest size may not fit
    contender_.resize(floats);
    x_ = allocate(floats);
    floats_ = floats;
  }

  static float value(int64_t i, int rank, uint64_t seed) {
    return float((uint64_t(i) * 7 + rank * 13 + seed) % kPeriod);
  }

  // Whole numbers, times scale: sums are exact in float32. Writes all of x, and touches it for the first time.
  void fill(uint64_t seed, float scale) {
    float period[kPeriod];
    for (int i = 0; i < kPeriod; ++i) period[i] = value(i, rank_, seed) * scale;
    for (int64_t i = 0; i < floats_; i += kPeriod)
      std::memcpy(x_.get() + i, period, size_t(std::min<int64_t>(kPeriod, floats_ - i)) * 4);
  }

  int64_t check(uint64_t seed) {
    fill(seed, 1);
    contender_.allreduce(x_.get(), floats_);
    float period[kPeriod] = {};
    for (int i = 0; i < kPeriod; ++i)
      for (int r = 0; r < nranks_; ++r) period[i] += value(i, r, seed);
    const double tolerance = contender_.tolerance();
    int64_t wrong = 0;
    for (int64_t i = 0, j = 0; i < floats_; ++i, j = j + 1 == kPeriod ? 0 : j + 1)
      wrong += !(std::fabs(double(x_[i]) - period[j]) <= tolerance * period[j]);  // a NaN is wrong too
    return wrong;
  }

  void run(int64_t calls, bool cold, uint64_t seed) {
    // Each call multiplies by about nranks.
    const int a_fill = std::clamp(int(kHalfHeadroom / std::log2(std::max(nranks_, 2))), 2, kMostCallsAFill) - 1;
    std::vector<int64_t> times;
    times.reserve(size_t(calls));
    while (int64_t(times.size()) < calls) {
      fill(seed, 1.f / 1024);
      contender_.allreduce(x_.get(), floats_);
      contender_.meet(zeros_.get());
      for (int i = 0; i < a_fill && int64_t(times.size()) < calls; ++i) times.push_back(timed_call(cold));
    }
    std::ostringstream line;
    line << "ran";
    for (const int64_t t : times) line << ' ' << t;
    pipes_.write(line.str());
  }

  int64_t timed_call(bool cold) {
    if (cold) {
      contender_.flush(x_.get(), floats_);
      contender_.meet(zeros_.get());
    }
    const auto start = std::chrono::steady_clock::now();
    contender_.allreduce(x_.get(), floats_);
    return std::chrono::nanoseconds(std::chrono::steady_clock::now() - start).count();
  }

  Pipes& pipes_;
  Contender& contender_;
  const int rank_, nranks_;
  Buffer zeros_, x_;
  int64_t floats_ = 0;
};

// With RIVALS_PIN set, every contender's rank r stays on the r-th processor that this process may use: all contenders
// then have the same placement. Only this thread: a library's own threads go where it puts them.
inline void pin(int rank) {
  cpu_set_t allowed, one;
  if (!std::getenv("RIVALS_PIN") || ::sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
  CPU_ZERO(&one);
  for (int cpu = 0, found = 0; cpu < CPU_SETSIZE; ++cpu)
    if (CPU_ISSET(cpu, &allowed) && found++ == rank) CPU_SET(cpu, &one);
  if (CPU_COUNT(&one) == 1) ::sched_setaffinity(0, sizeof one, &one);
}

// A contender's main(): makes it with make(pipes), serves until the coordinator is done. Returns the exit status.
template <class Make>
int serve(const std::string& folder, int rank, int nranks, Make make) {
  end_with_parent();
  Pipes pipes(folder, rank);
  try {
    const auto contender = make(pipes);
    pin(rank);
    Rank(pipes, *contender, rank, nranks).serve();
    return 0;
  } catch (const std::exception& error) {
    pipes.write(std::string("failed ") + error.what());
    return 1;
  }
}

}  // namespace turns
