// The steps of the core, read once per instruction set, as kernels.cpp is, and with the same rule: no standard header
// with inline code.
#include "../core/select.h"
#include "lanes.h"

namespace dpcomm {
inline namespace DPCOMM_ISA {

// flatten: as in kernels.cpp.
template <class Codec, bool in_place>
__attribute__((flatten)) static void run_direct(const StepCall& call) {
  StepLanes<in_place> lanes{call.tally};
  direct_step<Codec>(lanes, call.team, call.bucket, call.header, call.step);
}
template <class Codec>
__attribute__((flatten)) static void run_oneshot(const StepCall& call) {
  StepLanes<false> lanes{call.tally};
  oneshot_step<Codec>(lanes, call.team, call.bucket, call.header, call.step);
}
template <class Codec>
__attribute__((flatten)) static void run_ring(const StepCall& call) {
  StepLanes<false> lanes{call.tally};
  ring_step<Codec>(lanes, call.team, call.bucket, call.header, call.step);
}

template <class Codec>
static void run_codec(const StepCall& call) {
  auto* direct = run_direct<Codec, false>;
  if constexpr (!Codec::scaled)
    if (call.in_place) direct = run_direct<Codec, true>;
  const Algorithm algorithm = Algorithm(call.header.algorithm);
  if (auto* const run = of_algorithm(algorithm, direct, run_oneshot<Codec>, run_ring<Codec>)) run(call);
}

void run_step(const StepCall& call) {
  with_codec(call.header, [&](auto codec) { run_codec<decltype(codec)>(call); });
}

}  // namespace DPCOMM_ISA
}  // namespace dpcomm
