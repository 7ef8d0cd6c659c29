// What verify() moves.
#pragma once
#include "p2p_engine.h"

namespace dpcomm {

struct P2pEngine::Pattern {
  Pattern(int rank, int nranks, int channels);
  int64_t first_wrong(size_t call, int nranks) const;  // -1: none

  int64_t elems;
  std::vector<int32_t> image;
  std::vector<std::unique_ptr<DeviceArray<int32_t>>> buffers;
  std::vector<Call> calls;
  std::vector<std::shared_ptr<Pending>> pending;
};

}  // namespace dpcomm
