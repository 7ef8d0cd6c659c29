// One round inside a host (core/local.h), dispatched to an instruction set. local_rounds.cpp is compiled once for each.
#pragma once
#include "../core/local.h"
#include "kernels.h"

namespace dpcomm {

struct LocalCall {
  const KernelCall& call;  // `header` names the codec inside the host; its algorithm says nothing
  const Shards& shards;
  LocalTurn turn;
  int64_t slice;
  int part;
};

}  // namespace dpcomm
