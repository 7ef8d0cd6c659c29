#include "shm_engine.h"

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "../host/watchdog.h"

namespace dpcomm {

namespace {

// docs/performance.md compares 4 to 64 slots of 33 to 513 KiB.
constexpr int kSlots = 8;
constexpr int64_t kMostSlotBytes = 129 * 1024;  // 128 KiB of codes and their exponents
constexpr int64_t kLeastSlotBytes = 4 * 1024;
constexpr int64_t kSliceBytes = 256 * (2 * kGroup + 1);  // 128 KiB: 256 groups of fp16, 128 of float32

// Slots of at least kLeastSlotBytes that make `channels` channels fit; slots 0: there are none.
Geometry fit(int nranks, const Wish& wish, int channels, int slots) {
  const int64_t room = (wish.arena_bytes - int64_t(sizeof(ControlPage))) / channels / 4096 * 4096;
  const int64_t lanes = (arena_bytes(nranks, slots, 128, true) - arena_bytes(nranks, slots, 0, true)) / 128;
  const int64_t most = (room - arena_bytes(nranks, slots, 0, true)) / lanes / 128 * 128;
  Geometry g{};
  if (most < kLeastSlotBytes) return g;
  g.nranks = nranks, g.channels = channels, g.slots = slots;
  g.slot_bytes = std::min(most, kMostSlotBytes);
  g.slice_bytes = std::min(g.slot_bytes, wish.slice_bytes > 0 ? wish.slice_bytes : kSliceBytes);
  g.channel_bytes = whole_pages(arena_bytes(nranks, slots, g.slot_bytes, true));
  g.arena_bytes = int64_t(sizeof(ControlPage)) + channels * g.channel_bytes;
  g.fewer_channels = wish.fewer_channels, g.crowded = wish.crowded;
  return g;
}

}  // namespace

Geometry geometry(int nranks, const Wish& wish) {
  if (wish.slots != 0 && (wish.slots < 4 || (wish.slots & (wish.slots - 1)) != 0))
    throw Error(Code::argument, "slots must be a power of two of at least 4");
  if (wish.channels < 1 || wish.channels > kMostChannels)
    throw Error(Code::argument, "channels must be 1 to " + std::to_string(kMostChannels));
  const int slots = wish.slots > 0 ? wish.slots : kSlots;
  for (int channels = wish.channels; channels > 1; --channels)  // rather fewer channels than small slots
    if (const Geometry g = fit(nranks, wish, channels, slots); g.slot_bytes == kMostSlotBytes) return g;
  for (int fewer = slots; fewer >= (wish.slots > 0 ? slots : 4); fewer /= 2)
    if (const Geometry g = fit(nranks, wish, 1, fewer); g.slots > 0) return g;
  const int64_t least = int64_t(sizeof(ControlPage)) + whole_pages(arena_bytes(nranks, 4, kLeastSlotBytes, true));
  throw Error(Code::argument, "an arena of " + std::to_string(wish.arena_bytes) + " bytes is too small for " +
                                  std::to_string(nranks) + " ranks: at least " + std::to_string(least) +
                                  " are needed. Raise DPCOMM_ARENA_MB.");
}

ShmEngine::ShmEngine(int rank, const Geometry& g, std::vector<Peer> peers, const Isa& isa, int rejected)
    : peers_(std::move(peers)), isa_(isa), rejected_connections_(rejected), arena_bytes_(g.arena_bytes) {
  std::vector<char*> arenas;
  for (const Peer& p : peers_) arenas.push_back(p.arena.data());
  join(rank, g, arenas);
  watch_peers();
}

ShmEngine::ShmEngine(int rank, const Geometry& g, std::shared_ptr<std::vector<Arena>> memory, const Isa& isa)
    : peers_(size_t(g.nranks)),
      arenas_(std::move(memory)),
      isa_(isa),
      rejected_connections_(0),
      arena_bytes_(g.arena_bytes) {
  std::vector<char*> arenas;
  for (const Arena& a : *arenas_) arenas.push_back(a.data());
  for (Peer& p : peers_) p.pid = origin_.pid();
  join(rank, g, arenas);
}

void ShmEngine::join(int rank, const Geometry& g, const std::vector<char*>& arenas) {
  control_ = reinterpret_cast<ControlPage*>(arenas[0]);
  team_ = {rank, g.nranks, nullptr, &control_->failure, g.slots, g.slot_bytes, g.slice_bytes, true};
  most_spins_ = g.crowded ? kSpinsCrowded : kSpins;
  channels_.resize(size_t(g.channels));
  for (int k = 0; k < g.channels; ++k) {
    Channel& channel = channels_[size_t(k)];
    for (char* arena : arenas)
      channel.box.push_back(reinterpret_cast<Mailbox*>(arena + sizeof(ControlPage) + k * g.channel_bytes));
    channel.patience.engine = this;
    channel.patience.box = &channel.box;
    channel.patience.callers = k == 0;
    channel.spins = most_spins_;
  }
  used_channels_ = g.channels;
  fewer_channels_ = g.fewer_channels;
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
  failure.sequence = uint32_t(__atomic_load_n(&mine().sequence, __ATOMIC_RELAXED));
  set_once(team_.failure, pack(failure));  // naps end within 100 ms and look at it
}

void ShmEngine::abort(const std::string& reason) {
  if (in_forked_child() || closed_) return;
  const std::lock_guard lock(abort_mutex_);
  give_up_for(*control_, team_.rank, __atomic_load_n(&mine().sequence, __ATOMIC_RELAXED), reason);
}

void ShmEngine::close() {
  if (in_forked_child() || closed_.exchange(true)) return;
  known_.reset();
  __atomic_store_n(&control_->closed[team_.rank], mine().sequence + 1,
                   __ATOMIC_RELEASE);  // before the hang-up
  for (const uint64_t watch : watches_) Watchdog::instance().forget(watch);
  for (Peer& p : peers_) p.socket.reset();
}

Stats ShmEngine::stats(bool reset) {
  origin_.refuse_fork();
  const std::lock_guard lock(stats_mutex_);
  const Stats now = stats_;
  if (reset) stats_ = {};
  return now;
}

Description ShmEngine::describe() {
  origin_.refuse_fork();
  const std::lock_guard lock(stats_mutex_);
  Description d;
  d.engine = "shm";
  d.name = name_;
  d.simd = isa_.name;
  d.store = stores_.chosen() == Store::plain ? "plain" : "streaming";
  d.arena_bytes = arena_bytes_;
  d.slot_bytes = team_.slot_bytes;
  d.slots = team_.slots;
  d.channels = used_channels_;
  d.rejected_connections = rejected_connections_;
  d.sequence = shown(__atomic_load_n(&mine().sequence, __ATOMIC_RELAXED));
  for (const Peer& p : peers_) d.pids.push_back(p.pid);
  return d;
}

}  // namespace dpcomm
