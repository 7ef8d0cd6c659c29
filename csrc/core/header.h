// What a rank says of its call before anything is believed, and the record of the first failure.
//
// Every call has a header: it lies at a fixed place per rank (two of them, in turns: a peer may be one call
// ahead), has a flag of its own, whatever the algorithm, and is compared by every rank with all others
// before it writes user memory. It travels beside the first messages, so it costs no round trip.
#pragma once
#include "portable.h"
#include "types.h"

namespace dpcomm {

struct alignas(64) Header {
  uint64_t sequence;  // calls of this communicator so far, this one included
  int64_t numel;      // elements over all segments
  uint64_t layout;    // hash of the segments' counts
  int32_t tensors;    // segments
  int32_t bucket;     // DDP's bucket index, -1 outside
  uint8_t op, dtype, codec, algorithm;
};
static_assert(sizeof(Header) == 64);

// What ranks can disagree in. difference() reports the most telling one.
enum class Field : uint8_t { none, sequence, bucket, dtype, op, codec, algorithm, numel, tensors, layout };

// One word, written once by compare-and-swap: the first cause, the same for all ranks.
//   bits 0-7 cause   8-15 rank   16-23 other rank   24-31 field   32-63 low half of the sequence number
enum class Cause : uint8_t { none, mismatch, peer_closed, peer_died, timeout, aborted, internal };

struct Failure {
  Cause cause;
  uint8_t rank;   // who differs, died, waited or gave up
  uint8_t other;  // mismatch: from whom; time-out on a GPU: who did not come
  Field field;    // mismatch: in what
  uint32_t sequence;
};

inline namespace DPCOMM_ISA {

DPCOMM_HD uint64_t pack(const Failure& f) {
  return uint64_t(f.cause) | uint64_t(f.rank) << 8 | uint64_t(f.other) << 16 | uint64_t(f.field) << 24 |
         uint64_t(f.sequence) << 32;
}
DPCOMM_HD Failure unpack(uint64_t word) {
  return {Cause(word & 0xff), uint8_t(word >> 8), uint8_t(word >> 16), Field(word >> 24 & 0xff), uint32_t(word >> 32)};
}

DPCOMM_HD Field difference(const Header& a, const Header& b) {
  if (a.sequence != b.sequence) return Field::sequence;
  if (a.bucket != b.bucket) return Field::bucket;
  if (a.dtype != b.dtype) return Field::dtype;
  if (a.op != b.op) return Field::op;
  if (a.codec != b.codec) return Field::codec;
  if (a.numel != b.numel) return Field::numel;
  if (a.tensors != b.tensors) return Field::tensors;
  if (a.layout != b.layout) return Field::layout;
  return a.algorithm != b.algorithm ? Field::algorithm : Field::none;  // last: what auto takes follows from the rest
}

}  // namespace DPCOMM_ISA
}  // namespace dpcomm
