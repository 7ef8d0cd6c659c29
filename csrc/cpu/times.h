// Where a call's time went, for the statistics of an engine.
#pragma once
#include "../engine.h"
#include "store_policy.h"

namespace dpcomm {

inline void add_times(Stats& stats, const Tally& tally) {
  stats.put_s += tally.ns[int(Phase::put)] * 1e-9;
  stats.reduce_s += tally.ns[int(Phase::reduce)] * 1e-9;
  stats.get_s += tally.ns[int(Phase::get)] * 1e-9;
  stats.wait_s += tally.ns[int(Phase::wait)] * 1e-9;
}

}  // namespace dpcomm
