// One channel of one call of the core, dispatched to an instruction set. kernels.cpp is compiled once for each.
#pragma once
#include "steps.h"
#include "wait.h"

namespace dpcomm {

struct KernelCall {
  const Team& team;
  const Bucket& bucket;
  const Header& header;
  StoreTurns& stores;
  Waiting waiting;
  Tally& tally;
};

struct LocalCall;  // local_rounds.h

struct Isa {
  const char* name;
  bool usable;
  bool (*run)(const KernelCall&);  // false: failed, and the failure word says why
  void (*run_step)(const StepCall&);
  bool (*run_local)(const LocalCall&);  // false: as run
};
const Isa* isas(int* count);       // best first; the last is "portable"
const Isa& isa(const char* name);  // by name, "" for the best usable; throws Error(argument)

}  // namespace dpcomm
