// Ranks of a call ledger for its tests: objects in one process over socket pairs or TCP on loopback, with what each was
// told, and puppets, whose ends of the sockets the test holds itself.
#pragma once
#include <atomic>
#include <future>
#include <mutex>
#include <numeric>

#include "../../csrc/host/call_ledger.h"
#include "../../csrc/host/watchdog.h"
#include "control_plane_tests.h"

namespace ledgers {

using namespace planes;
using namespace std::chrono_literals;

// Behind what is compared there is room for a mark: all 64 bytes arrive, and from the right rank.
inline Header marked(uint64_t call, int rank) {
  Header h = header_of_call(call);
  const uint64_t mark = call * 100 + uint64_t(rank);
  std::memcpy(reinterpret_cast<char*>(&h) + 56, &mark, sizeof mark);
  return h;
}
inline bool same(const Header& a, const Header& b) { return std::memcmp(&a, &b, sizeof a) == 0; }

inline bool eventually(const std::function<bool()>& holds) {
  for (const auto start = Clock::now(); seconds_since(start) < patience_s; std::this_thread::sleep_for(1ms))
    if (holds()) return true;
  return false;
}

// One rank, and what it was told.
struct Rank {
  Rank(int rank, std::vector<PeerSockets>& sockets, uint64_t most_ahead,
       std::function<void(uint64_t)> on_agreed = nullptr)
      : number(rank), on_agreed(std::move(on_agreed)) {
    std::vector<UniqueFd> headers;
    for (PeerSockets& peer : sockets) headers.push_back(std::move(peer.headers));
    CallLedger::Listener listener{
        [this](uint64_t call) { hear(call); },
        [this](const Failure& failure, uint64_t blamed) { hear_failure(failure, blamed); },
    };
    ledger = std::make_unique<CallLedger>(rank, std::move(headers), std::move(listener), most_ahead);
  }
  void hear(uint64_t call) {
    CHECK(calls_inside++ == 0 && !closed && ledger->agreed() >= call && ledger->missing(call) == 0);
    if (on_agreed) on_agreed(call);
    const std::lock_guard lock(mutex);
    agreed.push_back(call);
    --calls_inside;
  }
  void hear_failure(const Failure& failure, uint64_t blamed) {
    CHECK(calls_inside++ == 0 && !closed);
    const std::lock_guard lock(mutex);
    failures.emplace_back(pack(failure), blamed);
    --calls_inside;
  }
  void post(uint64_t call) { ledger->post(marked(call, number)); }
  void close() {
    ledger->close();
    closed = true;
  }
  std::vector<uint64_t> heard() const {
    const std::lock_guard lock(mutex);
    return agreed;
  }
  bool heard_all(uint64_t calls) const {  // each once, in order
    std::vector<uint64_t> expected(calls);
    std::iota(expected.begin(), expected.end(), uint64_t{1});
    return heard() == expected;
  }
  size_t failed() const {
    const std::lock_guard lock(mutex);
    return failures.size();
  }

  const int number;
  const std::function<void(uint64_t)> on_agreed;
  mutable std::mutex mutex;
  std::vector<uint64_t> agreed;
  std::vector<std::pair<uint64_t, uint64_t>> failures;  // packed, blamed
  std::atomic<int> calls_inside{0};
  std::atomic<bool> closed{false};
  std::unique_ptr<CallLedger> ledger;
};

struct Ledgers {
  Mesh mesh;
  std::vector<std::unique_ptr<Rank>> ranks;  // empty: a puppet, or not there yet
  explicit Ledgers(int nranks, uint64_t puppets = 0, bool tcp = false, int send_bytes = 0)
      : mesh(mesh_of(nranks, tcp)), ranks(static_cast<size_t>(nranks)) {
    for (auto& row : mesh)
      for (PeerSockets& peer : row)
        if (send_bytes > 0 && peer.headers)
          CHECK(::setsockopt(peer.headers.get(), SOL_SOCKET, SO_SNDBUF, &send_bytes, sizeof send_bytes) == 0);
    for (int r = 0; r < nranks; ++r)
      if ((puppets >> r & 1) == 0) wake(r);
  }
  void wake(int r, uint64_t most_ahead = CallLedger::kMostAhead, std::function<void(uint64_t)> on_agreed = nullptr) {
    ranks[size_t(r)] = std::make_unique<Rank>(r, mesh[size_t(r)], most_ahead, std::move(on_agreed));
  }
  Rank& operator[](int r) { return *ranks[size_t(r)]; }
  CallLedger& ledger(int r) { return *ranks[size_t(r)]->ledger; }
  int size() const { return int(ranks.size()); }
  int socket(int puppet, int peer) { return mesh[size_t(puppet)][size_t(peer)].headers.get(); }
  bool all_heard(uint64_t calls) {
    return eventually([&] {
      return std::all_of(ranks.begin(), ranks.end(), [&](auto& rank) { return rank->heard().size() >= calls; });
    });
  }
};

// While it exists the watchdog's thread is stuck: only post() and poll() move anything.
struct WatchdogBusy {
  WatchdogBusy() {
    std::promise<void> stuck;
    id = Watchdog::instance().watch_bytes(mine.get(), [this, &stuck] {
      stuck.set_value();
      go_on.get_future().wait();
      return false;
    });
    CHECK(say(theirs.get(), "x", 1));
    stuck.get_future().wait();
  }
  ~WatchdogBusy() {
    go_on.set_value();
    Watchdog::instance().forget(id);
  }
  const std::pair<int, int> pair = unix_pair();
  const UniqueFd mine{pair.first}, theirs{pair.second};
  std::promise<void> go_on;
  uint64_t id = 0;
};

}  // namespace ledgers
