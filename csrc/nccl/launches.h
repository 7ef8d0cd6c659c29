// What the kernels of engine nccl are told: plain data, the same for host and device code.
//
//   StepLaunch     some steps of one call (core/steps.h) that do not depend on each other
//   InsideLaunch   the same inside a host, of two levels
//   CallState      in host memory that the GPU sees: how far calls have come, and whether they go on
#pragma once
#include "../core/shards.h"
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

// What the ranks of a host do around an all-reduce between hosts (core/local.h), where NCCL carries messages inside it.
struct InsideMove {
  enum class Kind : uint8_t { put, add, get };
  Kind kind;
  int owner;      // local rank: of what is moved
  char* message;  // put, get: user memory's, encoded. add: the first of all ranks' of the host, `stride` apart
};

constexpr int kMostMoves = 32;

// One message of a round. A kernel computes the range of a move itself: given as two numbers, it came out with stores
// of single elements (docs/performance.md).
struct InsideLaunch {
  BucketTable bucket;
  Shards shards;
  int64_t slice, number;  // of the round, and of the message
  int part;
  int count;  // of the moves
  InsideMove moves[kMostMoves];
  int rank, size;  // of the host
  int64_t stride;  // from one rank's message to the next one's
  Op op;
  uint64_t* nonfinite_groups;  // in device memory
};
static_assert(sizeof(InsideLaunch) <= 4096);

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
