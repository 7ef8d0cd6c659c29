#include "p2p_engine.h"

#include <algorithm>
#include <chrono>
#include <thread>

#include "../core/protocol.h"
#include "../host/call_facts.h"
#include "../host/watchdog.h"
#include "p2p_pattern.h"

namespace dpcomm {

namespace {

constexpr double kDrainS = 5;  // a call in flight at close
constexpr double kLetGoS = 1;  // peers that close at about the same time

// A kernel is still to come, behind other work of the device: it will find its memory, then that the communicator has
// failed. So both stay until the process ends.
void park(const std::shared_ptr<DeviceTeam>& team, const std::shared_ptr<P2pMemory>& memory) {
  static auto* const parked = new std::vector<std::pair<std::shared_ptr<DeviceTeam>, std::shared_ptr<P2pMemory>>>;
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  parked->emplace_back(team, memory);
}

}  // namespace

// One rank's view of a launch.
class P2pEngine::OnStream final : public Pending {
 public:
  OnStream(P2pEngine& engine, std::shared_ptr<DeviceTeam::Launch> launch)
      : engine_(engine), launch_(std::move(launch)) {}

  void join(uintptr_t stream, double timeout_s, const std::function<bool()>& interrupted) override {
    engine_.refuse_fork();
    if (!await(timeout_s, interrupted)) throw engine_.cause_error(nullptr);
    try {
      engine_.team_->join(*launch_, reinterpret_cast<cudaStream_t>(stream));
    } catch (const Error& error) {
      engine_.throw_cuda(error, {}, stream);
    }
  }
  bool synchronize(double timeout_s, const std::function<bool()>& interrupted) override {
    engine_.refuse_fork();
    const auto start = std::chrono::steady_clock::now();
    const auto left = [&] {
      return timeout_s - std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    };
    while (!done()) {
      if (left() <= 0) return false;
      if (interrupted && interrupted()) return false;
      const double nap = std::min(left(), 0.1);
      if (!engine_.team_->await_launch(*launch_, nap, {})) continue;
      if (launch_->ended) ended_within(launch_->ended.get(), nap);
    }
    return true;
  }
  bool done() override {
    if (engine_.in_forked_child()) return false;  // whoever only lets go of it learns nothing
    if (!engine_.team_->await_launch(*launch_, 0, {})) return false;
    try {
      return !launch_->ended || ended_within(launch_->ended.get(), 0);
    } catch (const Error&) {
      return true;  // the context is lost: it will not run any more, and error() says why
    }
  }
  // A call that was seen to end well stays well, whatever comes later.
  std::exception_ptr error() override {
    if (well_ || !done()) return nullptr;
    try {
      engine_.look();
      if (!launch_->ended || engine_.failed()) throw engine_.cause_error(nullptr, true);
      ended_within(launch_->ended.get(), 0);
      well_ = true;
    } catch (const Error&) {
      return std::current_exception();
    }
    return nullptr;
  }

 private:
  // False: it will never be launched; the first cause says why.
  bool await(double timeout_s, const std::function<bool()>& interrupted) {
    bool stopped = false;
    const auto ask = [&] { return stopped = stopped || (interrupted && interrupted()); };
    if (engine_.team_->await_launch(*launch_, timeout_s, ask)) return launch_->ended != nullptr;
    if (stopped) {
      engine_.abort("interrupted while it waited for the ranks of its device");
      return false;
    }
    const std::vector<int> absent = engine_.team_->absent(*launch_);
    if (absent.empty()) return await(timeout_s, interrupted);  // it has been launched meanwhile
    engine_.absent(absent);
    return false;
  }

