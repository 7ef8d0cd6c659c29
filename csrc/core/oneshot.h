// One shot, for small buckets: everyone sends everything to everyone and computes what the owner would have, the final
// encode and decode included, so its bits equal those of direct.
//
// Slots: before I write message m of stream kResult I have waited for every peer's message m-1 of this call, sent after
// it had read my m-2. At the start of a call a peer may still have to read my last two messages (the takes of a direct
// call). So three slots would do here, too.
#pragma once
#include "tile.h"

namespace dpcomm {
inline namespace DPCOMM_ISA {

template <class Codec, class Lanes>
struct Oneshot {
  Lanes& lanes;
  const Team& t;
  const Bucket& bucket;
  Op op;
  Chunks chunks;
  uint32_t results;  // messages of earlier calls

  DPCOMM_HD Message<Codec> message(int writer, int reader, int64_t slice) const {
    return {slot(t, kResult, writer, reader, results + uint32_t(slice)), chunks.range(slice, 0).groups};
  }

  DPCOMM_HD void give(int64_t slice) {
    lanes.phase(Phase::put);
    for (int r = 0; r < t.nranks; ++r)
      if (t.shared ? r == (t.rank + 1) % t.nranks
                   : Codec::scaled || r != t.rank)  // in shared memory once, for all readers
        put<Codec>(lanes, bucket, chunks.range(slice, 0), message(t.rank, r, slice));
    post_peers(lanes, t, kResult, results + uint32_t(slice) + 1);  // (3)
  }

  DPCOMM_HD bool arrived(int64_t slice) {
    return wait_peers(lanes, t, kResult, results + uint32_t(slice) + 1);  // pairs with (3)
  }

  DPCOMM_HD void reduce(int64_t slice) {
    lanes.phase(Phase::reduce);
    const auto in = [&](int r) { return message(r, t.rank, slice); };
    const auto nranks = Codec::Element::divisor(contributors(t));
    each_memory<Codec, true>(lanes, bucket, chunks.range(slice, 0), [&](const auto& memory, int64_t at) {
      Total<Codec, Lanes> total;
      add_up<Codec>(t, op, nranks, memory, at, in, total);
      const Rounded<Codec, Total<Codec, Lanes>> rounded{total, Codec::scale(lanes, total)};
      DPCOMM_UNROLL
      for (int i = 0; i < Lanes::template vectors<Codec>; ++i) memory.set(i, rounded(i));
    });
  }
};

// Reduces the bucket over all ranks; false as for direct.
template <class Codec, class Lanes>
DPCOMM_HD bool oneshot(Lanes& lanes, const Team& t, const Bucket& bucket, const Header& header) {
  const Chunks chunks = cut<Codec>(t, bucket, 1);
  Oneshot<Codec, Lanes> o{lanes, t, bucket, Op(header.op), chunks, t.box[t.rank]->sent[kResult]};
  announce(lanes, t, header);
  for (int64_t c = 0; c < chunks.slices; ++c) {
    o.give(c);
    if (c == 0 && !agree(lanes, t, header)) return false;  // nothing has been written to user memory yet
    if (!o.arrived(c)) return false;
    o.reduce(c);
  }
  return conclude(lanes, t, {0, uint32_t(chunks.slices), 0});
}

}  // namespace DPCOMM_ISA
}  // namespace dpcomm
