#include "shm_engine.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "float_environment.h"
#include "watchdog.h"

namespace dpcomm {

namespace {

constexpr int kSlots = 16;                     // docs/performance.md compares 4 to 64
constexpr int64_t kMostSlotBytes = 33 * 1024;  // 32 KiB of codes and their exponents
constexpr int64_t kLeastSlotBytes = 4 * 1024;
constexpr int64_t kSliceBytes = 32 * 1024;
// About 150 us before the first nap. Two ranks that the scheduler has put on one processor give it to each other that
// way and stay runnable, so that it moves one of them; napping, they looked like one task and stayed
// (docs/performance.md).
constexpr int kYields = 500;

int processors() {
  cpu_set_t set;
  return sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
}

uint64_t hash_counts(const std::vector<int64_t>& counts) {
  uint64_t h = 0xcbf29ce484222325;  // FNV-1a over whole words
  for (const int64_t n : counts) h = (h ^ uint64_t(n)) * 0x100000001b3;
  return h;
}

}  // namespace

Geometry geometry(int nranks, int64_t arena_bytes) {
  const auto total = [&](int slots, int64_t bytes) {
    return int64_t(sizeof(ControlPage)) + dpcomm::arena_bytes(nranks, slots, bytes, true);
  };
  for (int slots = kSlots; slots >= 4; slots /= 2) {
    const int64_t room = (arena_bytes - total(slots, 0)) / (int64_t{nranks + 1} * slots) / 128 * 128;
    if (room < kLeastSlotBytes) continue;
    const int64_t bytes = std::min(room, kMostSlotBytes);
    return {nranks, slots, bytes, std::min(bytes, kSliceBytes), (total(slots, bytes) + 4095) / 4096 * 4096};
  }
  throw Error(Code::argument, "an arena of " + std::to_string(arena_bytes) + " bytes is too small for " +
                                  std::to_string(nranks) + " ranks: at least " +
                                  std::to_string(total(4, kLeastSlotBytes)) + " are needed. Raise DPCOMM_ARENA_MB.");
}

ShmEngine::ShmEngine(int rank, const Geometry& g, std::vector<Peer> peers, const Isa& isa, int rejected)
    : generation_(fork_generation()),
      made_in_pid_(getpid()),
      peers_(std::move(peers)),
      isa_(isa),
      rejected_connections_(rejected),
      arena_bytes_(g.arena_bytes) {
  for (const Peer& p : peers_) box_.push_back(reinterpret_cast<Mailbox*>(p.arena.data() + sizeof(ControlPage)));
  join(rank, g);
  watch_peers();
}

ShmEngine::ShmEngine(int rank, const Geometry& g, std::shared_ptr<std::vector<Arena>> arenas, const Isa& isa)
    : generation_(fork_generation()),
      made_in_pid_(getpid()),
      peers_(size_t(g.nranks)),
      arenas_(std::move(arenas)),
      isa_(isa),
      rejected_connections_(0),
      arena_bytes_(g.arena_bytes) {
  for (const Arena& a : *arenas_) box_.push_back(reinterpret_cast<Mailbox*>(a.data() + sizeof(ControlPage)));
  for (Peer& p : peers_) p.pid = made_in_pid_;
  join(rank, g);
}

void ShmEngine::join(int rank, const Geometry& g) {
  control_ = reinterpret_cast<ControlPage*>(reinterpret_cast<char*>(box_[0]) - sizeof(ControlPage));
  team_ = {rank, g.nranks, box_.data(), &control_->failure, g.slots, g.slot_bytes, g.slice_bytes, true};
  // With more ranks than processors a spinning one keeps its peer from running.
  spins_ = most_spins_ = g.nranks <= processors() ? 200 : 2;
}

ShmEngine::~ShmEngine() { close(); }

void ShmEngine::watch_peers() {
  for (int r = 0; r < team_.nranks; ++r) {
    if (!peers_[r].socket) continue;
    watches_.push_back(Watchdog::instance().watch(peers_[r].socket.get(), [this, r] {
      if (__atomic_load_n(&control_->closed[r], __ATOMIC_ACQUIRE) == 0)
        fail({Cause::peer_died, uint8_t(r), 0, Field::none, 0});
    }));
  }
}

void ShmEngine::fail(Failure failure) {
  failure.sequence = uint32_t(__atomic_load_n(&box_[team_.rank]->sequence, __ATOMIC_RELAXED));
  set_once(team_.failure, pack(failure));  // naps end within 100 ms and look at it
}

void ShmEngine::allreduce(const Call& call) {
  if (in_forked_child())
    throw Error(Code::fork, "[dpcomm:FORK] communicator created in pid " + std::to_string(made_in_pid_) +
                                ", used in pid " + std::to_string(getpid()) +
                                ". Create it after the fork, or use the spawn start method.");
  if (load_acquire(team_.failure) != 0) throw cause_error(&call);
  if (call.codec == CodecKind::fp16 && (call.dtype != Dtype::float32 || call.op > Op::mean))
    throw Error(Code::unsupported,
                prefix(Code::unsupported, &call) + "codec fp16 serves sum and mean of float32. Use codec none.");
  if (team_.nranks == 1) return;
  Bucket bucket{};
  const Header header = begin(call, bucket);
  Tally tally;
  tally.since = now_ns();
  current_ = &call;
  bool ok;
  {
    const DefaultFloatEnvironment environment;
    ok = isa_.run(
        {team_, bucket, header, store_, {&spins_, most_spins_, kYields, timeout_ns_, team_.failure, this}, tally});
  }
  current_ = nullptr;
  tally.enter(Phase::wait);
  if (!ok) throw cause_error(&call);
  count(call, header, bucket, tally);
}

Header ShmEngine::begin(const Call& call, Bucket& bucket) {
  segments_.clear();
  int64_t groups = 0, elems = 0;
  for (size_t i = 0; i < call.counts.size(); ++i) {
    segments_.push_back({call.addresses[i], call.counts[i], groups});
    groups += groups_of(call.counts[i]);
    elems += call.counts[i];
  }
  if (segments_.empty()) segments_.push_back({nullptr, 0, 0});
  bucket = {segments_.data(), int64_t(segments_.size()), groups};
  Mailbox& mine = *box_[team_.rank];
  const uint64_t sequence = mine.sequence + 1;
  __atomic_store_n(&mine.sequence, sequence, __ATOMIC_RELAXED);  // peers read it for their messages only
  const Algorithm algorithm = call.algorithm == Algorithm::automatic
                                  ? choose_algorithm(groups, call.dtype, call.codec, team_.nranks)
                                  : call.algorithm;
  Header header{};
  header.sequence = sequence;
  header.numel = elems;
  header.layout = hash_counts(call.counts);
  header.tensors = int32_t(call.counts.size());
  header.bucket = call.bucket;
  header.op = uint8_t(call.op);
  header.dtype = uint8_t(call.dtype);
  header.codec = uint8_t(call.codec);
  header.algorithm = uint8_t(algorithm);
  return header;
}

void ShmEngine::count(const Call& call, const Header& header, const Bucket& bucket, const Tally& tally) {
  const std::lock_guard lock(stats_mutex_);
  ++stats_.calls;
  stats_.input_bytes += header.numel * element_bytes(call.dtype);
  // direct writes every other rank's chunk and the result of its own, oneshot its contribution: one bucket each.
  stats_.wire_bytes += bucket.groups * group_bytes(call.dtype, call.codec);
  stats_.put_s += tally.ns[int(Phase::put)] * 1e-9;
  stats_.reduce_s += tally.ns[int(Phase::reduce)] * 1e-9;
  stats_.get_s += tally.ns[int(Phase::get)] * 1e-9;
  stats_.wait_s += tally.ns[int(Phase::wait)] * 1e-9;
  stats_.nonfinite_groups += tally.nonfinite_groups;
}

bool ShmEngine::give_up(int) {
  if (current_ && current_->interrupted && current_->interrupted()) {
    abort("interrupted");
    return true;
  }
  const uint64_t sequence = box_[team_.rank]->sequence;
  for (int r = 0; r < team_.nranks; ++r) {
    const uint64_t closed = __atomic_load_n(&control_->closed[r], __ATOMIC_ACQUIRE);
    if (closed == 0 || closed > sequence) continue;  // still there, or it took part in this call before it left
    fail({Cause::peer_closed, uint8_t(r), 0, Field::none, 0});
    return true;
  }
  return false;
}

void ShmEngine::timed_out(const Flag* flag, uint32_t value, int peer) {
  const Flag* flags = flag - peer;  // of all writers of this stream
  uint64_t late = 0;
  for (int r = 0; r < team_.nranks; ++r)
    if (r != team_.rank && !reached(load_acquire(&flags[r].value), value)) late |= uint64_t{1} << r;
  __atomic_store_n(&control_->waiting_for[team_.rank], late, __ATOMIC_RELAXED);  // released by the failure word
  fail({Cause::timeout, uint8_t(team_.rank), 0, Field::none, 0});
}

void ShmEngine::abort(const std::string& reason) {
  if (in_forked_child() || closed_) return;
  const std::lock_guard lock(abort_mutex_);
  if (load_acquire(team_.failure) != 0) return;  // the first cause stands, and its text may be being read
  char* text = control_->reason[team_.rank];
  for (int i = 0; i < kReasonBytes; ++i) {
    const char c = i + 1 < kReasonBytes && size_t(i) < reason.size() ? reason[size_t(i)] : '\0';
    __atomic_store_n(text + i, c, __ATOMIC_RELAXED);
  }
  fail({Cause::aborted, uint8_t(team_.rank), 0, Field::none, 0});
}

void ShmEngine::close() {
  if (in_forked_child() || closed_.exchange(true)) return;
  __atomic_store_n(&control_->closed[team_.rank], box_[team_.rank]->sequence + 1,
                   __ATOMIC_RELEASE);  // before the hang-up
  for (const uint64_t watch : watches_) Watchdog::instance().forget(watch);
  for (Peer& p : peers_) p.socket.reset();
}

Stats ShmEngine::stats(bool reset) {
  const std::lock_guard lock(stats_mutex_);
  const Stats now = stats_;
  if (reset) stats_ = {};
  return now;
}

Description ShmEngine::describe() {
  Description d;
  d.engine = "shm";
  d.simd = isa_.name;
  d.store = store_ == Store::plain ? "plain" : "streaming";
  d.arena_bytes = arena_bytes_;
  d.slot_bytes = team_.slot_bytes;
  d.slots = team_.slots;
  d.rejected_connections = rejected_connections_;
  d.sequence = shown(__atomic_load_n(&box_[team_.rank]->sequence, __ATOMIC_RELAXED));
  for (const Peer& p : peers_) d.pids.push_back(p.pid);
  return d;
}

}  // namespace dpcomm
