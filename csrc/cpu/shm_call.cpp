// One all-reduce of engine shm: from a Call to a header and a table of segments, on one channel or several, and back.
#include <unistd.h>

#include "../host/call_facts.h"
#include "float_environment.h"
#include "shm_engine.h"
#include "times.h"

namespace dpcomm {

namespace {

// What a channel must have to do before it gets a thread of its own: waking one takes about as long as a slice.
constexpr int64_t kSlicesPerChannel = 2;

}  // namespace

void ShmEngine::allreduce(const Call& call) {
  origin_.refuse_fork();
  if (load_acquire(team_.failure) != 0) throw cause_error(&call);
  if (!served(call)) throw failure_text().unserved(call);
  if (team_.nranks == 1) return;
  Bucket bucket{};
  const Header header = begin(call, bucket);
  const int64_t slices = this->slices(header, bucket);
  const int channels = channels_for(slices);
  // Only algorithms that begin each slice with a put can be measured slice by slice.
  const bool measured = trials_ && Algorithm(header.algorithm) != Algorithm::ring;
  const int64_t bytes = bucket.groups * group_bytes(call.dtype, call.codec);
  const StoreTurns turns = measured ? stores_.begin(bytes, slices / channels) : StoreTurns(stores_.chosen());
  StoreTurns first = turns;
  current_ = &call;
  const auto play_channel = [&](int k) {
    Channel& channel = channels_[size_t(k)];
    Team team = team_;
    team.box = channel.box.data();
    team.channel = k;
    team.channels = channels;
    StoreTurns mine = turns;
    play(channel, team, bucket, header, k == 0 ? first : mine);
  };
  const auto idle = [this] { asked_to_stop(current_); };
  threads_.run(channels, std::cref(play_channel), std::cref(idle));  // references: copies would be allocated
  channels_[0].tally.enter(Phase::wait);                             // for the other channels
  current_ = nullptr;
  for (int k = 0; k < channels; ++k)
    if (!channels_[size_t(k)].ok) throw cause_error(&call);
  if (measured) end_stores(first);
  count(header, bucket, channels);
}

void ShmEngine::play(Channel& channel, const Team& team, const Bucket& bucket, const Header& header,
                     StoreTurns& stores) {
  const DefaultFloatEnvironment environment;
  channel.tally = {};
  channel.tally.since = now_ns();
  channel.ok = isa_.run({team,
                         bucket,
                         header,
                         stores,
                         {&channel.spins, most_spins_, kYields, timeout_ns_, team_.failure, &channel.patience},
                         channel.tally});
  channel.tally.enter(Phase::wait);
}

Header ShmEngine::begin(const Call& call, Bucket& bucket) {
  const int64_t groups = fill_segments(call, segments_);
  bucket = {segments_.data(), int64_t(segments_.size()), groups};
  Header header = header_of(call, groups, team_.nranks, Reach::memory);
  header.sequence = mine().sequence + 1;
  __atomic_store_n(&mine().sequence, header.sequence, __ATOMIC_RELAXED);  // peers read it for their messages only
  return header;
}

// Of a whole chunk, on one channel.
int64_t ShmEngine::slices(const Header& header, const Bucket& bucket) const {
  const int parts = parts_of(header, team_.nranks);
  const int64_t bytes = group_bytes(Dtype(header.dtype), CodecKind(header.codec));
  return Chunks::cut(bucket.groups, parts, most_groups(team_.slot_bytes, team_.slice_bytes, bytes)).slices;
}

// From data that are equal on all ranks; if they are not, the first channel notices.
int ShmEngine::channels_for(int64_t slices) const {
  const int64_t wanted = slices / kSlicesPerChannel;
  return wanted < 1 ? 1 : wanted < used_channels_ ? int(wanted) : used_channels_;
}

void ShmEngine::count(const Header& header, const Bucket& bucket, int channels) {
  const std::lock_guard lock(stats_mutex_);
  count_call(stats_, header, wire_bytes(header, bucket.groups, team_.rank, team_.nranks, Reach::memory));
  add_times(stats_, channels_[0].tally);
  for (int k = 0; k < channels; ++k) stats_.nonfinite_groups += channels_[size_t(k)].tally.nonfinite_groups;
}

void ShmEngine::end_stores(const StoreTurns& turns) {
  const std::lock_guard lock(stats_mutex_);  // describe() looks at the choice
  stores_.end(turns, channels_[0].tally);
}

bool ShmEngine::asked_to_stop(const Call* call) {
  if (!call || !call->interrupted || !call->interrupted()) return false;
  abort("interrupted");
  return true;
}

bool ShmEngine::ChannelPatience::give_up(int) {
  if (callers && engine->asked_to_stop(engine->current_)) return true;
  const uint64_t sequence = engine->mine().sequence;
  for (int r = 0; r < engine->team_.nranks; ++r) {
    const uint64_t closed = __atomic_load_n(&engine->control_->closed[r], __ATOMIC_ACQUIRE);
    if (closed == 0 || closed > sequence) continue;  // still there, or it took part in this call before it left
    engine->fail({Cause::peer_closed, uint8_t(r), 0, Field::none, 0});
    return true;
  }
  return false;
}

bool ShmEngine::ChannelPatience::timed_out(const Flag* flag, uint32_t value, int peer) {
  const std::lock_guard lock(engine->abort_mutex_);  // another channel may time out, too
  if (load_acquire(engine->team_.failure) != 0) return true;
  const Team& team = engine->team_;
  const Flag* flags = flag - peer;  // of all writers of this stream
  const auto stream = (flags - &(*box)[size_t(team.rank)]->arrived[0][0]) / kMaxRanks;
  uint64_t late = 0;
  for (int r = 0; r < team.nranks; ++r)
    if (r != team.rank && !reached(load_acquire(&flags[r].value), value)) late |= uint64_t{1} << r;
  if (stream == kRing || stream == kDrained)
    late = last_in_ring();
  else if (late == 0 && reached(load_acquire(&flag->value), value))
    return false;
  __atomic_store_n(&engine->control_->waiting_for[team.rank], late, __ATOMIC_RELAXED);  // released by the failure word
  engine->fail({Cause::timeout, uint8_t(team.rank), 0, Field::none, 0});
  return true;
}

// In a ring I wait for a neighbour, who may be waiting himself. To blame are those who have sent least.
uint64_t ShmEngine::ChannelPatience::last_in_ring() const {
  const Team& team = engine->team_;
  const auto sent = [&](int r) {
    return load_acquire(&(*box)[size_t((r + 1) % team.nranks)]->arrived[kRing][r].value);
  };
  const uint32_t mine = sent(team.rank);
  int32_t least = INT32_MAX;
  uint64_t late = 0;
  for (int r = 0; r < team.nranks; ++r) {
    if (r == team.rank) continue;
    const int32_t ahead = int32_t(sent(r) - mine);
    if (ahead < least) least = ahead, late = 0;
    if (ahead == least) late |= uint64_t{1} << r;
  }
  return late;
}

}  // namespace dpcomm
