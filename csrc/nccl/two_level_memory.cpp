#include "two_level_memory.h"

#include <algorithm>
#include <string>

#include "../error.h"
#include "../host/call_facts.h"

namespace dpcomm {

namespace {

constexpr int kInsidePart = 3;   // of the memory a third is for messages inside the host
constexpr int kInsideSlots = 3;  // for each of its ranks: see TwoLevelMemory::given()

int64_t inside_bytes_for(const Partition& all, int64_t bytes, int64_t slice_bytes) {
  return Scratch::slot_bytes_within(bytes / (kInsideSlots * all.size()), slice_bytes);
}

}  // namespace

// Every rank has the slots that the one with most shards can have: slices are the same for all.
TwoLevelMemory::TwoLevelMemory(int rank, int nranks, const NcclHosts& hosts, int64_t scratch_bytes, int64_t slice_bytes)
    : partition_(rank, hosts.hosts),
      codec_(hosts.codec),
      inside_bytes_(inside_bytes_for(partition_, scratch_bytes / kInsidePart, slice_bytes)),
      inside_(size_t(kInsideSlots * partition_.size() * inside_bytes_)) {
  const int nhosts = partition_.nhosts();
  const int64_t outer_bytes = (scratch_bytes - scratch_bytes / kInsidePart) / partition_.most_owned();
  const int64_t fits = Scratch::slot_bytes_for(nhosts, kCarriedSlots, outer_bytes);
  const int64_t slot_bytes = Scratch::slot_bytes_within(fits, slice_bytes);
  if (std::min(slot_bytes, inside_bytes_) < Scratch::kLeastSlotBytes)
    throw Error(Code::argument, std::to_string(scratch_bytes) + " bytes are too few for two levels between " +
                                    std::to_string(nhosts) + " hosts, of up to " + std::to_string(partition_.shards()) +
                                    " ranks. Raise DPCOMM_ARENA_MB, or leave algorithm='two_level' out.");
  for (int j = 0; j < partition_.owned(); ++j) {
    outer_.push_back(std::make_unique<Outer>(Outer{Scratch(partition_.host(), nhosts, kCarriedSlots, slot_bytes), {}}));
    Outer& outer = *outer_.back();
    outer.team = {partition_.host(), nhosts, outer.scratch.box(), nullptr, kCarriedSlots, slot_bytes, slot_bytes, true};
    outer.team.contributors = nranks;
  }
}

int64_t TwoLevelMemory::bytes() const {
  int64_t all = kInsideSlots * partition_.size() * inside_bytes_;
  for (const auto& outer : outer_) all += outer->scratch.bytes();
  return all;
}

Shards TwoLevelMemory::cut(int64_t groups, const Header& header) const {
  const Dtype dtype = Dtype(header.dtype);
  const CodecKind codec = CodecKind(header.codec);
  const Team& t = team(0);
  return Shards::cut(groups, partition_.shards(), parts_of(header, partition_.nhosts()),
                     most_groups(t.slot_bytes, t.slice_bytes, group_bytes(dtype, codec)), partition_.size(),
                     most_groups(inside_bytes_, inside_bytes_, group_bytes(dtype, inside(codec))));
}

}  // namespace dpcomm
