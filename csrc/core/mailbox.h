// What ranks share: plain data, no code, the same for every instruction set and device. No pointers: ranks map an arena
// at different addresses.
//
//   arena of a rank:   [Mailbox][slots of kGiven: writer 0 .. N-1][slots of kResult: mine, or writer 0 .. N-1]
//                      [slots of kRing: of the previous rank]
#pragma once
#include "header.h"

namespace dpcomm {

// Streams of messages, each with its own slots, flags and counter.
//   kGiven    one reader each: what I contribute to the chunk that the reader owns (to myself, too, where the codec
//             loses bits)
//   kResult   the same bytes for all readers: results of the chunk I own (direct), or my whole contribution (oneshot)
//   kRing     one reader, the next rank: partial sums, then results
//   kDrained  no slots: how many messages of kRing I have read. Its reader is the previous rank.
//   kHeader   no slots: headers lie in Mailbox::header
enum Stream { kGiven, kResult, kRing, kDrained, kHeader, kStreams };

// A line of its own (two: processors fetch them in pairs). One writer; it only ever counts up, and wraps.
struct alignas(128) Flag {
  uint32_t value;     // messages so far
  uint32_t sleeping;  // host: the reader is, or is about to be, asleep on `value`. Written by the reader.
};

struct alignas(4096) Mailbox {
  Flag arrived[kStreams][kMaxRanks];  // [..][writer]: polled by the owner of the mailbox
  Header header[2][kMaxRanks];        // [number % 2][writer]: a peer may be one call ahead
  uint64_t sequence;                  // calls begun by the owner. Alone in its writer: the owner.
  uint32_t sent[kStreams];            // messages of mine so far, in memory: a replayed CUDA graph counts on
};

// How one rank sees all of them.
struct Team {
  int rank, nranks;
  Mailbox* const* box;  // of every rank, at my addresses
  uint64_t* failure;    // the first cause (header.h), one word for all ranks
  int slots;            // a power of two (message % slots survives the wrap of 32 bits), at least 4: see direct.h
  int64_t slot_bytes;   // a multiple of 128
  int64_t slice_bytes;  // what one slot should carry: small enough that several are on their way
  bool shared;          // all ranks see one memory: a kResult message is written once, into the writer's arena
  int channel = 0, channels = 1;  // this schedule's share of a call: the slices channel, channel + channels, ...
  int contributors = 0;           // whom a mean divides by; 0: nranks
};

}  // namespace dpcomm
