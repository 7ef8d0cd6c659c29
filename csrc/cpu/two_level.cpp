#include "two_level.h"

#include "../host/call_facts.h"

namespace dpcomm {
namespace {

// Of a slice, at least; with a codec less than between all ranks, since the first is gathered before anything is sent,
// and the last is spread after everything has come. In groups, not bytes: what a slice costs inside a host is the same
// with any codec (docs/performance.md).
constexpr int64_t kLeastGroups = 512;

}  // namespace

TwoLevel::TwoLevel(int rank, int nranks, HostMemory memory, int64_t scratch_bytes, ControlPlane& plane, const Isa& isa)
    : isa_(isa), inside_(rank, std::move(memory), plane, isa) {
  const Partition& all = partition();
  // Every rank has the slots that the one with most shards can have: slices are the same for all.
  const int most = all.most_owned();
  try {
    slot_bytes_ = carried_slot_bytes(all.nhosts(), scratch_bytes / most, 0);
  } catch (const Error&) {
    throw Error(Code::argument, "half of the memory of a rank, " + std::to_string(scratch_bytes) +
                                    " bytes, does not hold the messages between " + std::to_string(all.nhosts()) +
                                    " hosts of " + std::to_string(most) +
                                    " shards, which a rank of the smallest host owns. Raise DPCOMM_ARENA_MB, or use "
                                    "engine='gloo'.");
  }
  const int64_t arena = carried_arena_bytes(all.nhosts(), slot_bytes_);
  used_bytes_ = all.owned() * carried_used_bytes(all.nhosts(), slot_bytes_);
  scratch_ = Arena::sparse(size_t(all.owned() * all.nhosts() * arena), size_t(used_bytes_));
  for (int j = 0; j < all.owned(); ++j) {
    Outer& outer = outer_.emplace_back();
    outer.owners = all.owners(all.shard(j));
    for (int h = 0; h < all.nhosts(); ++h)
      outer.box.push_back(reinterpret_cast<Mailbox*>(scratch_.data() + (j * all.nhosts() + h) * arena));
  }
  for (Outer& outer : outer_) {  // where it stays
    outer.team = {all.host(),    all.nhosts(), outer.box.data(), &plane.page().failure,
                  kCarriedSlots, slot_bytes_,  slot_bytes_,      true};
    outer.team.contributors = nranks;
  }
}

Shards TwoLevel::cut(const Bucket& bucket, const Header& header, int64_t slice_bytes) const {
  const int64_t bytes = group_bytes(Dtype(header.dtype), CodecKind(header.codec));
  const int parts = parts_of(header, partition().nhosts());
  return Shards::cut(bucket.groups, partition().shards(), parts, most_groups(slot_bytes_, slice_bytes, bytes),
                     partition().size(), inside_.message_groups(Dtype(header.dtype), CodecKind(header.codec)));
}

int64_t TwoLevel::slice_bytes(const Bucket& bucket, const Header& header) const {
  const Shards whole = cut(bucket, header, slot_bytes_);
  const int64_t chunk = (whole.shard_groups + whole.parts - 1) / whole.parts;
  const int64_t bytes = group_bytes(Dtype(header.dtype), CodecKind(header.codec));
  return slice_bytes_for(chunk * bytes, slot_bytes_, kLeastGroups * bytes);
}

std::optional<Arrival> TwoLevel::play(Carrier& carrier, const Bucket& bucket, const Header& header, double timeout_s,
                                      Tally& tally) {
  const Partition& all = partition();
  const Dtype dtype = Dtype(header.dtype);
  const CodecKind codec = CodecKind(header.codec);
  const Header between = header_between(header, bucket.groups, all);
  const int64_t slice = slice_bytes(bucket, between);
  const Shards shards = cut(bucket, between, slice);
  std::vector<TimedSteps> steps;
  std::vector<Player> players;
  steps.reserve(outer_.size()), players.reserve(outer_.size());
  wire_bytes_ = 0;
  for (size_t j = 0; j < outer_.size(); ++j) {
    Outer& outer = outer_[j];
    outer.team.slice_bytes = slice;
    const Range range = shards.shard(all.shard(int(j)));
    outer.bucket = part_of(bucket, range, element_bytes(dtype), outer.segments);
    steps.emplace_back(isa_, outer.team, outer.bucket, between, tally);
    const CarriedCall call{outer.team, outer.bucket,       between, group_bytes(dtype, codec),
                           timeout_s,  outer.owners.data()};
    players.emplace_back(carrier, steps.back(), call);
    wire_bytes_ += dpcomm::wire_bytes(between, range.groups, all.host(), all.nhosts(), Reach::network);
  }
  inside_.begin(bucket, header, shards, timeout_s, tally);
  return dpcomm::play(players, *this, shards, all.host());
}

}  // namespace dpcomm
