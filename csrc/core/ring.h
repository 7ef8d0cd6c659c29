// Ring: every rank talks to its neighbours only. Chunk c starts at rank c; each rank on the way adds its own values and
// encodes again, the last one has the result, whose bytes then go round untouched.
//
//   turn        0           1 .. N-1                      N .. 2N-2
//   rank r      give x_r    add to what the previous      decode what the previous rank sent, pass it on
//   for chunk   r           rank sent, chunk r - turn     chunk r - turn
//
// At turn N-1 the sum is complete: it is divided, encoded, and its rank adopts what it decodes to. At turn 2N-2 nothing
// is passed on. Slices go in windows: a turn for all slices of a window, then the next turn, so that a rank has work
// while its neighbours have theirs.
//
// A slot is free once the next rank has drained it, and says so: unlike in direct.h nothing else that I receive proves
// it. All ranks do the same actions in the same order; sending message n waits for the next rank to have read n -
// slots, reading it for the previous rank to have sent it. Both come earlier in that order as long as a window is
// smaller than the slots: the rank that is furthest behind can always go on.
#pragma once
#include "tile.h"

namespace dpcomm {
inline namespace DPCOMM_ISA {

template <class Codec, class Lanes>
struct Ring {
  Lanes& lanes;
  const Team& t;
  const Bucket& bucket;
  Op op;
  Chunks chunks;
  uint32_t sent, read;  // messages so far, those of earlier calls included

  DPCOMM_HD int next() const { return t.rank + 1 < t.nranks ? t.rank + 1 : 0; }
  DPCOMM_HD int previous() const { return t.rank > 0 ? t.rank - 1 : t.nranks - 1; }

  DPCOMM_HD Message<Codec> outgoing(Range range) const { return {slot(t, kRing, t.rank, next(), sent), range.groups}; }
  DPCOMM_HD Message<Codec> incoming(Range range) const {
    return {slot(t, kRing, previous(), t.rank, read), range.groups};
  }

  DPCOMM_HD bool wait_for_room() { return wait_peer(lanes, t, kDrained, next(), sent + 1 - uint32_t(t.slots)); }  // (5)
  DPCOMM_HD bool wait_for_message() { return wait_peer(lanes, t, kRing, previous(), read + 1); }  // pairs with (4)
  DPCOMM_HD void post() { post_peer(lanes, t, kRing, next(), ++sent); }                           // (4)
  DPCOMM_HD void drained() { post_peer(lanes, t, kDrained, previous(), ++read); }                 // pairs with (5)

  DPCOMM_HD bool step(int64_t slice, int turn) {
    const int chunk = (t.rank - turn + 2 * t.nranks) % t.nranks;
    const Range range = chunks.range(slice, chunk);
    const bool sends = turn < 2 * t.nranks - 2;
    if (turn > 0 && !wait_for_message()) return false;
    if (sends && !wait_for_room()) return false;
    if (turn == 0) {
      lanes.phase(Phase::put);
      put<Codec>(lanes, bucket, range, outgoing(range));
    } else if (turn < t.nranks - 1) {
      add<false>(range);
    } else if (turn == t.nranks - 1) {
      add<true>(range);
    } else {
      forward(range, sends);
    }
    if (sends) post();
    if (turn > 0) drained();
    return true;
  }

 private:
  // One pass: decode, add my values, encode for the next rank. `last`: the sum is complete.
  template <bool last>
  DPCOMM_HD void add(Range range) {
    lanes.phase(Phase::reduce);
    const auto in = incoming(range), out = outgoing(range);
    const auto nranks = Codec::Element::divisor(contributors(t));
    each_memory<Codec, last>(lanes, bucket, range, [&](const auto& memory, int64_t at) {
      Total<Codec, Lanes> total;
      total.start(Incoming<Codec>(in, at));
      total.fold(op, memory);
      if constexpr (last) total.finish(op, nranks);
      const auto scale = Codec::scale(lanes, total);
      push<Codec>(lanes, out, at, scale, total);
      if constexpr (last) {
        const Rounded<Codec, Total<Codec, Lanes>> adopted{total, scale};
        DPCOMM_UNROLL
        for (int i = 0; i < Lanes::template vectors<Codec>; ++i) memory.set(i, adopted(i));
      }
    });
  }

  DPCOMM_HD void forward(Range range, bool sends) {
    lanes.phase(Phase::get);
    const auto in = incoming(range), out = outgoing(range);
    each_memory<Codec, true>(lanes, bucket, range, [&](const auto& memory, int64_t at) {
      const Incoming<Codec> values(in, at);
      DPCOMM_UNROLL
      for (int i = 0; i < Lanes::template vectors<Codec>; ++i) {
        const auto codes = load(values.codes + i * kVec);
        if (sends) lanes.push(out.codes(at) + i * kVec, codes);
        memory.set(i, Codec::decode(values.scale, codes));
      }
      if (Codec::scaled && sends && at % kGroup == 0) *out.exponent(at) = *in.exponent(at);
    });
  }
};

// Reduces the bucket over all ranks; false as for direct.
template <class Codec, class Lanes>
DPCOMM_HD bool ring(Lanes& lanes, const Team& t, const Bucket& bucket, const Header& header) {
  const Mailbox& mine = *t.box[t.rank];
  const Chunks chunks = cut<Codec>(t, bucket, t.nranks);
  Ring<Codec, Lanes> r{lanes, t, bucket, Op(header.op), chunks, mine.sent[kRing], mine.sent[kDrained]};
  announce(lanes, t, header);
  const int turns = t.nranks == 1 ? 0 : 2 * t.nranks - 1;
  const int64_t window = t.slots / 2;
  for (int64_t first = 0; first < chunks.slices; first += window)
    for (int turn = 0; turn < turns; ++turn) {
      // User memory is written from turn N-1 on, which is not before turn 1.
      if (first == 0 && turn == 1 && !agree(lanes, t, header)) return false;
      for (int64_t c = first; c < first + window && c < chunks.slices; ++c)
        if (!r.step(c, turn)) return false;
    }
  return conclude(lanes, t, {0, 0, r.sent - mine.sent[kRing]});
}

}  // namespace DPCOMM_ISA
}  // namespace dpcomm
