// Descriptors that this process has open: what a test leaves behind.
#pragma once
#include <chrono>
#include <filesystem>
#include <iterator>
#include <thread>

inline int open_descriptors() {
  const std::filesystem::directory_iterator begin("/proc/self/fd"), end;
  return int(std::distance(begin, end));  // one of them the iterator's own
}

// Whether so many are open, now or within a second: UBSan's vptr check opens a pipe for a moment, also on a thread that
// has done its work and is ending.
inline bool descriptors_settle_at(int count) {
  using namespace std::chrono_literals;
  for (int i = 0; i < 100 && open_descriptors() != count; ++i) std::this_thread::sleep_for(10ms);
  return open_descriptors() == count;
}
