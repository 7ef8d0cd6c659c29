// The p2p kernel of one codec. CTA c of the grid plays channel c % channels of the rank c / channels.
#pragma once
#include "lanes.cuh"
#include "p2p_kernel.h"
#include "p2p_kernels.h"

namespace dpcomm {

// Eight-byte accumulators take twice the registers, so half the lanes. The host asks the kernel how many it has.
template <class Codec>
constexpr int kThreadsOf = sizeof(typename Codec::Acc) == 8 ? kCtaThreads / 2 : kCtaThreads;

template <class Codec, Algorithm algorithm>
__global__ void __launch_bounds__(kThreadsOf<Codec>, 1) p2p(const __grid_constant__ P2pCall call) {
  play_p2p<Codec, algorithm>(call, int(blockIdx.x), [](const DeviceWait& wait, uint64_t* nonfinite_groups) {
    return CtaLanes{wait, nonfinite_groups};
  });
}

template <class Codec>
const void* address(Algorithm algorithm) {
  switch (algorithm) {
    case Algorithm::direct:
      return reinterpret_cast<const void*>(&p2p<Codec, Algorithm::direct>);
    case Algorithm::oneshot:
      return reinterpret_cast<const void*>(&p2p<Codec, Algorithm::oneshot>);
    case Algorithm::ring:
      return reinterpret_cast<const void*>(&p2p<Codec, Algorithm::ring>);
    case Algorithm::automatic:
    case Algorithm::carrier:
      return nullptr;  // the engine has chosen
  }
  return nullptr;
}

}  // namespace dpcomm
