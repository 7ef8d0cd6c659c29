// The three algorithms where a carrier moves the messages: which step comes when, and which messages travel between.
// The same for CPU and GPU; bits are the core's affair.
//
//   direct, slice      give c   ->  all-to-all  ->  reduce c  ->  all-gather  ->  take c
//   in the same round  give c       reduce c - 2                                  take c - 4
//
// so that two slices are always on the wire in each direction while the processor works on others.
#pragma once
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
};

// Returns how the first exchange that did not end well ended; by then others may still be in flight.
Arrival play(Carrier& carrier, Stepper& stepper, const CarriedCall& call);

}  // namespace dpcomm
