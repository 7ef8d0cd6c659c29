// What the kernels of engine nccl are told: plain data, the same for host and device code.
//
//   StepLaunch   some steps of one call (core/steps.h) that do not depend on each other
//   CallState    in host memory that the GPU sees: how far calls have come, and whether they go on
#pragma once
#include "../core/steps.h"
#include "../gpu/launch.h"

namespace dpcomm {

// The host writes `agreed` and `failure`, the GPU the rest. Each on a line of its own.
struct CallState {
  alignas(128) uint64_t agreed;   // calls that all ranks have announced alike
  alignas(128) uint64_t failure;  // header.h: nonzero once the communicator has failed
  alignas(128) uint64_t begun;    // calls that the stream has reached; replays of graphs count
  alignas(128) uint64_t ended;
  alignas(128) uint64_t nonfinite_groups;  // encoded so far with a NaN or Inf
};

// One step for each of some peers.
struct PeerSteps {
  Step step;
  uint64_t peers;  // a bit for each; 0: the step as it is
};

constexpr int kMostPeerSteps = 4;

struct StepLaunch {
  Team team;
  Header header;
  BucketTable bucket;
  PeerSteps steps[kMostPeerSteps];
  int count;                   // of them
  bool in_place;               // codec none: what is reduced goes into user memory only, and is sent from there
  uint64_t* nonfinite_groups;  // in device memory
};
static_assert(sizeof(StepLaunch) <= 4096, "what a kernel may be given by value on every GPU");

// The end of a call, in one CTA: waits until all ranks have announced it alike; after a failure it fills the bucket
// with NaNs, so that nobody takes a gradient that was not reduced for one that was.
struct EndLaunch {
  CallState* state;
  uint64_t sequence;
  uint64_t* nonfinite_groups;
  Dtype dtype;
  BucketTable bucket;
};
static_assert(sizeof(EndLaunch) <= 4096);

// The beginning of a call, in one lane.
struct BeginLaunch {
  CallState* state;
};

}  // namespace dpcomm
