#include "call_ledger.h"

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "../core/mailbox.h"
#include "../error.h"
#include "control_frame.h"
#include "watchdog.h"

namespace dpcomm {

void CallLedger::Log::append(const Header& header) {
  headers.push_back(header);
  ++calls;
  last_sequence = header.sequence;
}

void CallLedger::Log::forget_before(uint64_t call) {
  while (!headers.empty() && first() < call) headers.pop_front();
}

CallLedger::CallLedger(int rank, std::vector<UniqueFd> sockets, Listener listener, uint64_t most_ahead)
    : rank_(rank),
      most_ahead_(most_ahead),
      generation_(fork_generation()),
      listener_(std::move(listener)),
      peers_(sockets.size()),
      logs_(sockets.size()) {
  if (nranks() > kMaxRanks || rank < 0 || rank >= nranks())
    throw Error(Code::internal, "call ledger of rank " + std::to_string(rank) + " of " + std::to_string(nranks()));
  for (size_t r = 0; r < peers_.size(); ++r) peers_[r].socket = std::move(sockets[r]);
  peers_[size_t(rank)].silent = peers_[size_t(rank)].deaf = true;
  try {
    for (int r = 0; r < nranks(); ++r)
      if (r != rank_)
        watches_.push_back(
            Watchdog::instance().watch_bytes(peers_[size_t(r)].socket.get(), [this, r] { return look_at(r); }));
    watches_.push_back(Watchdog::instance().tick([this] {
      const std::lock_guard lock(mutex_);
      for (int r = 0; !closed_ && r < nranks(); ++r) send_rest(r);
    }));
  } catch (...) {  // nobody calls the destructor
    forget_watches();
    throw;
  }
}

CallLedger::~CallLedger() { close(); }

void CallLedger::forget_watches() {
  for (const uint64_t watch : watches_) Watchdog::instance().forget(watch);
}

void CallLedger::close() {
  if (generation_ != fork_generation()) return;  // other threads, and what they hold, are not here
  {
    const std::lock_guard lock(mutex_);
    for (int r = 0; !closed_ && r < nranks(); ++r) send_rest(r);
    closed_ = true;
  }
  forget_watches();
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return !telling_; });  // as long as one call of a listener, which does not wait
  for (Peer& peer : peers_) hang_up(peer.socket);
}

void CallLedger::post(const Header& mine) {
  if (generation_ != fork_generation()) return;
  std::unique_lock lock(mutex_);
  Log& log = logs_[size_t(rank_)];
  if (closed_ || log.calls - agreed() >= most_ahead_) return;  // too far ahead: it has failed
  log.append(mine);
  for (int r = 0; r < nranks(); ++r) send_rest(r);
  for (int r = 0; r < nranks(); ++r) receive(r);
  compare();
  if (const uint64_t next = agreed() + 1; log.calls - agreed() >= most_ahead_)
    fail({Cause::timeout, uint8_t(rank_), 0, Field::none, uint32_t(next)}, missing_now(next));
  tell(lock);
}

void CallLedger::poll() {
  if (generation_ != fork_generation()) return;
  std::unique_lock lock(mutex_);
  if (closed_) return;
  for (int r = 0; r < nranks(); ++r) receive(r);
  compare();
  tell(lock);
}

// For the watchdog: false once nothing more is to be read from that rank.
bool CallLedger::look_at(int rank) {
  std::unique_lock lock(mutex_);
  if (closed_) return false;
  receive(rank);
  send_rest(rank);  // who talks may be catching up
  compare();
  const bool more = !peers_[size_t(rank)].silent;
  tell(lock);
  return more;
}

// Several headers with one recv: a peer may be far ahead. A rank is at most kMostAhead calls beyond those that it knows
// to be agreed, so beyond mine: who says more is no rank, and is not heard any more.
void CallLedger::receive(int rank) {
  Peer& peer = peers_[size_t(rank)];
  Log& log = logs_[size_t(rank)];
  char* const bytes = reinterpret_cast<char*>(peer.incoming);
  while (!peer.silent) {
    const size_t room = sizeof peer.incoming - peer.received;
    const ssize_t n = ::recv(peer.socket.get(), bytes + peer.received, room, MSG_DONTWAIT);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0 && errno == EAGAIN) return;
    if (n <= 0) {
      peer.silent = true;
      return;
    }
    peer.received += size_t(n);
    const size_t whole = peer.received / sizeof(Header);
    for (size_t i = 0; i < whole && !peer.silent; ++i) {
      log.append(peer.incoming[i]);
      peer.silent = log.calls - std::min(log.calls, logs_[size_t(rank_)].calls) > most_ahead_;
    }
    peer.received -= whole * sizeof(Header);
    std::memmove(bytes, peer.incoming + whole, peer.received);
    if (size_t(n) < room) return;  // nothing was left: usually true, and if not, epoll comes back
  }
}

