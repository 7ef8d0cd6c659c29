// The core, read once per instruction set (-DDPCOMM_ISA=name and that name's -m flags). No standard header with inline
// code may be included from here: the linker could keep the AVX-512 copy for everyone.
#include "../core/select.h"
#include "lanes.h"

namespace dpcomm {
inline namespace DPCOMM_ISA {

// flatten: every lambda of the core must be inlined; called, it spills its captures for each group.
template <class Codec>
__attribute__((flatten)) static bool run_direct(const KernelCall& call) {
  HostLanes lanes{call};
  return direct<Codec>(lanes, call.team, call.bucket, call.header);
}
template <class Codec>
__attribute__((flatten)) static bool run_oneshot(const KernelCall& call) {
  HostLanes lanes{call};
  return oneshot<Codec>(lanes, call.team, call.bucket, call.header);
}
template <class Codec>
__attribute__((flatten)) static bool run_ring(const KernelCall& call) {
  HostLanes lanes{call};
  return ring<Codec>(lanes, call.team, call.bucket, call.header);
}
// core/all_reduce.h with a function for each algorithm: tests/test_kernels.py reads the loops of each by its name.
template <class Codec>
static bool run_codec(const KernelCall& call) {
  const Algorithm algorithm = Algorithm(call.header.algorithm);
  auto* const run = of_algorithm(algorithm, run_direct<Codec>, run_oneshot<Codec>, run_ring<Codec>);
  return run && run(call);
}

bool run(const KernelCall& call) {
  return with_codec(call.header, [&](auto codec) { return run_codec<decltype(codec)>(call); });
}

}  // namespace DPCOMM_ISA
}  // namespace dpcomm
