// Flags, slots and headers. A Lanes is whatever plays one rank: a CTA on the GPU, a thread (in tests: several) on a
// CPU.
//   vectors<Codec>                vectors of kVec elements that one lane moves at once; where the codec scales,
//                                 kGroup / (vectors * kVec) lanes share a group
//   puts_off                      whether settling a group of a scaled codec after the sum of the next one pays
//   index(), count()              which lane this is, and of how many
//   sync(ok)                      all lanes meet; true if ok on all, and what each wrote before is visible to each
//   wait(flag, value, peer)       this lane returns once the peer's flag has reached value (acquire); false when it
//   never
//                                 will
//   post(flag, value)             this lane publishes value (release)
//   group_max(m)                  maximum over the lanes that share a group
//   push(p, v)                    writes a vector that a peer will read
//   phase(p), nonfinite_group()   statistics
#pragma once
#include "chunks.h"

namespace dpcomm {

enum class Phase : uint8_t { put, reduce, get, wait };
constexpr int kPhases = 4;

inline namespace DPCOMM_ISA {

// Right as long as the two sides are less than 2^31 messages apart.
DPCOMM_HD bool reached(uint32_t flag, uint32_t value) { return static_cast<int32_t>(flag - value) >= 0; }

// A message in a slot: all codes, then (if the codec scales) one exponent a group. Always whole groups, zero-filled.
template <class Codec>
struct Message {
  char* base;
  int64_t groups;
  DPCOMM_HD typename Codec::Code* codes(int64_t at) const { return reinterpret_cast<typename Codec::Code*>(base) + at; }
  DPCOMM_HD int8_t* exponent(int64_t at) const {
    return reinterpret_cast<int8_t*>(base + groups * kGroup * sizeof(typename Codec::Code)) + at / kGroup;
  }
};

// Whose mailbox holds what `writer` has for `reader`: his who polls it, except for results in shared memory, which are
// written once and lie with their writer. A rank has slots for itself, too.
DPCOMM_HD char* slot(const Team& t, Stream stream, int writer, int reader, uint32_t number) {
  const int home = t.shared && stream == kResult ? writer : reader;
  const int64_t results = t.shared ? 1 : t.nranks;
  const int64_t lane = stream == kGiven    ? writer
                       : stream == kResult ? t.nranks + (t.shared ? 0 : writer)
                                           : t.nranks + results;
  char* slots = reinterpret_cast<char*>(t.box[home]) + sizeof(Mailbox);
  return slots + (lane * t.slots + int64_t(number & uint32_t(t.slots - 1))) * t.slot_bytes;
}
// Bytes of a mailbox and its slots.
DPCOMM_HD int64_t arena_bytes(int nranks, int slots, int64_t slot_bytes, bool shared) {
  return static_cast<int64_t>(sizeof(Mailbox)) + (nranks + (shared ? 1 : nranks) + 1) * int64_t{slots} * slot_bytes;
}

// Every lane returns once every peer's flag has reached `value`: what they wrote before is visible to all lanes then.
template <class Lanes>
DPCOMM_HD bool wait_peers(Lanes& lanes, const Team& t, Stream stream, uint32_t value) {
  bool ok = true;
  for (int r = lanes.index(); r < t.nranks; r += lanes.count())
    if (r != t.rank) ok = lanes.wait(&t.box[t.rank]->arrived[stream][r], value, r) && ok;
  return lanes.sync(ok);
}
// Once every lane is here: tells every peer that I have written `value` messages of this stream.
template <class Lanes>
DPCOMM_HD void post_peers(Lanes& lanes, const Team& t, Stream stream, uint32_t value) {
  lanes.sync(true);
  for (int r = lanes.index(); r < t.nranks; r += lanes.count())
    if (r != t.rank) lanes.post(&t.box[r]->arrived[stream][t.rank], value);
}

// The same between me and one peer.
template <class Lanes>
DPCOMM_HD bool wait_peer(Lanes& lanes, const Team& t, Stream stream, int peer, uint32_t value) {
  return lanes.sync(lanes.index() != 0 || lanes.wait(&t.box[t.rank]->arrived[stream][peer], value, peer));
}
template <class Lanes>
DPCOMM_HD void post_peer(Lanes& lanes, const Team& t, Stream stream, int peer, uint32_t value) {
  lanes.sync(true);
  if (lanes.index() == 0) lanes.post(&t.box[peer]->arrived[stream][t.rank], value);
}

// Begins a call: shows my header to every peer.
template <class Lanes>
DPCOMM_HD void announce(Lanes& lanes, const Team& t, const Header& mine) {
  const int page = int(t.box[t.rank]->sent[kHeader] % 2);
  for (int r = lanes.index(); r < t.nranks; r += lanes.count())
    if (!t.shared || r == t.rank) t.box[r]->header[page][t.rank] = mine;  // mine stays with me too: for messages
  post_peers(lanes, t, kHeader, t.box[t.rank]->sent[kHeader] + 1);        // (0)
}
// Compares all headers with mine; before anything is written to user memory. False: the ranks disagree, and the failure
// word says how, or a peer did not come.
template <class Lanes>
DPCOMM_HD bool agree(Lanes& lanes, const Team& t, const Header& mine) {
  if (!wait_peers(lanes, t, kHeader, t.box[t.rank]->sent[kHeader] + 1)) return false;  // pairs with (0)
  bool ok = true;
  const int page = int(t.box[t.rank]->sent[kHeader] % 2);
  for (int r = lanes.index(); r < t.nranks; r += lanes.count()) {
    if (r == t.rank) continue;
    const Header& theirs = t.box[t.shared ? r : t.rank]->header[page][r];
    const Field field = difference(mine, theirs);
    if (field == Field::none) continue;
    ok = false;
    if (t.channel != 0) continue;  // all channels of a rank say the same: the first one tells
    const int low = r < t.rank ? r : t.rank, high = r < t.rank ? t.rank : r;
    set_once(t.failure, pack({Cause::mismatch, uint8_t(low), uint8_t(high), field, uint32_t(mine.sequence)}));
  }
  return lanes.sync(ok);
}
// Messages of one call.
struct Sent {
  uint32_t given = 0, results = 0, ring = 0;
};

// Ends a call that succeeded: counts its messages, once every lane has read the counters.
template <class Lanes>
DPCOMM_HD bool conclude(Lanes& lanes, const Team& t, const Sent& call) {
  lanes.sync(true);
  if (lanes.index() == 0) {
    uint32_t* const sent = t.box[t.rank]->sent;
    sent[kGiven] += call.given;
    sent[kResult] += call.results;
    sent[kRing] += call.ring;
    sent[kDrained] += call.ring;
    sent[kHeader] += 1;
  }
  return lanes.sync(true);
}

}  // namespace DPCOMM_ISA
}  // namespace dpcomm
