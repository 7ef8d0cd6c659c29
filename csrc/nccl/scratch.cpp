#include "scratch.h"

#include <algorithm>
#include <set>

#include "../core/protocol.h"

namespace dpcomm {

namespace {

// Lanes of a copy of rank r's arena that this rank uses; see slot() with Team::shared.
std::vector<int64_t> lanes_of(int r, int rank, int nranks) {
  std::vector<int64_t> lanes;
  for (int writer = 0; writer < nranks; ++writer)
    if (r == rank || writer == rank) lanes.push_back(writer);              // kGiven: to me, or mine to r
  lanes.push_back(nranks);                                                 // kResult of r
  if (r == rank || r == (rank + 1) % nranks) lanes.push_back(nranks + 1);  // kRing
  return lanes;
}

std::vector<Mailbox*> boxes(char* memory, const std::vector<int64_t>& first, int64_t lane_bytes) {
  std::vector<Mailbox*> box;
  for (const int64_t lane : first)  // slots begin behind the mailbox that is not there
    box.push_back(reinterpret_cast<Mailbox*>(uintptr_t(memory) + uintptr_t(lane * lane_bytes) - sizeof(Mailbox)));
  return box;
}

}  // namespace

Scratch::Plan Scratch::plan(int rank, int nranks) {
  std::set<int64_t> taken;
  Plan plan{std::vector<int64_t>(size_t(nranks)), 0};
  for (int step = 0; step < nranks; ++step) {  // my own first: it needs most
    const int r = (rank + step) % nranks;
    const std::vector<int64_t> lanes = lanes_of(r, rank, nranks);
    const auto free = [&](int64_t first) {
      for (const int64_t lane : lanes)
        if (first + lane < 0 || taken.contains(first + lane)) return false;
      return true;
    };
    int64_t first = -nranks;
    while (!free(first)) ++first;
    for (const int64_t lane : lanes) {
      taken.insert(first + lane);
      plan.lanes = std::max(plan.lanes, first + lane + 1);
    }
    plan.first[size_t(r)] = first;
  }
  return plan;
}

Scratch::Scratch(int rank, int nranks, int slots, int64_t slot_bytes)
    : Scratch(plan(rank, nranks), slots, slot_bytes) {}

Scratch::Scratch(const Plan& plan, int slots, int64_t slot_bytes)
    : bytes_(plan.lanes * slots * slot_bytes),
      memory_(size_t(bytes_ + kAlign)),
      box_(boxes(all(), plan.first, slots * slot_bytes)) {}

// Plans differ in their lanes; slots must not: ranks cut a bucket by them.
int64_t Scratch::slot_bytes_for(int nranks, int slots, int64_t bytes) {
  int64_t lanes = 0;
  for (int r = 0; r < nranks; ++r) lanes = std::max(lanes, plan(r, nranks).lanes);
  return slot_bytes_within(bytes / (lanes * slots), 0);
}

int64_t Scratch::slot_bytes_within(int64_t fits, int64_t slice_bytes) {
  const int64_t most = fits / kLeastSlotBytes * kLeastSlotBytes;
  const int64_t wished = (slice_bytes + kLeastSlotBytes - 1) / kLeastSlotBytes * kLeastSlotBytes;
  return wished > 0 ? std::min(most, wished) : most;
}

int64_t Scratch::common_bytes(int nranks, int slots, int64_t slot_bytes) {
  int64_t lanes = plan(0, nranks).lanes;
  for (int r = 1; r < nranks; ++r) lanes = std::min(lanes, plan(r, nranks).lanes);
  return lanes * slots * slot_bytes;
}

}  // namespace dpcomm
