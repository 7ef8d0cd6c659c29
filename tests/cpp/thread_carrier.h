// A carrier between ranks that are threads of one process. It is as unhelpful as the interface allows: a thread of its
// own moves messages some time later, in any order; what is to be received is garbage until then; a send ends before
// or after its receive has begun. And it is strict: ranks that ask for what the interface forbids end the program.
#pragma once
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "carried/carrier.h"

namespace carried {

using namespace dpcomm;

inline void demand(bool holds, const char* what, int rank) {
  if (holds) return;
  std::fprintf(stderr, "carrier of rank %d: failed: %s\n", rank, what);
  std::_Exit(1);
}

// Where the messages of all ranks meet.
class Board {
 public:
  explicit Board(int nranks, uint32_t seed = 1)
      : sides_(static_cast<size_t>(nranks)), random_(seed), mover_([this] { work(); }) {}
  ~Board() {
    {
      const std::lock_guard lock(mutex_);
      stop_ = true;
      work_.notify_all();
    }
    mover_.join();
  }
  Board(const Board&) = delete;

  std::unique_ptr<Carrier> carrier(int rank);  // the board outlives it
  void abort(int rank);

  // Faults. Messages from `rank` that are sent from now on are lost; its sends end all the same.
  void lose(int rank) { set(&Side::lost, rank); }
  // The next wait of `rank` breaks.
  void cut(int rank) { set(&Side::cut, rank); }
  // A byte of each message from `rank` is wrong.
  void spoil(int rank) { set(&Side::spoiled, rank); }

  int64_t sent_bytes(int rank) { return get(&Side::sent_bytes, rank); }
  int64_t exchanges(int rank) { return get(&Side::next, rank); }
  bool aborted(int rank) { return get(&Side::aborted, rank); }
  bool holds_memory(int rank) { return !get(&Side::held, rank).empty(); }

 private:
  friend class ThreadCarrier;
  struct Held {  // memory of a transfer that has not been waited for
    const char *begin, *end;
    bool sent;
    int64_t ticket;
  };
  struct Side {
    std::condition_variable changed;
    std::map<int64_t, int> missing;  // ticket -> transfers that are not done
    std::vector<Held> held;
    int64_t next = 0, sent_bytes = 0;
    std::map<int, int64_t> to, from;  // messages by peer
    bool aborted = false, closed = false, lost = false, cut = false, spoiled = false;
    std::thread::id user;
  };
  using Key = std::tuple<int, int, int64_t>;  // from, to, the how manyth message
  struct Message {
    const char* from = nullptr;
    char* to = nullptr;
    int64_t sent = 0, wanted = 0;
    int64_t send = -1, receive = -1;  // the tickets of both sides
    bool copied = false;
    std::vector<char> copy;  // on the wire
  };

  template <class T>
  void set(T Side::* what, int rank) {
    const std::lock_guard lock(mutex_);
    sides_[size_t(rank)].*what = true;
    sides_[size_t(rank)].changed.notify_all();
  }
  template <class T>
  T get(T Side::* what, int rank) {
    const std::lock_guard lock(mutex_);
    return sides_[size_t(rank)].*what;
  }

  int64_t exchange(int rank, const std::vector<Transfer>& sends, const std::vector<Transfer>& receives);
  Arrival wait(int rank, int64_t ticket, double timeout_s);
  void close(int rank);
  void hold(int rank, const std::vector<Transfer>& transfers, bool sent, int64_t ticket);
  void post(const Key& key);
  void done(int rank, int64_t ticket);
  void move(const Key& key);
  void work();

  std::mutex mutex_;
  std::condition_variable work_;
  std::vector<Side> sides_;
  std::map<Key, Message> messages_;
  std::vector<Key> ready_;  // something may be done about them
  std::mt19937 random_;
  bool stop_ = false;
  std::thread mover_;
};

class ThreadCarrier final : public Carrier {
 public:
  ThreadCarrier(Board& board, int rank) : board_(board), rank_(rank) {}
  int64_t exchange(const std::vector<Transfer>& sends, const std::vector<Transfer>& receives) override {
    return board_.exchange(rank_, sends, receives);
  }
  Arrival wait(int64_t ticket, double timeout_s) override { return board_.wait(rank_, ticket, timeout_s); }
  void abort() override { board_.abort(rank_); }
  void close() override { board_.close(rank_); }

