// A communicator of engine CarriedEngine whose ranks are threads: a queue per rank in front of it, a thread that serves
// the queue, and one that aborts the carrier once the communicator has failed, as Python's threads do.
#pragma once
#include <unistd.h>

#include <functional>
#include <latch>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "control_plane_group.h"
#include "cpu/carried_engine.h"
#include "host/arena.h"
#include "thread_carrier.h"
#include "thread_ranks.h"

namespace carried {

using namespace thread_ranks;

constexpr int64_t kScratch = 64LL << 20;  // most of it is never touched

struct Shape {
  int ranks;
  double timeout_s = patience_s;
  int64_t slice_bytes = 1;                   // the smallest slots: many slices, and slots are used again
  uint64_t unwatched = 0;                    // a bit for each rank whose carrier nobody else aborts
  int spoiled = -1;                          // whose messages are wrong from the start
  std::vector<std::vector<int>> hosts = {};  // of algorithm two_level; none: without it
  bool fp16_inside = false;
};

// The smallest messages inside a host: many a round, and slots are used again.
constexpr int64_t kInside = 256LL << 10, kInsideSlice = 4096;

using Memory = std::shared_ptr<std::vector<Arena>>;

inline Geometry geometry_inside(int ranks) { return geometry(ranks, Wish{kInside, 1, false, true, 4, kInsideSlice}); }

// What each host's ranks share, by rank.
inline std::vector<Memory> memory_of(const Shape& shape) {
  std::vector<Memory> by_rank(size_t(shape.ranks));
  for (const std::vector<int>& ranks : shape.hosts) {
    const Memory memory = std::make_shared<std::vector<Arena>>();
    for (const int r : ranks) {
      memory->push_back(Arena::anonymous(size_t(geometry_inside(int(ranks.size())).arena_bytes)));
      by_rank[size_t(r)] = memory;
    }
  }
  return by_rank;
}

inline std::unique_ptr<HostMemory> share(const Shape& shape, const Memory& memory) {
  if (!memory) return nullptr;
  const CodecKind codec = shape.fp16_inside ? CodecKind::fp16 : CodecKind::none;
  auto made =
      std::make_unique<HostMemory>(HostMemory{shape.hosts, codec, geometry_inside(int(memory->size())), {}, memory});
  for (const Arena& arena : *memory) made->arenas.push_back(arena.data());
  return made;
}

class Rank {
 public:
  Rank(const Shape& shape, int rank, Board& board, std::vector<PeerSockets> sockets, const Memory& memory,
       std::latch& ready) {
    for (const PeerSockets& s : sockets) descriptors_.push_back({::dup(s.control.get()), ::dup(s.headers.get())});
    auto made = std::make_unique<CarriedEngine>(rank, CarriedWish{kScratch, shape.slice_bytes},
                                                std::vector<CarriedPeer>(size_t(shape.ranks), {getpid(), ""}),
                                                std::make_unique<ControlPlane>(rank, std::move(sockets)),
                                                board.carrier(rank), isa("portable"), "threads", share(shape, memory));
    CarriedEngine& engine = *made;
    queue = std::make_unique<Queue>(std::move(made));
    if ((shape.unwatched >> rank & 1) == 0)
      watcher_ = std::thread([&engine, &board, rank] {
        if (engine.wait_failed(1e9)) board.abort(rank);
      });
    server_ = std::thread([this, &engine, &ready, timeout_s = shape.timeout_s] {
      try {
        engine.verify(timeout_s, "abcd");
      } catch (const Error& error) {
        unverified = std::make_unique<Error>(error);
      }
      ready.count_down();
      queue->serve();
    });
  }
  ~Rank() {
    queue->close(0);
    if (watcher_.joinable()) watcher_.join();
    server_.join();
    for (const auto& [control, headers] : descriptors_) ::close(control), ::close(headers);
  }
  // For its peers it ends without a word, as a process does that is killed.
  void die() {
    for (const auto& [control, headers] : descriptors_) ::shutdown(control, SHUT_WR), ::shutdown(headers, SHUT_WR);
  }
  Engine& engine() { return queue->engine(); }

  std::unique_ptr<Queue> queue;
  std::unique_ptr<Error> unverified;

 private:
  std::vector<std::pair<int, int>> descriptors_;
  std::thread watcher_, server_;
};

struct Group {
  explicit Group(const Shape& s) : shape(s), board(s.ranks) {
    if (shape.spoiled >= 0) board.spoil(shape.spoiled);
    planes::Mesh mesh = planes::mesh_of(shape.ranks);
    const std::vector<Memory> memory = memory_of(shape);
    std::latch ready(shape.ranks);
    for (int r = 0; r < shape.ranks; ++r)
      ranks.push_back(std::make_unique<Rank>(shape, r, board, std::move(mesh[size_t(r)]), memory[size_t(r)], ready));
    ready.wait();
    for (const auto& rank : ranks)
      if (shape.spoiled < 0 && !CHECK(!rank->unverified)) std::fprintf(stderr, "  %s\n", rank->unverified->what());
  }
  explicit Group(int nranks, double timeout_s = patience_s) : Group(Shape{nranks, timeout_s}) {}

  int size() const { return shape.ranks; }
  Queue& queue(int r) const { return *ranks[size_t(r)]->queue; }
  Engine& engine(int r) const { return ranks[size_t(r)]->engine(); }
  void all(const std::function<void(int)>& body) const { in_threads(size(), body); }
  // Until every rank has begun an exchange, beyond those of verify().
  void until_payload_moves(const std::vector<int64_t>& before) {
    for (int r = 0; r < size(); ++r)
      while (board.exchanges(r) == before[size_t(r)]) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  std::vector<int64_t> exchanges() {
    std::vector<int64_t> all;
    for (int r = 0; r < size(); ++r) all.push_back(board.exchanges(r));
    return all;
  }

  const Shape shape;
  Board board;  // outlives the carriers
  std::vector<std::unique_ptr<Rank>> ranks;
};

}  // namespace carried
