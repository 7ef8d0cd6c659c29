// The three algorithms behind one name. A call's header says which; all ranks say the same, or agree() notices.
#pragma once
#include "direct.h"
#include "oneshot.h"
#include "ring.h"

namespace dpcomm {
inline namespace DPCOMM_ISA {

// Reduces the bucket over all ranks. False: it cannot be finished; the failure word or the caller's deadline says why.
template <class Codec, class Lanes>
DPCOMM_HD bool all_reduce(Lanes& lanes, const Team& t, const Bucket& bucket, const Header& header) {
  switch (Algorithm(header.algorithm)) {
    case Algorithm::direct:
      return direct<Codec>(lanes, t, bucket, header);
    case Algorithm::oneshot:
      return oneshot<Codec>(lanes, t, bucket, header);
    case Algorithm::ring:
      return ring<Codec>(lanes, t, bucket, header);
    case Algorithm::automatic:
      break;  // the engine has chosen
  }
  return false;
}

}  // namespace DPCOMM_ISA
}  // namespace dpcomm
