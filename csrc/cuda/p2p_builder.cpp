#include "p2p_builder.h"

#include <unistd.h>

#include <algorithm>
#include <cstdlib>

#include "cta_lease.h"

namespace dpcomm {

namespace {

// Of one wait in the first calls: what does not arrive by then never will. At most half of what the others wait for the
// outcome.
constexpr double kVerifyS = 10;

size_t host_bytes(const P2pGeometry& g) { return sizeof(P2pShared) + size_t(g.pinned ? g.arena_bytes : 0); }

int checked(int device) {
  if (const std::string reason = cuda_unusable_reason(); !reason.empty())
    throw Error(Code::argument, "CUDA not available: " + reason + ".");
  int devices = 0;
  check_cuda(cudaGetDeviceCount(&devices), "cudaGetDeviceCount");
  if (device < 0 || device >= devices)
    throw Error(Code::argument,
                "there is no GPU " + std::to_string(device) + ": this process sees " + std::to_string(devices) + ".");
  return device;
}

// `control` is rank 0's shared memory, registered.
void use_control(P2pMemory& memory, P2pShared* host, char* device) {
  auto* const mapped = reinterpret_cast<P2pShared*>(device);
  memory.shared = host;
  memory.first_cause = &mapped->control.failure;
  memory.status = mapped->status;
}

std::vector<char*> addresses(const std::vector<PeerMemory>& arenas) {
  std::vector<char*> all;
  for (const PeerMemory& a : arenas) all.push_back(a.data());
  return all;
}

// Two ranks that this process launches one after the other wait for each other.
void refuse_blocking_launches() {
  const char* const blocking = std::getenv("CUDA_LAUNCH_BLOCKING");
  if (blocking && std::string(blocking) == "1")
    throw Error(Code::argument,
                "CUDA_LAUNCH_BLOCKING=1 with several ranks in a process: the first one's kernel waits for "
                "the others', which could not be launched before it has ended. Unset it, or give each "
                "rank a process.");
}

DeviceTeam::Setup setup(int device, std::vector<int> ranks, const P2pGeometry& g, const P2pMemory& memory,
                        std::vector<char*> arenas, double timeout_s) {
  return {device,
          std::move(ranks),
          g,
          std::move(arenas),
          memory.first_cause,
          &memory.shared->control,
          memory.status,
          std::min(timeout_s / 2, kVerifyS)};
}

}  // namespace

int p2p_channels(int device, int ranks_here, const P2pWish& wish) {
  const int wanted = wanted_ctas(wish), left = CtaLease::left(checked(device));
  const int each = std::min(wanted, left / ranks_here);
  if (each < 1) CtaLease(device, ranks_here);  // throws: says what is left
  return each;
}

P2pBuilder::P2pBuilder(int rank, int nranks, int device, const P2pWish& wish, int channels)
    : rank_(rank),
      device_(checked(device)),
      geometry_(p2p_geometry(nranks, channels, wish)),
      host_bytes_(host_bytes(geometry_)),
      host_(Arena::create(host_bytes_)),
      rendezvous_(rank, nranks),
      memory_(std::make_shared<P2pMemory>()) {
  const CurrentDevice current(device_);
  if (!geometry_.pinned) arena_ = PeerMemory::allocate(size_t(geometry_.arena_bytes));
  reinterpret_cast<P2pShared*>(host_.data())->mine = arena_.exported(device_);
}

// Construction failed on some rank: what the others have mapped of mine must outlive that.
P2pBuilder::~P2pBuilder() {
  std::vector<int> others;
  for (int r = 0; r < int(peers_.size()); ++r)
    if (peers_[size_t(r)].socket) others.push_back(r);
  if (!others.empty()) memory_->give_back(rank_, others);
}

void P2pBuilder::bind(const Secret& secret, double timeout_s) {
  std::vector<Link> links = rendezvous_.bind(secret, host_.fd(), host_.bytes(), timeout_s);
  const CurrentDevice current(device_);
  for (int r = 0; r < geometry_.nranks; ++r) {
    Link& link = links[size_t(r)];
    memory_->host.push_back(r == rank_ ? std::move(host_) : Arena::adopt(std::move(link.memory), host_bytes_));
    memory_->host.back().forget_fd();
    peers_.push_back({r == rank_ ? getpid() : link.pid, std::move(link.socket), ""});
  }
  auto* const zero = reinterpret_cast<P2pShared*>(memory_->host[0].data());
  memory_->shared = zero;
  memory_->arenas.resize(size_t(geometry_.nranks));
  memory_->arenas[size_t(rank_)] =
      std::move(arena_);  // first: if a peer cannot be reached, others may have mapped mine
  for (int r = 0; r < geometry_.nranks; ++r) reach(r, peers_[size_t(r)].pid);
  if (!geometry_.pinned) memory_->pins.push_back(PeerMemory::pin(memory_->host[0].data(), host_bytes_));
  use_control(*memory_, zero, memory_->pins[0].data());
}

// How this rank finds the arena of another one.
void P2pBuilder::reach(int rank, int pid) {
  char* const host = memory_->host[size_t(rank)].data();
  const PeerExport& theirs = reinterpret_cast<const P2pShared*>(host)->mine;
  PeerMemory& arena = memory_->arenas[size_t(rank)];
  if (pid == getpid() && rank != rank_) refuse_blocking_launches();
  if (geometry_.pinned) {
    memory_->pins.push_back(PeerMemory::pin(host, host_bytes_));
    arena = PeerMemory::borrow(memory_->pins.back().data() + sizeof(P2pShared));
  } else if (rank != rank_ && pid == getpid()) {  // opening a handle in the process that made it fails
    if (int(theirs.device) != device_) enable_peer_access(device_, int(theirs.device), rank);
    arena = PeerMemory::borrow(reinterpret_cast<char*>(theirs.address));
  } else if (rank != rank_) {
    arena = PeerMemory::open(theirs, rank);
  }
  peers_[size_t(rank)].how = geometry_.pinned ? "pinned host memory" : arena.how();
}

std::unique_ptr<P2pEngine> P2pBuilder::finish(double timeout_s, const std::string& name) {
  if (peers_.empty()) throw Error(Code::internal, "[dpcomm:INTERNAL] finish() before bind()");
  const CurrentDevice current(device_);
  auto team =
      std::make_shared<DeviceTeam>(setup(device_, {rank_}, geometry_, *memory_, addresses(memory_->arenas), timeout_s));
  memory_->open = 1;
  auto engine = std::make_unique<P2pEngine>(
      P2pEngine::Place{rank_, 0, std::move(team), memory_, std::move(peers_), geometry_, rejected()});
  engine->prepare_verify(std::min(timeout_s / 2, kVerifyS));
  engine->begin_verify();
  engine->end_verify(timeout_s, name);
  return engine;
}

namespace {

// The memory of ranks that share a process: no handles, no sockets.
std::shared_ptr<P2pMemory> local_memory(const std::vector<int>& devices, const P2pGeometry& g) {
  auto memory = std::make_shared<P2pMemory>();
  const CurrentDevice first(devices[0]);
  const size_t pinned = g.pinned ? size_t(g.arena_bytes) : 0;
  memory->host.push_back(Arena::anonymous(sizeof(P2pShared) + pinned * devices.size()));
  char* const host = memory->host[0].data();
  memory->pins.push_back(PeerMemory::pin(host, memory->host[0].bytes()));
  use_control(*memory, reinterpret_cast<P2pShared*>(host), memory->pins[0].data());
  for (size_t r = 0; r < devices.size(); ++r) {
    const CurrentDevice current(devices[r]);
    memory->arenas.push_back(g.pinned ? PeerMemory::borrow(memory->pins[0].data() + sizeof(P2pShared) + r * pinned)
                                      : PeerMemory::allocate(size_t(g.arena_bytes)));
  }
  for (const int from : devices)
    for (size_t r = 0; r < devices.size() && !g.pinned; ++r)
      if (devices[r] != from) enable_peer_access(from, devices[r], int(r));
  memory->open = int(devices.size());
  return memory;
}

}  // namespace

std::vector<std::unique_ptr<P2pEngine>> p2p_local(const std::vector<int>& devices, const P2pWish& wish,
                                                  double timeout_s, const std::string& name) {
  std::map<int, std::vector<int>> here;  // device -> its ranks
  for (size_t r = 0; r < devices.size(); ++r) here[checked(devices[r])].push_back(int(r));
  if (here.size() > 1) refuse_blocking_launches();
  int channels = kMostCtas;
  for (const auto& [device, ranks] : here) channels = std::min(channels, p2p_channels(device, int(ranks.size()), wish));
  const P2pGeometry g = p2p_geometry(int(devices.size()), channels, wish);
  const auto memory = local_memory(devices, g);
  std::map<int, std::shared_ptr<DeviceTeam>> teams;
  for (const auto& [device, ranks] : here) {
    const CurrentDevice current(device);
    teams[device] =
        std::make_shared<DeviceTeam>(setup(device, ranks, g, *memory, addresses(memory->arenas), timeout_s));
  }
  std::vector<std::unique_ptr<P2pEngine>> engines;
  for (size_t r = 0; r < devices.size(); ++r) {
    const std::vector<int>& ranks = here[devices[r]];
    std::vector<P2pEngine::Peer> peers(devices.size());
    for (size_t p = 0; p < peers.size(); ++p)
      peers[p].pid = getpid(), peers[p].how = g.pinned ? "pinned host memory" : p == r ? "own" : "plain pointer";
    const int at = int(std::find(ranks.begin(), ranks.end(), int(r)) - ranks.begin());
    engines.push_back(
        std::make_unique<P2pEngine>(P2pEngine::Place{int(r), at, teams[devices[r]], memory, std::move(peers), g, 0}));
  }
  for (auto& engine : engines) engine->prepare_verify(std::min(timeout_s / 2, kVerifyS));
  for (auto& engine : engines) engine->begin_verify();
  for (auto& engine : engines) engine->end_verify(timeout_s, name);
  return engines;
}

}  // namespace dpcomm
