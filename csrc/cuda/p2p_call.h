// What the p2p kernel is told: plain data, the same for host and device code.
//
//   P2pCall    by value with each launch (a captured graph keeps it)          the bucket and its header
//   P2pTeam    in device memory, written once                                 who the ranks are, and how they wait
//   P2pRank    one for each rank that this launch plays                       its arena, failure word, status
//
// Everything that changes from call to call besides lies in the mailboxes, so that a graph can be replayed.
#pragma once
#include "../core/mailbox.h"
#include "../core/segments.h"
#include "../gpu/launch.h"

namespace dpcomm {

constexpr int kMostCtas = 64;  // of one rank

// In the device's own memory.
struct RankState {
  alignas(128) uint64_t failure;           // of this rank: set once, by the first of its CTAs that cannot go on
  alignas(128) uint32_t left;              // CTAs that have finished the current call
  alignas(128) uint64_t nonfinite_groups;  // encoded so far with a NaN or Inf
};

// In host memory that the device sees. One writer: the kernel that plays the rank; read by the watchdogs of all ranks.
struct alignas(128) RankStatus {
  uint64_t failure;           // copy of RankState::failure once it is set. It releases nothing else.
  uint64_t nonfinite_groups;  // copy, at the end of each call
};

struct P2pRank {
  int rank;
  Mailbox* const* box;  // [channel][rank]
  RankState* state;
  RankStatus* status;
};

struct P2pTeam {
  int nranks, slots;
  int64_t slot_bytes;
  bool shared;                  // see Team
  uint64_t timeout_ns;          // of one wait: a peer that makes progress is alive
  const uint64_t* first_cause;  // in host memory: nonzero once any rank has failed
  const P2pRank* ranks;         // those that are played here
};

struct P2pCall {
  const P2pTeam* team;
  int channels;             // CTAs of one rank in this call
  int64_t slice_bytes;      // see Team
  int64_t count, groups;    // of one rank's bucket
  const Segment* segments;  // [rank played here][count]; null where they are in `few`
  Header header;            // without its sequence number
  Segment few[kInlineSegments];
};
static_assert(sizeof(P2pCall) <= 4096, "what a kernel may be given by value on every GPU");

}  // namespace dpcomm
