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
DPCOMM_HD bool oneshot(Lanes& lanes, const Team& t, const Bucket& bucket, const Header& header) {
  const Op op = Op(header.op);
  const Chunks chunks = cut<Codec>(t, bucket, 1);
  const uint32_t base = t.box[t.rank]->sent[kResult];
  announce(lanes, t, header);
  for (int64_t c = 0; c < chunks.slices; ++c) {
    const uint32_t number = base + uint32_t(c);
    const Range range = chunks.range(c, 0);
    lanes.phase(Phase::put);
    for (int r = 0; r < t.nranks; ++r)
      if (t.shared ? r == (t.rank + 1) % t.nranks
                   : Codec::scaled || r != t.rank)  // in shared memory once, for all readers
        put<Codec>(lanes, bucket, range, Message<Codec>{slot(t, kResult, t.rank, r, number), range.groups});
    post_peers(lanes, t, kResult, number + 1);                     // (3)
    if (c == 0 && !agree(lanes, t, header)) return false;          // nothing has been written to user memory yet
    if (!wait_peers(lanes, t, kResult, number + 1)) return false;  // pairs with (3)
    lanes.phase(Phase::reduce);
    const auto in = [&](int r) { return Message<Codec>{slot(t, kResult, r, t.rank, number), range.groups}; };
    const auto nranks = Codec::Element::divisor(t.nranks);
    each_memory<Codec, true>(lanes, bucket, range, [&](const auto& memory, int64_t at) {
      Total<Codec, Lanes> total;
      add_up<Codec>(t, op, nranks, memory, at, in, total);
      const Rounded<Codec, Total<Codec, Lanes>> rounded{total, Codec::scale(lanes, total)};
      DPCOMM_UNROLL
      for (int i = 0; i < Lanes::template vectors<Codec>; ++i) memory.set(i, rounded(i));
    });
  }
  return conclude(lanes, t, {0, uint32_t(chunks.slices), 0});
}

}  // namespace DPCOMM_ISA
}  // namespace dpcomm
