// Inside a host, around an all-reduce between hosts. Ranks that share memory own a shard of the bucket each; what hosts
// reduce among them is the sum of each shard over the ranks of the host, in its owner's user memory.
//
//   bucket  |---- shard 0 ----|---- shard 1 ----|---- shard 2 ---|     as many as the largest host has ranks
//   host of 3     rank 0            rank 1            rank 2
//   host of 2     rank 0            rank 1            rank 0           shard s: local rank s % ranks
//
//   gather   every rank gives the owner its values; the owner adds up in local rank order, into its user memory
//   spread   the owner shows its user memory to all; the others adopt it
//
// A round of either is the part of all shards that hosts exchange at a time (slice `slice` for host `part`), in as many
// messages as it takes. All ranks of a host play the same rounds in the same order. Four slots do without credits, as
// in direct.h: I give (or show) message k after I have read everyone's k-2, sent after its writer had read my k-4.
#pragma once
#include "shards.h"
#include "tile.h"

namespace dpcomm {
inline namespace DPCOMM_ISA {

// What the ranks of a host have for a range, added up in local rank order, into user memory. in(r): what r has given.
template <class Codec, class Lanes, class Messages>
DPCOMM_HD void add_here(Lanes& lanes, const Team& t, const Bucket& bucket, Op op, Range range, const Messages& in) {
  const auto divisor = Codec::Element::divisor(1);  // a mean is divided between hosts
  each_memory<Codec, true>(lanes, bucket, range, [&](const auto& memory, int64_t at) {
    Total<Codec, Lanes> total;
    add_up<Codec>(t, op, divisor, memory, at, in, total);
    DPCOMM_UNROLL
    for (int i = 0; i < Lanes::template vectors<Codec>; ++i) memory.set(i, total(i));
  });
}

template <class Codec, class Lanes>
struct Local {
  Lanes& lanes;
  const Team& t;  // of the host; `shared`
  const Bucket& bucket;
  Op op;
  const Shards& shards;
  int64_t slice;
  int part;
  uint32_t given, results;  // messages of earlier rounds

  DPCOMM_HD Range range(int owner, int64_t message) const { return shards.range(owner, slice, part, message); }
  DPCOMM_HD Message<Codec> message(Stream stream, int writer, int reader, uint32_t number, Range range) const {
    return {slot(t, stream, writer, reader, number), range.groups};
  }

  DPCOMM_HD void give(int64_t k) {
    lanes.phase(Phase::put);
    const uint32_t number = given + uint32_t(k);
    for (int step = 1; step < t.nranks + Codec::scaled; ++step) {
      const int owner = (t.rank + step) % t.nranks;
      const Range r = range(owner, k);
      put<Codec>(lanes, bucket, r, message(kGiven, t.rank, owner, number, r));
    }
    post_peers(lanes, t, kGiven, number + 1);  // (6)
  }

  DPCOMM_HD bool add(int64_t k) {
    const uint32_t number = given + uint32_t(k);
    if (!wait_peers(lanes, t, kGiven, number + 1)) return false;  // pairs with (6)
    lanes.phase(Phase::reduce);
    const Range mine = range(t.rank, k);
    const auto in = [&](int r) { return message(kGiven, r, t.rank, number, mine); };
    add_here<Codec>(lanes, t, bucket, op, mine, in);
    return true;
  }

  DPCOMM_HD void show(int64_t k) {
    lanes.phase(Phase::put);
    const uint32_t number = results + uint32_t(k);
    const Range mine = range(t.rank, k);
    const auto out = message(kResult, t.rank, t.rank, number, mine);
    put<Codec>(lanes, bucket, mine, out);
    if (Codec::scaled) {  // as all others will decode it
      lanes.sync(true);
      get<Codec>(lanes, bucket, mine, out);
    }
    post_peers(lanes, t, kResult, number + 1);  // (7)
  }

  DPCOMM_HD bool adopt(int64_t k) {
    const uint32_t number = results + uint32_t(k);
    if (!wait_peers(lanes, t, kResult, number + 1)) return false;  // pairs with (7)
    lanes.phase(Phase::get);
    for (int step = 1; step < t.nranks; ++step) {
      const int owner = (t.rank + step) % t.nranks;
      const Range r = range(owner, k);
      get<Codec>(lanes, bucket, r, message(kResult, owner, t.rank, number, r));
    }
    return true;
  }
};

// One round. False: it cannot be finished; the failure word or the caller's deadline says why.
template <class Codec, class Lanes>
DPCOMM_HD bool local_round(Lanes& lanes, const Team& t, const Bucket& bucket, Op op, const Shards& shards,
                           LocalTurn turn, int64_t slice, int part) {
  const Mailbox& mine = *t.box[t.rank];
  Local<Codec, Lanes> local{lanes, t, bucket, op, shards, slice, part, mine.sent[kGiven], mine.sent[kResult]};
  const int64_t messages = shards.messages();
  const bool gathers = turn == LocalTurn::gather;
  for (int64_t k = 0; k <= messages; ++k) {  // a rank has work while its message is awaited
    if (k < messages) gathers ? local.give(k) : local.show(k);
    if (k > 0 && !(gathers ? local.add(k - 1) : local.adopt(k - 1))) return false;
  }
  return conclude(lanes, t, {gathers ? uint32_t(messages) : 0, gathers ? 0 : uint32_t(messages), 0});
}

}  // namespace DPCOMM_ISA
}  // namespace dpcomm
