// What one CTA of the p2p kernel does: it plays one channel of one rank. On the GPU its lanes are threads; tests play
// it with host lanes.
#pragma once
#include "../core/all_reduce.h"
#include "../core/codec_fp16.h"
#include "../core/codec_none.h"
#include "device_wait.h"
#include "p2p_call.h"

namespace dpcomm {
inline namespace DPCOMM_ISA {

// After a failure the bucket holds NaNs, so that nobody takes a gradient that was not reduced for one that was. Whole
// numbers have no such value: theirs are undefined.
template <class Codec, class Lanes>
DPCOMM_HD void fill_with_nan(Lanes& lanes, const Bucket& bucket) {
  using Element = typename Codec::Element;
  if constexpr (Element::real)
    each_memory<Codec, true>(lanes, bucket, {0, bucket.groups}, [&](const auto& memory, int64_t) {
      DPCOMM_UNROLL
      for (int i = 0; i < Lanes::template vectors<Codec>; ++i) memory.set(i, Element::not_a_number());
    });
}

// The last CTA of a rank to leave: all others have stopped writing, so what it says and fills in is the end of the
// call.
template <class Codec, class Lanes>
DPCOMM_HD void leave(Lanes& lanes, const P2pCall& call, const P2pRank& me, const Bucket& bucket) {
  RankState& state = *me.state;
  lanes.sync(true);  // (6) every lane has written what it will write
  bool last = false;
  if (lanes.index() == 0) last = count_up(&state.left) + 1 == uint32_t(call.channels);  // pairs with (6)
  if (lanes.sync(!last)) return;
  const uint64_t failure = load_acquire(&state.failure);
  if (lanes.index() == 0) {
    state.left = 0;  // read again by the next launch on this stream
    me.status->nonfinite_groups = state.nonfinite_groups;
    if (failure != 0) store_release(&me.status->failure, failure);
  }
  if (failure != 0) fill_with_nan<Codec>(lanes, bucket);
}

// make(wait, nonfinite_groups) returns the lanes.
template <class Codec, Algorithm algorithm, class Make>
DPCOMM_HD void play_p2p(const P2pCall& call, int cta, Make make) {
  const P2pTeam& all = *call.team;
  const int local = cta / call.channels, channel = cta % call.channels;
  const P2pRank& me = all.ranks[local];
  const Team team{me.rank,
                  all.nranks,
                  me.box + channel * all.nranks,
                  &me.state->failure,
                  all.slots,
                  all.slot_bytes,
                  call.slice_bytes,
                  all.shared,
                  channel,
                  call.channels};
  const Bucket bucket{(call.segments ? call.segments : call.few) + local * call.count, call.count, call.groups};
  Mailbox& mine = *team.box[me.rank];
  Header header = call.header;
  header.sequence = mine.sequence + 1;
  auto lanes = make(DeviceWait{team.failure, all.first_cause, all.timeout_ns, uint32_t(header.sequence), me.rank},
                    &me.state->nonfinite_groups);
  // A call before this one may have failed; all lanes decide alike. What all_reduce() returns, the failure word says.
  if (lanes.sync(load_acquire(team.failure) == 0)) {
    if (lanes.index() == 0) mine.sequence = header.sequence;
    all_reduce_by<Codec, algorithm>(lanes, team, bucket, header);
  }
  leave<Codec>(lanes, call, me, bucket);
}

}  // namespace DPCOMM_ISA
}  // namespace dpcomm
