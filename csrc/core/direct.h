// Two shots. Every rank gives its contribution to chunk p to rank p; the owner adds all contributions in rank order,
// encodes once, adopts the decoded value itself and sends the same bytes to all.
//
//   slice     c      c-1      c-2         three slices are on their way; while one phase waits for peers
//   phase   give   reduce    take         there is work in the other two
//
// There are no credits: the data flags already say that a slot is free. A slot is written again `slots` messages later,
// and three would do (four, as a power of two):
//   * I give c after I took c-3, which its owner sent after it had read my c-3: my slots up to c-3 there are free.
//   * I send result c-1 after every peer gave c-1, which it did after it took c-4: my slots up to c-4 are free.
// Every call ends with everything taken on my side, and my first result waits for every peer's first gift, which it
// gives after it took all of the call before: so the argument holds across calls. oneshot.h argues for itself.
#pragma once
#include "tile.h"

namespace dpcomm {
inline namespace DPCOMM_ISA {

template <class Codec, class Lanes>
struct Direct {
  Lanes& lanes;
  const Team& t;
  const Bucket& bucket;
  Op op;
  Chunks chunks;
  uint32_t given, results;  // messages of earlier calls

  DPCOMM_HD Message<Codec> message(Stream stream, int writer, int reader, uint32_t number, Range range) const {
    return {slot(t, stream, writer, reader, number), range.groups};
  }

  DPCOMM_HD void give(int64_t slice) {
    lanes.phase(Phase::put);
    const uint32_t number = given + uint32_t(slice);
    for (int step = 1; step < t.nranks + Codec::scaled; ++step) {  // my neighbour first: not all at rank 0 at once
      const int owner = (t.rank + step) % t.nranks;                // myself last, if at all
      const Range range = chunks.range(slice, owner);
      put<Codec>(lanes, bucket, range, message(kGiven, t.rank, owner, number, range));
    }
    post_peers(lanes, t, kGiven, number + 1);  // (1)
  }

  DPCOMM_HD bool arrived(int64_t slice) {
    return wait_peers(lanes, t, kGiven, given + uint32_t(slice) + 1);  // pairs with (1)
  }

  DPCOMM_HD void reduce(int64_t slice) {
    lanes.phase(Phase::reduce);
    const Range range = chunks.range(slice, t.rank);
    const uint32_t number = results + uint32_t(slice);
    const auto in = [&](int r) { return message(kGiven, r, t.rank, given + uint32_t(slice), range); };
    const int any_reader = (t.rank + 1) % t.nranks;  // in shared memory all read the same slot
    const auto out = message(kResult, t.rank, any_reader, number, range);
    const auto nranks = Codec::Element::divisor(t.nranks);
    each_memory<Codec, true>(lanes, bucket, range, [&](const auto& memory, int64_t at) {
      Total<Codec, Lanes> total;
      add_up<Codec>(t, op, nranks, memory, at, in, total);
      const auto scale = Codec::scale(lanes, total);
      if (t.shared)
        push<Codec>(lanes, out, at, scale, total);
      else
        for (int r = 0; r < t.nranks; ++r)
          if (r != t.rank) push<Codec>(lanes, message(kResult, t.rank, r, number, range), at, scale, total);
      const Rounded<Codec, Total<Codec, Lanes>> adopted{total, scale};
      DPCOMM_UNROLL
      for (int i = 0; i < Lanes::template vectors<Codec>; ++i) memory.set(i, adopted(i));
    });
    post_peers(lanes, t, kResult, number + 1);  // (2)
  }

  DPCOMM_HD bool take(int64_t slice) {
    const uint32_t number = results + uint32_t(slice);
    if (!wait_peers(lanes, t, kResult, number + 1)) return false;  // pairs with (2)
    lanes.phase(Phase::get);
    for (int step = 1; step < t.nranks; ++step) {
      const int owner = (t.rank + step) % t.nranks;
      const Range range = chunks.range(slice, owner);
      get<Codec>(lanes, bucket, range, message(kResult, owner, t.rank, number, range));
    }
    return true;
  }
};

// Reduces the bucket over all ranks. False: it cannot be finished; the failure word or the caller's deadline says why.
template <class Codec, class Lanes>
DPCOMM_HD bool direct(Lanes& lanes, const Team& t, const Bucket& bucket, const Header& header) {
  const Mailbox& mine = *t.box[t.rank];
  const Chunks chunks = Chunks::cut(bucket.groups, t.nranks, most_groups<Codec>(t.slot_bytes, t.slice_bytes));
  Direct<Codec, Lanes> d{lanes, t, bucket, Op(header.op), chunks, mine.sent[kGiven], mine.sent[kResult]};
  announce(lanes, t, header);
  for (int64_t c = 0; c < chunks.slices + 2; ++c) {
    if (c < chunks.slices) d.give(c);
    if (c >= 1 && c <= chunks.slices) {
      if (c == 1 && !agree(lanes, t, header)) return false;  // nothing has been written to user memory yet
      if (!d.arrived(c - 1)) return false;
      d.reduce(c - 1);
    }
    if (c >= 2 && !d.take(c - 2)) return false;
  }
  return conclude(lanes, t, uint32_t(chunks.slices), uint32_t(chunks.slices));
}

}  // namespace DPCOMM_ISA
}  // namespace dpcomm
