// What happens to one lane's elements: from user memory into a message, from messages into a sum, back into user
// memory. No flags here; no thread, no CTA.
#pragma once
#include "protocol.h"

namespace dpcomm {
inline namespace DPCOMM_ISA {

DPCOMM_HD int contributors(const Team& t) { return t.contributors > 0 ? t.contributors : t.nranks; }

// A lane's elements in user memory, as accumulators. The end of a segment reads as zeros and is not written.
template <class Element>
struct Memory {
  Unit<typename Element::Stored> unit;
  bool whole;
  DPCOMM_HD Vec<typename Element::Acc> operator()(int i) const {
    if (kVecAlign == 1 || whole) return Element::widen(load(unit.x + i * kVec));
    return Element::widen(load_some(unit.x + i * kVec, unit.count - i * kVec));
  }
  DPCOMM_HD void set(int i, const Vec<typename Element::Acc>& v) const {
    if (kVecAlign == 1 || whole) return store(unit.x + i * kVec, Element::narrow(v));
    store_some(unit.x + i * kVec, Element::narrow(v), unit.count - i * kVec);
  }
};

// The same share of a message.
template <class Codec>
struct Incoming {
  const typename Codec::Code* codes;
  typename Codec::Scale scale;
  DPCOMM_HD Incoming(const Message<Codec>& m, int64_t at)
      : codes(m.codes(at)), scale(Codec::from_wire(Codec::scaled ? *m.exponent(at) : int8_t{0})) {}
  DPCOMM_HD Vec<typename Codec::Acc> operator()(int i) const { return Codec::decode(scale, load(codes + i * kVec)); }
};

// Values as they come back from the wire: a codec that loses bits loses them here too, else replicas would differ.
template <class Codec, class Values>
struct Rounded {
  const Values& values;
  typename Codec::Scale scale;
  DPCOMM_HD Vec<typename Codec::Acc> operator()(int i) const {
    if constexpr (!Codec::scaled) return values(i);
    return Codec::decode(scale, Codec::encode(scale, values(i)));
  }
};

// Accumulators of one lane: registers, when everything around is inlined and unrolled.
template <class Codec, class Lanes>
struct Total {
  using Element = typename Codec::Element;
  static constexpr int vectors = Lanes::template vectors<Codec>;
  Vec<typename Codec::Acc> at[vectors];

  DPCOMM_HD const auto& operator()(int i) const { return at[i]; }

  template <class F>
  DPCOMM_HD void each(F f) {
    DPCOMM_UNROLL
    for (int i = 0; i < vectors; ++i) at[i] = f(i, at[i]);
  }
  template <class Values>
  DPCOMM_HD void start(const Values& v) {
    each([&](int i, const auto&) { return v(i); });
  }
  template <class Values>
  DPCOMM_HD void fold(Op op, const Values& v) {
    if constexpr (Codec::scaled) return each([&](int i, const auto& t) { return Element::plus(t, v(i)); });
    switch (op) {
      case Op::sum:
      case Op::mean:
        return each([&](int i, const auto& t) { return Element::plus(t, v(i)); });
      case Op::min:
        return each([&](int i, const auto& t) { return Element::least(t, v(i)); });
      case Op::max:
        return each([&](int i, const auto& t) { return Element::most(t, v(i)); });
    }
  }
  DPCOMM_HD void finish(Op op, const typename Element::Divisor& nranks) {
    if constexpr (Element::real) {
      if (op == Op::mean) each([&](int, const auto& t) { return Element::divided(t, nranks); });
      if constexpr (!Codec::scaled) each([](int, const auto& t) { return Element::canonical(t); });
    }
  }
};

// Calls body(memory, at) for each unit of this lane. Where partial vectors are dear (host), the end of a segment is
// worked on in a padded copy, so that body exists once.
template <class Codec, bool writes, class Lanes, class Body>
DPCOMM_HD void each_memory(Lanes& lanes, const Bucket& bucket, Range range, Body body) {
  using T = typename Codec::Element::Stored;
  constexpr int width = Lanes::template vectors<Codec> * kVec;
  each_unit<T, width>(lanes, bucket, range, [&](Unit<T> unit, bool whole) {
    if constexpr (kVecAlign > 1) return body(Memory<typename Codec::Element>{unit, whole}, unit.at);
    alignas(64) T padded[width];
    T* const x = unit.x;
    if (!whole) {
      memcpy(padded, x, unit.count * sizeof(T));
      memset(padded + unit.count, 0, (width - unit.count) * sizeof(T));
      unit.x = padded;
    }
    body(Memory<typename Codec::Element>{unit, true}, unit.at);
    if (writes && !whole) memcpy(x, padded, unit.count * sizeof(T));
  });
}

// One pack of values into a message.
template <class Codec, class Lanes, class Values>
DPCOMM_HD void push(Lanes& lanes, const Message<Codec>& m, int64_t at, const typename Codec::Scale& scale,
                    const Values& v) {
  DPCOMM_UNROLL
  for (int i = 0; i < Lanes::template vectors<Codec>; ++i)
    lanes.push(m.codes(at) + i * kVec, Codec::encode(scale, v(i)));
  if (Codec::scaled && at % kGroup == 0) *m.exponent(at) = Codec::to_wire(scale);
}

// My contribution to a range of groups, encoded into a message.
template <class Codec, class Lanes>
DPCOMM_HD void put(Lanes& lanes, const Bucket& bucket, Range range, const Message<Codec>& out) {
  each_memory<Codec, false>(lanes, bucket, range, [&](const auto& memory, int64_t at) {
    // A lane with one vector reads it once; one that holds a group would keep it in more registers than there are.
    if constexpr (Codec::scaled && Lanes::template vectors<Codec> == 1) {
      Total<Codec, Lanes> values;
      values.start(memory);
      push<Codec>(lanes, out, at, Codec::scale(lanes, values), values);
    } else {
      push<Codec>(lanes, out, at, Codec::scale(lanes, memory), memory);
    }
  });
}

// A message decoded into user memory.
template <class Codec, class Lanes>
DPCOMM_HD void get(Lanes& lanes, const Bucket& bucket, Range range, const Message<Codec>& in) {
  each_memory<Codec, true>(lanes, bucket, range, [&](const auto& memory, int64_t at) {
    const Incoming<Codec> values(in, at);
    DPCOMM_UNROLL
    for (int i = 0; i < Lanes::template vectors<Codec>; ++i) memory.set(i, values(i));
  });
}

// total = everyone's contribution to one unit, in rank order; in(r) is the message of rank r. My own comes from user
// memory, but from my message to myself where the codec loses bits: the sum is of what all others would see.
template <class Codec, class Lanes, class Memory, class Messages>
DPCOMM_HD void add_up(const Team& t, Op op, const typename Codec::Element::Divisor& nranks, const Memory& memory,
                      int64_t at, const Messages& in, Total<Codec, Lanes>& total) {
  const int own = Codec::scaled ? -1 : t.rank;
  if (own == 0)
    total.start(memory);
  else
    total.start(Incoming<Codec>(in(0), at));
  for (int r = 1; r < t.nranks; ++r) {
    if (r == own)
      total.fold(op, memory);
    else
      total.fold(op, Incoming<Codec>(in(r), at));
  }
  total.finish(op, nranks);
}

}  // namespace DPCOMM_ISA
}  // namespace dpcomm
