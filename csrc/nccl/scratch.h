// The slots of one rank in device memory, where NCCL sends from and receives into.
#pragma once
#include <vector>

#include "../core/mailbox.h"
#include "../gpu/cuda_check.h"

namespace dpcomm {

// core/protocol.h finds slots in everyone's arenas; here all are this rank's own copies, and most of their lanes are
// never used: only to and from every peer and itself, everyone's results, both ways of the ring. So the copies lie
// interleaved, each where the lanes that it needs are still free. No mailbox of them exists: steps read none.
class Scratch {
 public:
  // slot_bytes: a multiple of kLeastSlotBytes. Zero at first.
  Scratch(int rank, int nranks, int slots, int64_t slot_bytes);

  Mailbox* const* box() const { return box_.data(); }  // in device memory
  int64_t bytes() const { return bytes_; }
  // All slots as one; see common_bytes().
  char* all() const { return reinterpret_cast<char*>((uintptr_t(memory_.data()) + kAlign - 1) / kAlign * kAlign); }

  static constexpr int64_t kLeastSlotBytes = 4096;  // and what slots are a multiple of

  // The largest slots for which that much is enough, on all ranks alike; 0: none.
  static int64_t slot_bytes_for(int nranks, int slots, int64_t bytes);
  // Slots for slices of so many bytes, no larger than what fits; 0: as large as that.
  static int64_t slot_bytes_within(int64_t fits, int64_t slice_bytes);
  // What every rank's slots hold together, if they are used as one: ranks differ in how many they have.
  static int64_t common_bytes(int nranks, int slots, int64_t slot_bytes);

 private:
  static constexpr int64_t kAlign = 4096;

  struct Plan {
    std::vector<int64_t> first;  // by rank: where its copy begins, in lanes
    int64_t lanes;
  };
  static Plan plan(int rank, int nranks);

  Scratch(const Plan& plan, int slots, int64_t slot_bytes);

  int64_t bytes_;
  DeviceArray<char> memory_;
  DeviceArray<Mailbox*> box_;
};

}  // namespace dpcomm
