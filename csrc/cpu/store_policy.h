// Which kind of store writes into slots: chosen by measuring both, again and again.
//
// The last to touch a slot's line was the peer, who read it. Where the cores share a cache plain stores win, where they
// do not streaming stores do, each by 2-5x. A virtual machine moves its processors between the two within minutes, so
// the choice of the start does not last. Never changes a bit.
#pragma once
#include <cstdint>

#include "../core/protocol.h"

namespace dpcomm {

enum class Store : uint8_t { plain, streaming };

// Where a call's time went, and what it met. Written by the thread that runs the call.
struct Tally {
  int64_t ns[kPhases] = {};
  int64_t since = 0;
  Phase current = Phase::wait;
  int64_t nonfinite_groups = 0;
  void enter(Phase next);                                    // ends the current phase
  int64_t busy_ns() const { return ns[0] + ns[1] + ns[2]; }  // all but waiting: a late peer says nothing about stores
};
static_assert(int(Phase::wait) == 3);

// The stores of one call on one channel, slice after slice.
class StoreTurns {
 public:
  explicit StoreTurns(Store store = Store::plain) : store_(store) {}
  // A call that tries both on some of its slices; it needs kSlices of them.
  static StoreTurns trial(Store store);
  static constexpr int kSlices = 9;

  Store next(const Tally& tally);  // of the slice that begins now
  bool tried() const { return marks_ == kMarks; }
  int64_t plain_ns() const { return at_[1] - at_[0]; }
  int64_t streaming_ns() const { return at_[3] - at_[2]; }

 private:
  static constexpr int kMarks = 4;
  Store store_;
  bool trial_ = false;
  int slice_ = -1, marks_ = 0;
  int64_t at_[kMarks] = {};
};

// One rank's choice. When a call is a trial follows from the calls made so far, so that all ranks try the same at the
// same time; what they conclude is their own affair.
class StorePolicy {
 public:
  void choose(Store store) { store_ = store; }
  Store chosen() const { return store_; }

  StoreTurns begin(int64_t bytes, int64_t slices);
  void end(const StoreTurns& turns, const Tally& tally);

  // Of calls between two trials: twice as many each time. A trial costs up to four calls' time.
  static constexpr int64_t kFirstInterval = int64_t{16} << 20, kLastInterval = int64_t{256} << 20;
  static constexpr int64_t kLeastBytes = 8 << 10;  // smaller calls show nothing

 private:
  void vote(int64_t plain_ns, int64_t streaming_ns);

  Store store_ = Store::plain;
  int64_t since_trial_ = 0, interval_ = kFirstInterval;  // bytes
  int votes_ = 0;                                        // of this trial; two that agree decide
  Store voted_ = Store::plain;
  // A pair of small calls of similar sizes, one with each kind of store.
  int64_t pair_bytes_ = 0;     // of the call that was made with plain stores; 0: none
  int64_t pair_plain_ns_ = 0;  // of that call; then what one of the second's size would have taken
  enum class Role : uint8_t { usual, slices, first_of_pair, second_of_pair } role_ = Role::usual;
};

}  // namespace dpcomm
