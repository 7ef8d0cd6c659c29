#include "shm_builder.h"

#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <exception>
#include <thread>

namespace dpcomm {

ShmBuilder::ShmBuilder(int rank, int nranks, const Wish& wish, const std::string& simd)
    : rank_(rank),
      isa_(isa(simd.c_str())),
      geometry_(geometry(nranks, wish)),
      arena_(Arena::create(size_t(geometry_.arena_bytes))),
      rendezvous_(rank, nranks) {}

void ShmBuilder::bind(const Secret& secret, double timeout_s) {
  std::vector<Link> links = rendezvous_.bind(secret, arena_.fd(), arena_.bytes(), timeout_s);
  for (int r = 0; r < geometry_.nranks; ++r) {
    ShmEngine::Peer peer;
    if (r == rank_) {
      peer.arena = std::move(arena_);
      peer.pid = getpid();
    } else {
      peer.arena = Arena::adopt(std::move(links[r].memory), size_t(geometry_.arena_bytes));
      peer.pid = links[r].pid;
      peer.socket = std::move(links[r].socket);
    }
    peer.arena.forget_fd();
    peers_.push_back(std::move(peer));
  }
}

std::unique_ptr<HostMemory> ShmBuilder::share(std::vector<std::vector<int>> hosts, CodecKind codec) {
  if (peers_.empty()) throw Error(Code::internal, "[dpcomm:INTERNAL] share() before bind()");
  auto mapped = std::make_shared<std::vector<Arena>>();
  auto memory = std::make_unique<HostMemory>(HostMemory{std::move(hosts), codec, geometry_, {}, mapped});
  for (ShmEngine::Peer& p : peers_) {
    memory->arenas.push_back(p.arena.data());
    mapped->push_back(std::move(p.arena));
  }
  peers_.clear();  // the sockets: engines between hosts have others
  return memory;
}

std::unique_ptr<ShmEngine> ShmBuilder::finish(double timeout_s, const std::string& name) {
  if (peers_.empty()) throw Error(Code::internal, "[dpcomm:INTERNAL] finish() before bind()");
  auto engine = std::make_unique<ShmEngine>(rank_, geometry_, std::move(peers_), isa_, rejected());
  engine->verify(timeout_s, name);
  return engine;
}

std::vector<std::unique_ptr<ShmEngine>> local_engines(int nranks, const Wish& wish, double timeout_s,
                                                      const std::string& simd, const std::string& name) {
  const Geometry g = geometry(nranks, wish);
  // One piece of memory, so that every engine maps every rank at the same address; the last engine unmaps it.
  auto memory = std::make_shared<std::vector<Arena>>();
  for (int r = 0; r < nranks; ++r) memory->push_back(Arena::anonymous(size_t(g.arena_bytes)));
  std::vector<std::unique_ptr<ShmEngine>> engines;
  for (int r = 0; r < nranks; ++r) engines.push_back(std::make_unique<ShmEngine>(r, g, memory, isa(simd.c_str())));
  std::exception_ptr error;  // of the first that failed
  std::atomic<int> first{-1};
  std::vector<std::thread> threads;
  for (int r = 0; r < nranks; ++r)
    threads.emplace_back([&, r] {
      try {
        engines[r]->verify(timeout_s, name);
      } catch (...) {
        int none = -1;
        if (first.compare_exchange_strong(none, r)) error = std::current_exception();
        engines[r]->abort("another rank could not be verified");
      }
    });
  for (std::thread& t : threads) t.join();
  if (error) std::rethrow_exception(error);
  return engines;
}

}  // namespace dpcomm
