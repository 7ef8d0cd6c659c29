#include "host_team.h"

#include <algorithm>

#include "float_environment.h"
#include "local_rounds.h"

namespace dpcomm {
namespace {

// Before a nap; fewer than between ranks that only share memory (wait.h): a peer often waits for the line itself, and
// the threads that move its bytes want these processors (docs/performance.md).
constexpr int kYieldsInside = 20;

}  // namespace

HostTeam::HostTeam(int rank, HostMemory memory, ControlPlane& plane, const Isa& isa)
    : memory_(std::move(memory)), partition_(rank, memory_.hosts), plane_(plane), isa_(isa), rank_(rank) {
  const Geometry& g = memory_.geometry;
  if (int(memory_.arenas.size()) != partition_.size())
    throw Error(Code::internal, "[dpcomm:INTERNAL] a host's memory is not of its ranks");
  for (char* arena : memory_.arenas) box_.push_back(reinterpret_cast<Mailbox*>(arena + sizeof(ControlPage)));
  t_ = {partition_.local(), g.nranks, box_.data(), &plane_.page().failure, g.slots, g.slot_bytes, g.slice_bytes, true};
  spins_ = g.crowded ? kSpinsCrowded : kSpins;
}

int64_t HostTeam::message_groups(Dtype dtype, CodecKind codec) const {
  return most_groups(t_.slot_bytes, t_.slice_bytes, group_bytes(dtype, inside(codec)));
}

void HostTeam::begin(const Bucket& bucket, const Header& header, const Shards& shards, double timeout_s, Tally& tally) {
  bucket_ = &bucket;
  header_ = header;
  header_.codec = uint8_t(inside(CodecKind(header.codec)));
  shards_ = &shards;
  timeout_ns_ = int64_t(std::min(timeout_s * 1e9, 9e18));
  tally_ = &tally;
}

bool HostTeam::round(LocalTurn turn, int64_t slice, int part) {
  if (t_.nranks == 1 && CodecKind(header_.codec) == CodecKind::none) return true;  // its own sum already
  const Geometry& g = memory_.geometry;
  const DefaultFloatEnvironment environment;
  StoreTurns stores(Store::plain);
  const Waiting waiting{&spins_, g.crowded ? kSpinsCrowded : kSpins, kYieldsInside, timeout_ns_, t_.failure, this};
  const KernelCall call{t_, *bucket_, header_, stores, waiting, *tally_};
  const bool done = isa_.run_local({call, *shards_, turn, slice, part});
  tally_->enter(Phase::wait);
  return done;
}

bool HostTeam::timed_out(const Flag* flag, uint32_t value, int peer) {
  const Flag* flags = flag - peer;  // of all writers of this stream
  uint64_t late = 0;
  for (int r = 0; r < t_.nranks; ++r)
    if (r != t_.rank && !reached(load_acquire(&flags[r].value), value)) late |= uint64_t{1} << partition_.rank_of(r);
  if (late == 0 && reached(load_acquire(&flag->value), value)) return false;
  plane_.propose({Cause::timeout, uint8_t(rank_), 0, Field::none, uint32_t(header_.sequence)}, late);
  return true;
}

}  // namespace dpcomm
