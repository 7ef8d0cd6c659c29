// What the files of test_control_plane have in common.
#pragma once
#include <random>

#include "control_plane_group.h"

namespace planes {

struct Test {
  const char* name;
  void (*run)();
};
#define TEST(name) {#name, name}

std::vector<Test> tests_of_ends();    // control_plane_ends.cpp
std::vector<Test> tests_of_causes();  // control_plane_causes.cpp

inline bool exchange(ControlPlane& plane, const Header& mine, double timeout_s = patience_s) {
  std::vector<Header> all;
  return plane.exchange_headers(mine, all, timeout_s, nullptr);
}

// Ranks get out of step.
struct Jitter {
  explicit Jitter(int seed) : random(unsigned(seed)) {}
  void operator()(int most_us) {
    if (const int us = int(random() % unsigned(most_us + 1)); us > most_us / 2)
      std::this_thread::sleep_for(std::chrono::microseconds(us));
  }
  std::minstd_rand random;
};

}  // namespace planes
