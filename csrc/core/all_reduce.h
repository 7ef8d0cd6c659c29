// The three algorithms behind one name. A call's header says which; all ranks say the same, or agree() notices.
#pragma once
#include "direct.h"
#include "oneshot.h"
#include "ring.h"

namespace dpcomm {
inline namespace DPCOMM_ISA {

// Reduces the bucket over all ranks. False: it cannot be finished; the failure word or the caller's deadline says why.
template <class Codec, Algorithm algorithm, class Lanes>
DPCOMM_HD bool all_reduce_by(Lanes& lanes, const Team& t, const Bucket& bucket, const Header& header) {
  if constexpr (algorithm == Algorithm::direct) return direct<Codec>(lanes, t, bucket, header);
  if constexpr (algorithm == Algorithm::oneshot) return oneshot<Codec>(lanes, t, bucket, header);
  if constexpr (algorithm == Algorithm::ring) return ring<Codec>(lanes, t, bucket, header);
}

// The same where the algorithm is known at run time only.
template <class Codec, class Lanes>
DPCOMM_HD bool all_reduce(Lanes& lanes, const Team& t, const Bucket& bucket, const Header& header) {
  switch (Algorithm(header.algorithm)) {
    case Algorithm::direct:
      return all_reduce_by<Codec, Algorithm::direct>(lanes, t, bucket, header);
    case Algorithm::oneshot:
      return all_reduce_by<Codec, Algorithm::oneshot>(lanes, t, bucket, header);
    case Algorithm::ring:
      return all_reduce_by<Codec, Algorithm::ring>(lanes, t, bucket, header);
    case Algorithm::automatic:
    case Algorithm::native:
    case Algorithm::two_level:
      break;  // the engine has chosen
  }
  return false;
}

}  // namespace DPCOMM_ISA
}  // namespace dpcomm
