// One call of the core, dispatched to an instruction set. kernels.cpp is compiled once for each.
#pragma once
#include "../core/protocol.h"
#include "wait.h"

namespace dpcomm {

// How a store into a slot treats the cache. The last to touch the line was the peer, who read it: where the cores share
// a cache plain stores win, where they do not streaming stores do, each by 2-5x. Never changes a bit.
enum class Store { plain, streaming };

// Where a call's time went, and what it met. Written by the thread that runs the call.
struct Tally {
  int64_t ns[kPhases] = {};
  int64_t since = 0;
  Phase current = Phase::wait;
  int64_t nonfinite_groups = 0;
  void enter(Phase next);  // ends the current phase
};

struct KernelCall {
  const Team& team;
  const Bucket& bucket;
  const Header& header;
  Store store;
  Waiting waiting;
  Tally& tally;
};

struct Isa {
  const char* name;
  bool usable;
  bool (*run)(const KernelCall&);  // false: failed, and the failure word says why
};
const Isa* isas(int* count);       // best first; the last is "portable"
const Isa& isa(const char* name);  // by name, "" for the best usable; throws Error(argument)

}  // namespace dpcomm
