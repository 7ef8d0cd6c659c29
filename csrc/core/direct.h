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
    for (int step = 1; step < t.nranks + Codec::scaled; ++step)  // my neighbour first: not all at rank 0 at once
      give_to((t.rank + step) % t.nranks, slice, number);        // myself last, if at all
    post_peers(lanes, t, kGiven, number + 1);                    // (1)
  }
  DPCOMM_HD void give_to(int owner, int64_t slice, uint32_t number) {
    const Range range = chunks.range(slice, owner);
    put<Codec>(lanes, bucket, range, message(kGiven, t.rank, owner, number, range));
  }

  DPCOMM_HD bool arrived(int64_t slice) {
    return wait_peers(lanes, t, kGiven, given + uint32_t(slice) + 1);  // pairs with (1)
  }

  // One unit of my result: to every reader, and into user memory as they will decode it. `shared` is the message where
  // all read the same one, else only its number counts.
  template <class Values, class Memory>
  DPCOMM_HD void settle(const Message<Codec>& shared, Range range, uint32_t number, int64_t at,
                        const typename Codec::Scale& scale, const Values& values, const Memory& memory) {
    constexpr int vectors = Lanes::template vectors<Codec>;
    if (t.shared && Codec::scaled) {  // encoded once for both
      DPCOMM_UNROLL
      for (int i = 0; i < vectors; ++i) {
        const auto codes = Codec::encode(scale, values(i));
        lanes.push(shared.codes(at) + i * kVec, codes);
        memory.set(i, Codec::decode(scale, codes));
      }
      if (at % kGroup == 0) *shared.exponent(at) = Codec::to_wire(scale);
      return;
    }
    if (t.shared) push<Codec>(lanes, shared, at, scale, values);
    for (int r = 0; r < t.nranks && !t.shared; ++r)
      if (r != t.rank) push<Codec>(lanes, message(kResult, t.rank, r, number, range), at, scale, values);
    const Rounded<Codec, Values> adopted{values, scale};
    DPCOMM_UNROLL
    for (int i = 0; i < vectors; ++i) memory.set(i, adopted(i));
  }

  DPCOMM_HD void reduce(int64_t slice) {
    lanes.phase(Phase::reduce);
    const Range range = chunks.range(slice, t.rank);
    const uint32_t number = results + uint32_t(slice);
    const auto in = [&](int r) { return message(kGiven, r, t.rank, given + uint32_t(slice), range); };
    const auto shared = message(kResult, t.rank, (t.rank + 1) % t.nranks, number, range);  // any reader's
    const auto nranks = Codec::Element::divisor(contributors(t));
    // A scale is the end of a long chain of dependent operations. Lanes that put off settle a group only after the sum
    // of the next one, so that two chains overlap; the sum waits in user memory, if that holds it without rounding.
    using Element = typename Codec::Element;
    constexpr bool puts_off =
        Codec::scaled && Lanes::puts_off && std::is_same_v<typename Element::Stored, typename Element::Acc>;
    Memory<Element> before{};
    typename Codec::Scale scale_before{};
    int64_t at_before = -1;
    const auto settle_before = [&] {
      if (at_before >= 0) settle(shared, range, number, at_before, scale_before, before, before);
      at_before = -1;
    };
    each_memory<Codec, true>(lanes, bucket, range, [&](const auto& memory, int64_t at) {
      Total<Codec, Lanes> total;
      add_up<Codec>(t, op, nranks, memory, at, in, total);
      const auto scale = Codec::scale(lanes, total);
      if constexpr (puts_off) {
        if (memory.unit.count == kGroup) {  // a short group's memory is a copy that ends with this call
          DPCOMM_UNROLL
          for (int i = 0; i < Lanes::template vectors<Codec>; ++i) memory.set(i, total(i));
          settle_before();
          before = memory, scale_before = scale, at_before = at;
          return;
        }
      }
      settle(shared, range, number, at, scale, total, memory);
    });
    if constexpr (puts_off) settle_before();
    post_peers(lanes, t, kResult, number + 1);  // (2)
  }

  DPCOMM_HD bool take(int64_t slice) {
    const uint32_t number = results + uint32_t(slice);
    if (!wait_peers(lanes, t, kResult, number + 1)) return false;  // pairs with (2)
    lanes.phase(Phase::get);
    for (int step = 1; step < t.nranks; ++step) take_from((t.rank + step) % t.nranks, slice, number);
    return true;
  }
  DPCOMM_HD void take_from(int owner, int64_t slice, uint32_t number) {
    const Range range = chunks.range(slice, owner);
    get<Codec>(lanes, bucket, range, message(kResult, owner, t.rank, number, range));
  }
};

// Reduces the bucket over all ranks. False: it cannot be finished; the failure word or the caller's deadline says why.
template <class Codec, class Lanes>
DPCOMM_HD bool direct(Lanes& lanes, const Team& t, const Bucket& bucket, const Header& header) {
  const Mailbox& mine = *t.box[t.rank];
  const Chunks chunks = cut<Codec>(t, bucket, t.nranks);
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
  return conclude(lanes, t, {uint32_t(chunks.slices), uint32_t(chunks.slices), 0});
}

}  // namespace DPCOMM_ISA
}  // namespace dpcomm
