#include "carried_steps.h"

#include "../error.h"

namespace dpcomm {
namespace {

constexpr int64_t kLeastSlotBytes = 4 * 1024;

}  // namespace

int64_t carried_slot_bytes(int nranks, int64_t scratch_bytes, int64_t wished) {
  const int64_t fits = scratch_bytes / (used_lanes(nranks) * kCarriedSlots) / 4096 * 4096;
  if (fits < kLeastSlotBytes)
    throw Error(Code::argument, "an arena of " + std::to_string(scratch_bytes) + " bytes is too small for " +
                                    std::to_string(nranks) + " ranks. Raise DPCOMM_ARENA_MB.");
  return std::min(fits, std::max(whole_pages(wished > 0 ? wished : kMostSliceBytes), kLeastSlotBytes));
}

int64_t carried_used_bytes(int nranks, int64_t slot_bytes) { return used_lanes(nranks) * kCarriedSlots * slot_bytes; }

int64_t carried_arena_bytes(int nranks, int64_t slot_bytes) {
  return whole_pages(arena_bytes(nranks, kCarriedSlots, slot_bytes, true));
}

}  // namespace dpcomm
