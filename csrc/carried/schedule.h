// The three algorithms where a carrier moves the messages: which step comes when, and which messages travel between.
// The same for CPU and GPU; bits are the core's affair.
//
//   direct, slice      give c   ->  all-to-all  ->  reduce c  ->  all-gather  ->  take c
//   in the same round  give c       reduce c - 2                                  take c - 4
//
// so that two slices are always on the wire in each direction while the processor works on others.
#pragma once
#include <deque>
#include <vector>

#include "../core/steps.h"
#include "carrier.h"

namespace dpcomm {

constexpr int kAhead = 2;         // rounds that a message has to arrive
constexpr int kCarriedSlots = 4;  // 2 * kAhead; see schedule.cpp

// What plays the steps of one rank's call. Those between two pauses touch different memory, so a GPU may play them at
// once.
class Stepper {
 public:
  virtual void play(const Step& step, bool in_place) = 0;
  virtual void pause() = 0;  // the carrier comes next: it sends what the steps before have written

 protected:
  ~Stepper() = default;
};

// One call. `group_bytes`: what a group takes in a message.
struct CarriedCall {
  const Team& team;  // `shared`: a result is one message for all; box[r] is this rank's own copy of r's arena
  const Bucket& bucket;
  const Header& header;
  int64_t group_bytes;
  double timeout_s;
  const int* ranks = nullptr;  // of the team, as the carrier knows them; null: the same
};

// Where the values of whole groups of one tensor lie as they would in a message: user memory can be sent, and received
// into. Null: not so.
char* values_in(const Bucket& bucket, Range range, int64_t group_bytes);

// One rank's part of a call, a round at a time, so that somebody may do other work, or play other calls, between.
class Player {
 public:
  Player(Carrier& carrier, Stepper& stepper, const CarriedCall& call);

  // Of direct and oneshot: gives slice `number`, and goes on with those before. False: see end(). Rounds that the call
  // does not have do nothing.
  bool round(int64_t number);
  bool ring();  // all of it

  int64_t slices() const { return chunks_.slices; }
  // How the first exchange that did not end well ended; by then others may still be in flight.
  const Arrival& end() const { return end_; }

 private:
  void give(int64_t slice);
  bool reduce(int64_t slice);
  bool take(int64_t slice);
  void give_all(int64_t slice);
  bool turn(int64_t slice, int turn);
  bool in_call(int64_t slice) const { return slice >= 0 && slice < chunks_.slices; }
  char* in_memory(Range range) const;
  Range ring_range(int64_t slice, int chunk) const;

  void run(const Step& step, bool in_place = false) { stepper_.play(step, in_place); }
  void begin() { sends_.clear(), receives_.clear(); }
  void send(int peer, char* from, Range range);
  void receive(int peer, char* to, Range range);
  int carried(int peer) const { return call_.ranks ? call_.ranks[peer] : peer; }
  void start();
  bool arrived();

  Carrier& carrier_;
  Stepper& stepper_;
  const CarriedCall call_;
  const Team& t_;
  const Algorithm algorithm_;
  const Chunks chunks_;
  const bool values_travel_;
  std::vector<Transfer> sends_, receives_;
  std::deque<int64_t> tickets_;  // to wait for, the oldest first
  uint32_t ring_sent_ = 0, ring_read_ = 0;
  Arrival end_;
};

// One call from its first round to its last. Returns Player::end().
Arrival play(Carrier& carrier, Stepper& stepper, const CarriedCall& call);

}  // namespace dpcomm
