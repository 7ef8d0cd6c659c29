// The whole test harness of the C++ tests: CHECK counts and goes on, finish() prints the sum and is main's result.
#pragma once
#include <atomic>
#include <cstdio>

struct Checks {
  static inline std::atomic<int> passed{0}, failed{0};  // ranks that are threads check too
};

inline bool check(bool holds, const char* what, const char* file, int line) {
  ++(holds ? Checks::passed : Checks::failed);
  if (!holds) std::fprintf(stderr, "%s:%d: failed: %s\n", file, line, what);
  return holds;
}

#define CHECK(...) check(static_cast<bool>(__VA_ARGS__), #__VA_ARGS__, __FILE__, __LINE__)

inline int finish() {
  std::printf("%d passed, %d failed\n", Checks::passed.load(), Checks::failed.load());
  return Checks::failed == 0 ? 0 : 1;
}
