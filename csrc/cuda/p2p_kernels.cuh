// The p2p kernel of one codec. CTA c of the grid plays channel c % channels of the rank c / channels.
#pragma once
#include "../core/select.h"
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
  return reinterpret_cast<const void*>(of_algorithm(algorithm, &p2p<Codec, Algorithm::direct>,
                                                    &p2p<Codec, Algorithm::oneshot>, &p2p<Codec, Algorithm::ring>));
}

}  // namespace dpcomm
