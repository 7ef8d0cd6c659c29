// The algorithms one step at a time, for engines whose messages something else carries: a step reads and writes user
// memory and slots, and leaves flags and headers alone. Its Lanes do not wait and do not post.
//
//   direct    give to each owner, reduce, take from each owner       of one slice
//   oneshot   give to all (one message), reduce
//   ring      turn 0, 1, ...
#pragma once
#include "all_reduce.h"

namespace dpcomm {

struct Step {
  enum class Kind : uint8_t { give, reduce, take, turn };
  Kind kind;
  int peer;  // give, take of direct: the owner of the chunk
  int64_t slice;
  int turn;             // of a ring
  uint32_t sent, read;  // of a ring: messages of this call so far
};

inline namespace DPCOMM_ISA {

template <class Codec, class Lanes>
DPCOMM_HD void direct_step(Lanes& lanes, const Team& t, const Bucket& bucket, const Header& header, const Step& step) {
  Direct<Codec, Lanes> d{lanes, t, bucket, Op(header.op), cut<Codec>(t, bucket, t.nranks), 0, 0};
  switch (step.kind) {
    case Step::Kind::give:
      lanes.phase(Phase::put);
      return d.give_to(step.peer, step.slice, uint32_t(step.slice));
    case Step::Kind::reduce:
      return d.reduce(step.slice);
    case Step::Kind::take:
      lanes.phase(Phase::get);
      return d.take_from(step.peer, step.slice, uint32_t(step.slice));
    case Step::Kind::turn:
      break;  // of a ring only
  }
}

template <class Codec, class Lanes>
DPCOMM_HD void oneshot_step(Lanes& lanes, const Team& t, const Bucket& bucket, const Header& header, const Step& step) {
  Oneshot<Codec, Lanes> o{lanes, t, bucket, Op(header.op), cut<Codec>(t, bucket, 1), 0};
  if (step.kind == Step::Kind::give) o.give(step.slice);
  if (step.kind == Step::Kind::reduce) o.reduce(step.slice);
}

template <class Codec, class Lanes>
DPCOMM_HD void ring_step(Lanes& lanes, const Team& t, const Bucket& bucket, const Header& header, const Step& step) {
  Ring<Codec, Lanes> r{lanes, t, bucket, Op(header.op), cut<Codec>(t, bucket, t.nranks), step.sent, step.read};
  r.step(step.slice, step.turn);
}

// Where the algorithm is known at run time only.
template <class Codec, class Lanes>
DPCOMM_HD void all_reduce_step(Lanes& lanes, const Team& t, const Bucket& bucket, const Header& header,
                               const Step& step) {
  switch (Algorithm(header.algorithm)) {
    case Algorithm::direct:
      return direct_step<Codec>(lanes, t, bucket, header, step);
    case Algorithm::oneshot:
      return oneshot_step<Codec>(lanes, t, bucket, header, step);
    case Algorithm::ring:
      return ring_step<Codec>(lanes, t, bucket, header, step);
    case Algorithm::automatic:
    case Algorithm::native:
    case Algorithm::two_level:
      break;  // the engine has chosen
  }
}

}  // namespace DPCOMM_ISA
}  // namespace dpcomm
