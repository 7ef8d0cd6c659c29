// A check of the core on one GPU: all ranks of a team are CTAs of one cooperative launch and share its memory. It is
// no engine: no process, no queue, no peer-to-peer memory. Plain C++: no type of CUDA crosses this line.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "../core/types.h"

namespace dpcomm {

struct LoopbackCall {
  std::vector<std::vector<uintptr_t>> addresses;  // [rank][segment], device memory aligned to the element
  std::vector<int64_t> counts;                    // [segment] elements
  Dtype dtype = Dtype::float32;                   // float32; with codec none also bfloat16 by algorithm direct
  Op op = Op::sum;
  CodecKind codec = CodecKind::none;
  Algorithm algorithm = Algorithm::direct;
  double timeout_s = 10;       // of one wait on the device
  int slots = 4;               // a power of two, at least 4
  int64_t slot_bytes = 65536;  // a multiple of 128 that holds at least one group
  uint32_t first_message = 0;  // where all message counters start: just below 2^32 to see them wrap
  int calls = 1;               // all-reduces in a row, each on the result of the one before
  int absent_rank = -1;        // returns at once: the others must time out
  int disagreeing_rank = -1;   // announces another bucket than the others
};

struct LoopbackResult {
  double us;                 // of one call, launch included, by the device's clock
  int64_t nonfinite_groups;  // encoded by all ranks (contributions and owned results) with a NaN or Inf
};

// Reduces in place on every rank, after all earlier work of the device. Returns when it is done; throws Error
// (argument, unsupported, mismatch, timeout, cuda), and then the memory may hold anything but the context lives.
LoopbackResult loopback_allreduce(const LoopbackCall& call);

std::string cuda_version();          // of the runtime that is linked in: "13.0"
std::string cuda_unusable_reason();  // "" where a device can be used

}  // namespace dpcomm
