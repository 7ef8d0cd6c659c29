// What tests of ranks that are threads have in common: time and its limits, one call of a rank, the error it ends with.
#pragma once
#include <algorithm>
#include <chrono>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "queue.h"

namespace thread_ranks {

using namespace dpcomm;
using Clock = std::chrono::steady_clock;

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
constexpr int kSlow = 4;  // times as long, or as few
#else
constexpr int kSlow = 1;
#endif
constexpr double kShortS = kSlow == 1 ? 1.5 : 3;  // of calls that are to time out; what comes before has no more
inline double patience_s = 30;                    // for what should take milliseconds

inline double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// Runs body(0), body(1), ... at once.
inline void in_threads(int count, const std::function<void(int)>& body) {
  std::vector<std::thread> threads;
  for (int i = 0; i < count; ++i) threads.emplace_back(body, i);
  for (std::thread& thread : threads) thread.join();
}

// Whole numbers, so that sums are exact: rank r starts with r + 1 everywhere.
struct Data {
  Data(int64_t elems, int rank) : x(size_t(elems), float(rank + 1)) {
    call.addresses = {reinterpret_cast<char*>(x.data())};
    call.counts = {elems};
  }
  bool all(float value) const {
    return std::all_of(x.begin(), x.end(), [value](float v) { return v == value; });
  }
  std::vector<float> x;
  Call call;
};

// The Error that f throws within `limit_s`; a failed check and an empty one if there is none.
inline Error error_of(const std::function<void()>& f, double limit_s = 5 * kSlow) {
  const auto start = Clock::now();
  try {
    f();
  } catch (const Error& error) {
    if (!CHECK(seconds_since(start) < limit_s))
      std::fprintf(stderr, "  %.1f s: %s\n", seconds_since(start), error.what());
    return error;
  }
  CHECK(!"an Error is thrown");
  return Error(Code::cuda, "nothing was thrown");
}
inline Error error_of(const std::shared_ptr<Job>& job, double limit_s = 5 * kSlow) {
  return error_of(
      [&] {
        if (!CHECK(job->wait(patience_s))) return;
        if (job->error()) std::rethrow_exception(job->error());
      },
      limit_s);
}

inline bool is(const Error& error, Code code) {
  if (error.code == code) return true;
  std::fprintf(stderr, "  %s expected, not: %s\n", name_of(code), error.what());
  return false;
}
inline bool says(const Error& error, const std::string& text) {
  if (std::string(error.what()).find(text) != std::string::npos) return true;
  std::fprintf(stderr, "  '%s' does not contain '%s'\n", error.what(), text.c_str());
  return false;
}

// What one rank asks for where the others call with `elems` elements and no wishes, and what the error then says.
struct Mismatch {
  void (*change)(Call&);
  const char* text;
  int64_t elems;
};
inline const Mismatch kMismatches[] = {
    {[](Call& c) { c.counts[0] = 4; }, "rank 1 has 4", 8},
    {[](Call& c) { c.counts[0] = 100000; }, "rank 1 has 100000", 8},  // "auto" is oneshot here and direct there
    {[](Call& c) { c.counts[0] = 0; }, "rank 1 has 0", 100},
    {[](Call& c) { c.dtype = Dtype::int32; }, "dtype", 100000},
    {[](Call& c) { c.op = Op::mean; }, "op", 8},
    {[](Call& c) { c.codec = CodecKind::fp16; }, "codec", 8},
    {[](Call& c) { c.bucket = 3; }, "bucket 3", 8},
    {[](Call& c) { c.algorithm = Algorithm::direct; }, "algorithm", 8},
    {[](Call& c) { c.algorithm = Algorithm::ring; }, "algorithm", 8},
};

// A call of three ranks of which rank 1 makes the odd one.
struct Disagreeing : Data {
  Disagreeing(const Mismatch& mismatch, int rank) : Data(rank == 1 ? 100000 : mismatch.elems, rank) {
    call.counts = {mismatch.elems};
    if (rank == 1) mismatch.change(call);
  }
};

}  // namespace thread_ranks
