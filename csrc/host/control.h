// The page that all ranks of one host share beside their mailboxes: the first cause, and who has left. Every arena
// starts with one; the one of rank 0 is in use. It outlives rank 0, as any mapping does.
#pragma once
#include "../core/mailbox.h"

namespace dpcomm {

constexpr int kReasonBytes = 96;

struct alignas(4096) ControlPage {
  alignas(128) uint64_t failure;  // header.h: set once. It releases what its writer put into the fields below.
  alignas(128) uint64_t closed[kMaxRanks];  // 1 + the last call of a rank that said goodbye
  uint64_t waiting_for[kMaxRanks];          // [rank that timed out]: a bit for each rank it waited for
  char reason[kMaxRanks][kReasonBytes];     // [rank that aborted]: why, zero-terminated
};

}  // namespace dpcomm