  P2pEngine& engine_;
  const std::shared_ptr<DeviceTeam::Launch> launch_;
  bool well_ = false;
};

P2pEngine::P2pEngine(Place p)
    : rank_(p.rank),
      here_(p.here),
      geometry_(p.geometry),
      team_(std::move(p.team)),
      memory_(std::move(p.memory)),
      peers_(std::move(p.peers)),
      control_(&memory_->shared->control),
      rejected_connections_(p.rejected_connections) {
  try {
    watch_peers();
  } catch (...) {  // nobody calls the destructor
    for (const uint64_t watch : watches_) Watchdog::instance().forget(watch);
    throw;
  }
}

P2pEngine::~P2pEngine() { close(); }

void P2pEngine::watch_peers() {
  for (int r = 0; r < nranks(); ++r) {
    if (!peers_[size_t(r)].socket) continue;
    watches_.push_back(Watchdog::instance().watch(peers_[size_t(r)].socket.get(), [this, r] {
      if (__atomic_load_n(&control_->closed[r], __ATOMIC_ACQUIRE) == 0)
        fail({Cause::peer_died, uint8_t(r), 0, Field::none, 0});
    }));
  }
  watches_.push_back(Watchdog::instance().tick([this] {
    look();
    if (failed()) team_->give_up();  // what waits for a rank that will not enter any more
  }));
}

bool P2pEngine::failed() const { return load_acquire(&control_->failure) != 0; }

Failure P2pEngine::first_cause() const { return unpack(load_acquire(&control_->failure)); }

void P2pEngine::fail(Failure failure) {
  failure.sequence = uint32_t(calls_.load());
  set_once(&control_->failure, pack(failure));  // kernels look at it every 10 us
}

// Makes known what kernels have said, and who has left without the rest. Any thread.
void P2pEngine::look() {
  if (failed()) return;
  for (int r = 0; r < nranks(); ++r) {
    const uint64_t word = load_acquire(&memory_->shared->status[r].failure);
    if (word != 0) {
      Failure f = unpack(word);
      if (f.cause == Cause::timeout) {  // its number is that of the channel's calls: the host's is what users count
        __atomic_fetch_or(&control_->waiting_for[f.rank], uint64_t{1} << f.other, __ATOMIC_RELAXED);
        f.sequence = uint32_t(__atomic_load_n(&memory_->shared->calls[f.rank], __ATOMIC_RELAXED));
      }
      set_once(&control_->failure, pack(f));
      return;
    }
    const uint64_t closed = __atomic_load_n(&control_->closed[r], __ATOMIC_ACQUIRE);
    if (r != rank_ && closed != 0 && closed <= calls_.load())  // it left before a call that I have begun
      return fail({Cause::peer_closed, uint8_t(r), 0, Field::none, 0});
  }
}

void P2pEngine::allreduce(const Call&) {
  throw Error(Code::internal, "[dpcomm:INTERNAL] calls of engine p2p need a stream: use enqueue()");
}

std::shared_ptr<Pending> P2pEngine::enqueue(const Call& call, uintptr_t stream) {
  refuse_fork();
  if (!served(call)) throw failure_text().unserved(call);
  if (int64_t(call.counts.size()) > team_->most_tensors())
    throw Error(Code::unsupported, prefix(Code::unsupported, &call) + std::to_string(call.counts.size()) +
                                       " tensors in one call, and " + std::to_string(team_->most_tensors()) +
                                       " are possible. Lower bucket_cap_mb, or pass fewer at a time.");
  look();
  if (failed()) throw cause_error(&call);
  const uint64_t number = ++calls_;
  __atomic_store_n(&memory_->shared->calls[rank_], number, __ATOMIC_RELAXED);  // for messages only
  look();                                                                      // again: who has left before this call?
  if (failed()) throw cause_error(&call);
  auto launch = enter(call, reinterpret_cast<cudaStream_t>(stream));
  count(*launch);
  return std::make_shared<OnStream>(*this, std::move(launch));
}

std::shared_ptr<DeviceTeam::Launch> P2pEngine::enter(const Call& call, cudaStream_t stream) {
  std::shared_ptr<DeviceTeam::Launch> launch;
  try {
    launch = team_->enter(here_, call, stream);
  } catch (const Error& error) {
    throw_cuda(error, call, reinterpret_cast<uintptr_t>(stream));
  }
  const bool over = team_->await_launch(*launch, 0, {});
  if (over && !launch->ended) throw cause_error(&call);  // the ranks of this device disagree
  return launch;
}

void P2pEngine::absent(const std::vector<int>& ranks) {
  for (const int r : ranks) __atomic_fetch_or(&control_->waiting_for[rank_], uint64_t{1} << r, __ATOMIC_RELAXED);
  fail({Cause::timeout, uint8_t(rank_), uint8_t(ranks[0]), Field::none, 0});
  team_->give_up();
}

// `launch` is one that this rank has entered: what it says of this rank stays as it is.
void P2pEngine::count(const DeviceTeam::Launch& launch) {
  const Header& header = launch.headers[size_t(here_)];
  const Segment& last = launch.segments[size_t(here_)].back();
  const int64_t groups = last.first_group + groups_of(last.elems);
  const std::lock_guard lock(stats_mutex_);
  count_call(stats_, header, wire_bytes(header, groups, rank_, nranks(), Reach::memory));
}

void P2pEngine::abort(const std::string& reason) {
  if (in_forked_child() || closed_) return;
  {
    const std::lock_guard lock(abort_mutex_);
    give_up_for(*control_, rank_, calls_.load(), reason);
  }
  team_->give_up();
}

// Stop, drain, let go of the others' memory, wait until they have let go of mine, free it.
void P2pEngine::close() {
  if (in_forked_child() || closed_) return;
  if (!team_->settled_within(here_, kDrainS)) abort("closed while operations were in flight");
  if (closed_.exchange(true)) return;
  known_.reset();
  __atomic_store_n(&control_->closed[rank_], calls_.load() + 1, __ATOMIC_RELEASE);  // before the hang-up
  bool idle = team_->idle_within(kDrainS);
  if (!idle) {
    give_up_for(*control_, rank_, calls_.load(), "closed while operations were in flight");
    idle = team_->idle_within(kDrainS);
  }
  for (const uint64_t watch : watches_) Watchdog::instance().forget(watch);
  std::vector<int> others;
  for (int r = 0; r < nranks(); ++r)
    if (peers_[size_t(r)].socket) others.push_back(r);
  const bool last = --memory_->open == 0;  // of ranks that share a process, whoever closes last gives memory back
  if (!idle)
    park(team_, memory_);
  else if (team_->left(), last)
    memory_->give_back(rank_, others);
  for (Peer& p : peers_) p.socket.reset();
}

void P2pMemory::give_back(int rank, const std::vector<int>& others) {
  for (size_t r = 0; r < arenas.size(); ++r)
    if (int(r) != rank) arenas[r].release();
  if (!shared) return;
  __atomic_store_n(&shared->let_go[rank], 1, __ATOMIC_RELEASE);
  const auto all_gone = [&] {
    return std::all_of(others.begin(), others.end(),
                       [&](int r) { return __atomic_load_n(&shared->let_go[r], __ATOMIC_ACQUIRE) != 0; });
  };
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::duration<double>(kLetGoS);
  while (!all_gone() && std::chrono::steady_clock::now() < deadline)
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  if (size_t(rank) >= arenas.size()) return;
  if (all_gone())
    arenas[size_t(rank)].release();
  else
    arenas[size_t(rank)].leak();
}

Stats P2pEngine::stats(bool reset) {
  refuse_fork();
  const std::lock_guard lock(stats_mutex_);
  const int64_t nonfinite =
      int64_t(__atomic_load_n(&memory_->shared->status[rank_].nonfinite_groups, __ATOMIC_RELAXED));
  Stats now = stats_;
  now.nonfinite_groups = nonfinite - nonfinite_before_;
  if (reset) stats_ = {}, nonfinite_before_ = nonfinite;
  return now;
}

Description P2pEngine::describe() {
  refuse_fork();
  Description d;
  d.engine = "p2p";
  d.name = name_;
  d.arena_bytes = geometry_.arena_bytes;
  d.slot_bytes = geometry_.slot_bytes;
  d.slots = geometry_.slots;
  d.channels = d.max_ctas = geometry_.channels;
  d.rejected_connections = rejected_connections_;
  d.sequence = calls_.load() - uncounted_;
  d.device = device();
  for (const DeviceInfo& info : cuda_devices())
    if (info.ordinal == device()) d.device_name = info.name;
  d.arena = geometry_.pinned ? "pinned" : "device";
  for (const Peer& p : peers_) {
    d.pids.push_back(p.pid);
    d.peers.push_back(p.how);
  }
  return d;
}

}  // namespace dpcomm
