// The rounds inside a host, read once per instruction set, as kernels.cpp is, and with the same rule: no standard
// header with inline code.
#include "local_rounds.h"

#include "../core/select.h"
#include "lanes.h"

namespace dpcomm {
inline namespace DPCOMM_ISA {

// flatten: as in kernels.cpp.
template <class Codec>
__attribute__((flatten)) static bool run_codec(const LocalCall& call) {
  HostLanes lanes{call.call};
  return local_round<Codec>(lanes, call.call.team, call.call.bucket, Op(call.call.header.op), call.shards, call.turn,
                            call.slice, call.part);
}

bool run_local(const LocalCall& call) {
  return with_codec(call.call.header, [&](auto codec) { return run_codec<decltype(codec)>(call); });
}

}  // namespace DPCOMM_ISA
}  // namespace dpcomm
