// Ranks played by racing threads on one mapping, so that a race detector sees every access. The flags are the core's
// own load_acquire and store_release, and nothing sleeps in them: waiting and waking has tests of its own.
#pragma once
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <barrier>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "core/all_reduce.h"
#include "core/codec_fp16.h"
#include "core/codec_none.h"

namespace racing {

using namespace dpcomm;

constexpr int kMostLanes = 3;
inline std::chrono::seconds patience{20};  // for what takes milliseconds: a deadlock is a failure, not a hang

// Where the lanes of one rank meet.
struct Meeting {
  explicit Meeting(int lanes) : barrier(lanes) {}
  std::barrier<> barrier;
  std::atomic<bool> failed{false};
  int32_t maxima[kMostLanes] = {};
};

// `sharing` lanes hold one scaled group between them, as 32 do on a GPU; 1: each lane holds whole groups.
template <int sharing>
class RacingLanes {
 public:
  static constexpr bool puts_off = true;
  template <class Codec>
  static constexpr int vectors = Codec::scaled ? kGroup / kVec / sharing : 8;

  RacingLanes(int lane, int lanes, Meeting& meeting, uint64_t* failure, uint32_t seed)
      : lane_(lane), lanes_(lanes), meeting_(meeting), failure_(failure), random_(seed * 2654435761u + 1) {}

  int index() const { return lane_; }
  int count() const { return lanes_; }

  // Once it was false it stays so: a rank that has failed is not used again.
  bool sync(bool ok) {
    dawdle();
    if (!ok) meeting_.failed = true;
    meeting_.barrier.arrive_and_wait();
    const bool all = !meeting_.failed;
    meeting_.barrier.arrive_and_wait();
    return all;
  }
  Uniform<int32_t> group_max(Uniform<int32_t> m) {
    if (sharing == 1) return m;
    int32_t top = meeting_.maxima[lane_] = first(m);
    meeting_.barrier.arrive_and_wait();
    for (int i = 0; i < lanes_; ++i) top = std::max(top, meeting_.maxima[i]);
    meeting_.barrier.arrive_and_wait();
    return uniform(top);
  }

  bool wait(Flag* flag, uint32_t value, int peer) {
    dawdle();
    const auto deadline = std::chrono::steady_clock::now() + patience;
    while (!reached(load_acquire(&flag->value), value)) {
      if (load_acquire(failure_) != 0) return false;
      if (std::chrono::steady_clock::now() > deadline) {
        set_once(failure_, pack({Cause::timeout, uint8_t(peer), 0, Field::none, 0}));
        return false;
      }
      sched_yield();
    }
    dawdle();
    return true;
  }
  void post(Flag* flag, uint32_t value) { store_release(&flag->value, value); }

  template <class T>
  void push(T* to, const Vec<T>& v) {
    store(to, v);
  }
  void phase(Phase) {}
  void nonfinite_group() {}

 private:
  // Ranks and lanes must get out of step: that is where a slot is written too early.
  void dawdle() {
    random_ ^= random_ << 13, random_ ^= random_ >> 17, random_ ^= random_ << 5;
    if (random_ % 8 == 0) sched_yield();
    if (random_ % 64 == 1) usleep(random_ / 64 % 100);
  }

  const int lane_, lanes_;
  Meeting& meeting_;
  uint64_t* const failure_;
  uint32_t random_;
};

struct Shape {
  int ranks, lanes, slots;
  bool shared;
  int64_t slot_bytes = 2176, slice_bytes = 2176;  // one group of doubles, four of fp16: many slices in small buckets
};

// The mailboxes of all ranks, each in an allocation that ends where its last slot does.
class World {
 public:
  explicit World(const Shape& shape) : shape(shape) {
    const size_t bytes = size_t(arena_bytes(shape.ranks, shape.slots, shape.slot_bytes, shape.shared));
    for (int r = 0; r < shape.ranks; ++r) {
      void* memory = nullptr;
      if (posix_memalign(&memory, alignof(Mailbox), bytes) != 0) std::abort();
      std::memset(memory, 0xee, bytes);  // what no message has written is no zero
      arenas_.emplace_back(static_cast<char*>(memory), &std::free);
      box.push_back(new (memory) Mailbox{});
      for (uint32_t& sent : box[size_t(r)]->sent) sent = kFirst;
      for (auto& stream : box[size_t(r)]->arrived)
        for (Flag& flag : stream) flag.value = kFirst;
      meetings_.push_back(std::make_unique<Meeting>(shape.lanes));
    }
  }
  Team team(int rank) {
    return {rank, shape.ranks, box.data(), &failure, shape.slots, shape.slot_bytes, shape.slice_bytes, shape.shared};
  }
  // Runs body(lanes, team) on every lane of every rank; returns when all have.
  template <class Lanes, class Body>
  void run(uint32_t seed, Body body) {
    std::vector<std::thread> threads;
    for (int r = 0; r < shape.ranks; ++r)
      for (int lane = 0; lane < shape.lanes; ++lane)
        threads.emplace_back([&, r, lane] {
          Lanes lanes(lane, shape.lanes, *meetings_[size_t(r)], &failure, seed + uint32_t(r * kMostLanes + lane));
          body(lanes, team(r));
        });
    for (std::thread& thread : threads) thread.join();
  }

  const Shape shape;
  std::vector<Mailbox*> box;
  alignas(128) uint64_t failure = 0;

 private:
  static constexpr uint32_t kFirst = 0u - 3;  // flags and counters wrap within the first messages
  std::vector<std::unique_ptr<char, void (*)(void*)>> arenas_;
  std::vector<std::unique_ptr<Meeting>> meetings_;
};

}  // namespace racing
