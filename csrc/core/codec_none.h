// Codec none: the wire is the value. 16-bit elements widen to float for the sum and are rounded once, at its end.
#pragma once
#include "element.h"

namespace dpcomm {
inline namespace DPCOMM_ISA {

template <class Element_>
struct None {
  using Element = Element_;
  using Code = typename Element::Stored;
  using Acc = typename Element::Acc;
  static constexpr bool scaled = false;  // no exponent on the wire; a contribution comes back as it went
  struct Scale {};

  template <class Lanes, class Values>
  DPCOMM_HD static Scale scale(Lanes&, const Values&) {
    return {};
  }
  DPCOMM_HD static Vec<Code> encode(const Scale&, const Vec<Acc>& v) { return Element::narrow(v); }
  DPCOMM_HD static Vec<Acc> decode(const Scale&, const Vec<Code>& c) { return Element::widen(c); }
  DPCOMM_HD static int8_t to_wire(const Scale&) { return 0; }
  DPCOMM_HD static Scale from_wire(int8_t) { return {}; }
};

}  // namespace DPCOMM_ISA
}  // namespace dpcomm
