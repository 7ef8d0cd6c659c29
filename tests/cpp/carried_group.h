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
#include "thread_carrier.h"
#include "thread_ranks.h"

namespace carried {

using namespace thread_ranks;

constexpr int64_t kScratch = 64LL << 20;  // most of it is never touched

struct Shape {
  int ranks;
  double timeout_s = patience_s;
  int64_t slice_bytes = 1;  // the smallest slots: many slices, and slots are used again
  uint64_t unwatched = 0;   // a bit for each rank whose carrier nobody else aborts
  int spoiled = -1;         // whose messages are wrong from the start
};

class Rank {
 public:
  Rank(const Shape& shape, int rank, Board& board, std::vector<PeerSockets> sockets, std::latch& ready) {
    for (const PeerSockets& s : sockets) descriptors_.push_back({::dup(s.control.get()), ::dup(s.headers.get())});
    auto made = std::make_unique<CarriedEngine>(
        rank, CarriedWish{kScratch, shape.slice_bytes}, std::vector<CarriedPeer>(size_t(shape.ranks), {getpid(), ""}),
        std::make_unique<ControlPlane>(rank, std::move(sockets)), board.carrier(rank), isa("portable"), "threads");
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
    std::latch ready(shape.ranks);
    for (int r = 0; r < shape.ranks; ++r)
      ranks.push_back(std::make_unique<Rank>(shape, r, board, std::move(mesh[size_t(r)]), ready));
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