bool CallLedger::unsent(const Peer& peer) const {
  return !peer.deaf && peer.sent < logs_[size_t(rank_)].calls * sizeof(Header);
}

void CallLedger::send_rest(int rank) {
  Peer& peer = peers_[size_t(rank)];
  const Log& mine = logs_[size_t(rank_)];
  while (unsent(peer)) {
    Header batch[64];                                   // usually one of them is used
    const uint64_t begun = peer.sent / sizeof(Header);  // headers that it has whole
    const size_t count = std::min<uint64_t>(std::size(batch), mine.calls - begun);
    for (size_t i = 0; i < count; ++i) batch[i] = mine.of(begun + 1 + i);
    const size_t skipped = peer.sent % sizeof(Header), bytes = count * sizeof(Header) - skipped;
    const ssize_t n =
        ::send(peer.socket.get(), reinterpret_cast<const char*>(batch) + skipped, bytes, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (n >= 0)
      peer.sent += uint64_t(n);
    else if (errno == EAGAIN || errno == ENOBUFS || errno == ENOMEM)
      return;
    else if (errno != EINTR)
      peer.deaf = true;
  }
}

void CallLedger::compare() {
  const uint64_t before = agreed();
  for (uint64_t call = before + 1; !failure_ && missing_now(call) == 0; ++call) {
    int odd = 0;
    if (const Field field = first_difference(call, &odd); field != Field::none)
      fail({Cause::mismatch, 0, uint8_t(odd), field, uint32_t(logs_[0].of(call).sequence)}, 0);
    else
      agreed_.store(call, std::memory_order_release);  // (1)
  }
  if (agreed() != before) forget_old();
}

// The same on every rank: all of them are compared with rank 0, in order.
Field CallLedger::first_difference(uint64_t call, int* rank) const {
  for (int r = 1; r < nranks(); ++r) {
    *rank = r;
    const Field field = difference(logs_[0].of(call), logs_[size_t(r)].of(call));
    if (field != Field::none) return field;
  }
  return Field::none;
}

// My own headers are kept until all peers have them, too.
void CallLedger::forget_old() {
  const uint64_t calls = agreed(), needed = calls < kKept ? 1 : calls - kKept + 1;
  uint64_t mine = needed;
  for (const Peer& peer : peers_)
    if (!peer.deaf) mine = std::min<uint64_t>(mine, peer.sent / sizeof(Header) + 1);
  for (int r = 0; r < nranks(); ++r) logs_[size_t(r)].forget_before(r == rank_ ? mine : needed);
}

void CallLedger::fail(const Failure& failure, uint64_t blamed) {
  if (!failure_) failure_ = {failure, blamed};
}

uint64_t CallLedger::missing_now(uint64_t call) const {
  uint64_t missing = 0;
  for (int r = 0; r < nranks(); ++r)
    if (logs_[size_t(r)].calls < call) missing |= bit_of(r);
  return missing;
}

// Called with the lock, which it gives away while the listener runs. One thread at a time tells, so that calls are
// heard of in order; what others find meanwhile it tells as well.
void CallLedger::tell(std::unique_lock<std::mutex>& lock) {
  if (telling_) return;
  telling_ = true;
  while (!closed_) {
    if (told_ < agreed()) {
      const uint64_t call = ++told_;
      lock.unlock();
      listener_.agreed(call);
    } else if (failure_ && !told_failure_) {
      told_failure_ = true;
      const auto [failure, blamed] = *failure_;
      lock.unlock();
      listener_.failed(failure, blamed);
    } else {
      break;
    }
    lock.lock();
  }
  telling_ = false;
  changed_.notify_all();
}

uint64_t CallLedger::missing(uint64_t call) const {
  const std::lock_guard lock(mutex_);
  return missing_now(call);
}

bool CallLedger::all_sent() const {
  const std::lock_guard lock(mutex_);
  return std::none_of(peers_.begin(), peers_.end(), [this](const Peer& peer) { return unsent(peer); });
}

bool CallLedger::header(int rank, uint32_t sequence, Header* header) const {
  const std::lock_guard lock(mutex_);
  const Log &first = logs_[0], &log = logs_[size_t(rank)];
  for (uint64_t call = std::max(first.first(), log.first()); call <= std::min(first.calls, log.calls); ++call) {
    if (uint32_t(first.of(call).sequence) != sequence) continue;
    *header = log.of(call);
    return true;
  }
  return false;
}

uint64_t CallLedger::last_sequence(int rank) const {
  const std::lock_guard lock(mutex_);
  return logs_[size_t(rank)].last_sequence;
}

}  // namespace dpcomm
