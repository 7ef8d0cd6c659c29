// One step of a call of the core, dispatched to an instruction set. steps.cpp is compiled once for each.
#pragma once
#include "../core/steps.h"
#include "store_policy.h"

namespace dpcomm {

struct StepCall {
  const Team& team;
  const Bucket& bucket;
  const Header& header;
  const Step& step;
  // Codec none only: what I reduce is sent from user memory, so no message of it is written.
  bool in_place;
  Tally& tally;
};

}  // namespace dpcomm