 private:
  Board& board_;
  const int rank_;
};

inline std::unique_ptr<Carrier> Board::carrier(int rank) { return std::make_unique<ThreadCarrier>(*this, rank); }

inline int64_t Board::exchange(int rank, const std::vector<Transfer>& sends, const std::vector<Transfer>& receives) {
  const std::lock_guard lock(mutex_);
  Side& side = sides_[size_t(rank)];
  if (side.user == std::thread::id()) side.user = std::this_thread::get_id();
  demand(side.user == std::this_thread::get_id(), "exchanges come from one thread", rank);
  demand(!side.closed, "no exchange after close()", rank);
  const int64_t ticket = side.next++;
  if (side.aborted) {
    side.missing[ticket] = 0;
    return ticket;
  }
  hold(rank, sends, true, ticket);
  hold(rank, receives, false, ticket);
  side.missing[ticket] = int(sends.size() + receives.size());
  for (const Transfer& t : sends) {
    const Key key{rank, t.peer, side.to[t.peer]++};
    Message& m = messages_[key];
    m.from = t.data, m.sent = t.bytes, m.send = ticket;
    side.sent_bytes += t.bytes;
    post(key);
  }
  for (const Transfer& t : receives) {
    std::memset(t.data, int(0x80 | random_() % 128), size_t(t.bytes));
    const Key key{t.peer, rank, side.from[t.peer]++};
    Message& m = messages_[key];
    m.to = t.data, m.wanted = t.bytes, m.receive = ticket;
    post(key);
  }
  return ticket;
}

// Transfers that are under way share no memory, unless all only read it.
inline void Board::hold(int rank, const std::vector<Transfer>& transfers, bool sent, int64_t ticket) {
  std::vector<Held>& held = sides_[size_t(rank)].held;
  std::vector<bool> met(sides_.size());
  for (const Transfer& t : transfers) {
    demand(t.peer >= 0 && t.peer < int(sides_.size()) && t.peer != rank, "a peer is another rank", rank);
    demand(t.bytes > 0, "a message is not empty", rank);
    demand(!met[size_t(t.peer)], "one message to and from each peer", rank);
    met[size_t(t.peer)] = true;
    for (const Held& h : held)
      demand((sent && h.sent) || t.data + t.bytes <= h.begin || h.end <= t.data, "memory is in use once", rank);
    held.push_back({t.data, t.data + t.bytes, sent, ticket});
  }
}

inline void Board::post(const Key& key) {
  const Message& m = messages_[key];
  if (m.from && m.to) demand(m.sent == m.wanted, "messages are received as large as they are sent", std::get<1>(key));
  if (m.copied) demand(m.sent == m.wanted, "messages are received as large as they were sent", std::get<1>(key));
  const bool lost = sides_[size_t(std::get<0>(key))].lost;
  if (!lost && !m.copied && !(m.from && m.to) && random_() % 2) return;  // the sender must wait for its peer
  ready_.push_back(key);
  work_.notify_one();
}

inline void Board::done(int rank, int64_t ticket) {
  Side& side = sides_[size_t(rank)];
  if (--side.missing[ticket] == 0) side.changed.notify_all();
}

// Takes a message one step further: from its sender, to its receiver, or both.
inline void Board::move(const Key& key) {
  const auto [from, to, number] = key;
  const auto found = messages_.find(key);
  if (found == messages_.end()) return;
  Message& m = found->second;
  Side& sender = sides_[size_t(from)];
  if (m.from) {
    m.copy.assign(m.from, m.from + m.sent);
    if (sender.spoiled) m.copy[size_t(m.sent) / 2] ^= 1;
    m.copied = true;
    m.from = nullptr;
    done(from, m.send);
  }
  if (sender.lost || !m.copied || !m.to) return;
  std::memcpy(m.to, m.copy.data(), m.copy.size());
  done(to, m.receive);
  messages_.erase(found);
}

inline void Board::work() {
  std::unique_lock lock(mutex_);
  while (!stop_) {
    if (ready_.empty()) {
      work_.wait(lock);
      continue;
    }
    std::swap(ready_[random_() % ready_.size()], ready_.back());
    const Key key = ready_.back();
    ready_.pop_back();
    move(key);
    if (random_() % 32 != 0) continue;
    const auto pause = std::chrono::microseconds(random_() % 100);
    lock.unlock();
    std::this_thread::sleep_for(pause);
    lock.lock();
  }
}

inline Arrival Board::wait(int rank, int64_t ticket, double timeout_s) {
  std::unique_lock lock(mutex_);
  Side& side = sides_[size_t(rank)];
  demand(side.user == std::this_thread::get_id(), "the thread that exchanges waits", rank);
  demand(side.missing.count(ticket) == 1, "tickets are waited for once each", rank);
  const auto ended = [&] { return side.aborted || side.cut || side.missing[ticket] == 0; };
  const bool in_time = side.changed.wait_for(lock, std::chrono::duration<double>(timeout_s), ended);
  if (side.aborted) return {Arrival::Kind::broken, -1, "the carrier has been aborted"};
  if (side.cut) return {Arrival::Kind::broken, -1, "the cable is cut"};
  if (!in_time) {
    for (const auto& [key, m] : messages_)
      if (std::get<1>(key) == rank && m.receive == ticket && m.to) return {Arrival::Kind::late, std::get<0>(key), ""};
    return {Arrival::Kind::late, -1, ""};
  }
  std::erase_if(side.held, [&](const Held& h) { return h.ticket == ticket; });
  side.missing.erase(ticket);
  return {};
}

inline void Board::abort(int rank) {
  const std::lock_guard lock(mutex_);
  Side& side = sides_[size_t(rank)];
  side.aborted = true;
  side.held.clear();
  for (auto& [key, m] : messages_) {
    if (std::get<0>(key) == rank) m.from = nullptr;
    if (std::get<1>(key) == rank) m.to = nullptr;
  }
  side.changed.notify_all();
}

inline void Board::close(int rank) {
  const std::lock_guard lock(mutex_);
  Side& side = sides_[size_t(rank)];
  demand(side.held.empty(), "nothing is in flight when the carrier is closed", rank);
  side.closed = true;
}

}  // namespace carried
