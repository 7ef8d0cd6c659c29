// The exchange of headers: what a rank says of its call before any payload moves, to all others, and theirs.
#include <poll.h>
#include <sched.h>
#include <sys/socket.h>

#include <algorithm>
#include <bit>
#include <cmath>

#include "control_plane.h"

namespace dpcomm {
namespace {

// Two ranks in step exchange headers over loopback TCP in about 10 us this way, and in 16 us if they sleep in poll().
// Each look gives the processor away: with three ranks on two processors, spinning without that took 170 us, not 40.
constexpr double kSpinS = 50e-6;
// Between two looks at what no socket of headers tells: failures, goodbyes, interrupts.
constexpr double kLookS = 0.1;
// A death shows on the control socket too, with the reason if there is one: it has this long to.
constexpr double kLostS = 1.0;

}  // namespace

struct ControlPlane::Waiting {
  std::vector<Header>& headers;
  uint64_t missing;                 // a bit for each rank
  uint64_t ended = 0;               // of them, whose sockets give no more
  size_t received[kMaxRanks] = {};  // bytes
  double lost_at[kMaxRanks] = {};   // when the socket broke; 0: it has not
};

bool ControlPlane::exchange_headers(const Header& mine, std::vector<Header>& all, double timeout_s,
                                    const std::function<bool()>& interrupted) {
  const InUse use(*this);
  if (failing()) return false;
  sequence_ = mine.sequence;
  all.assign(size_t(nranks_), Header{});
  all[size_t(rank_)] = mine;
  Waiting waiting{all, others_};
  send_headers(mine, waiting);
  const bool complete = await_headers(waiting, timeout_s, interrupted);
  if (!complete && unpack(failure()).cause == Cause::mismatch) {
    const double until = now_s() + kRestS;
    while (!receive_headers(waiting) && now_s() < until) sleep_for_headers(waiting, until - now_s());
  }
  keep(waiting);
  return complete && agree(all) && !failing();
}

void ControlPlane::send_headers(const Header& mine, Waiting& waiting) {
  for (int r = 0; r < nranks_; ++r)
    if (r != rank_ && !send_whole(peers_[size_t(r)].headers.get(), &mine, sizeof mine)) waiting.lost_at[r] = now_s();
}

// True when none is missing.
bool ControlPlane::receive_headers(Waiting& w) {
  for (uint64_t rest = w.missing & ~w.ended; rest != 0; rest &= rest - 1) {
    const int r = std::countr_zero(rest);
    const int socket = peers_[size_t(r)].headers.get();
    const Piece piece = receive_rest(socket, &w.headers[size_t(r)], sizeof(Header), w.received[r]);
    if (piece == Piece::whole) w.missing &= ~bit_of(r);
    if (piece != Piece::hung_up) continue;
    w.ended |= bit_of(r);
    if (w.lost_at[r] == 0) w.lost_at[r] = now_s();
  }
  return w.missing == 0;
}

bool ControlPlane::await_headers(Waiting& waiting, double timeout_s, const std::function<bool()>& interrupted) {
  const double start = now_s(), deadline = start + std::min(timeout_s, kLongestS);
  do {
    if (receive_headers(waiting)) return true;
    if (failing()) return false;
    ::sched_yield();
  } while (now_s() < start + kSpinS);
  for (double next_look = start + kLookS;;) {
    if (receive_headers(waiting)) return true;
    if (failing()) return false;
    const double now = now_s();
    if (propose_for_missing(waiting, now, now >= deadline)) return false;
    if (now >= next_look) {
      if (interrupted && interrupted()) return false;
      next_look = now + kLookS;
    }
    sleep_for_headers(waiting, std::min(next_look, deadline) - now);
  }
}

// True if there is no sense in waiting on.
bool ControlPlane::propose_for_missing(const Waiting& waiting, double now, bool late) {
  const uint64_t sequence = sequence_;
  for (uint64_t rest = waiting.missing; rest != 0; rest &= rest - 1) {
    const int r = std::countr_zero(rest);
    const uint64_t closed = load_acquire(&page_->closed[r]);
    const bool left = closed != 0 && closed <= sequence;  // else it took part in this call before it left
    if (!left && (waiting.lost_at[r] == 0 || now < waiting.lost_at[r] + kLostS)) continue;
    const Cause cause = left ? Cause::peer_closed : Cause::peer_died;
    propose({cause, uint8_t(r), 0, Field::none, uint32_t(sequence)}, bit_of(r));
    return true;
  }
  if (late) propose({Cause::timeout, uint8_t(rank_), 0, Field::none, uint32_t(sequence)}, waiting.missing);
  return late;
}

void ControlPlane::sleep_for_headers(const Waiting& waiting, double seconds) const {
  pollfd sockets[kMaxRanks];
  nfds_t count = 0;
  for (uint64_t rest = waiting.missing & ~waiting.ended; rest != 0; rest &= rest - 1)
    sockets[count++] = {peers_[size_t(std::countr_zero(rest))].headers.get(), POLLIN, 0};
  ::poll(sockets, count, int(std::ceil(std::clamp(seconds, 0.0, kLookS) * 1e3)));
}

void ControlPlane::keep(const Waiting& waiting) {
  const std::lock_guard lock(mutex_);
  Round& round = rounds_[rounds_begun_++ % 2];
  round.headers = waiting.headers;
  round.present = (others_ | bit_of(rank_)) & ~waiting.missing;
  for (int r = 0; r < nranks_; ++r)
    if (round.present & bit_of(r)) last_sequence_[size_t(r)] = round.headers[size_t(r)].sequence;
}

bool ControlPlane::agree(const std::vector<Header>& all) {
  for (int r = 1; r < nranks_; ++r) {
    const Field field = difference(all[0], all[size_t(r)]);
    if (field == Field::none) continue;
    propose({Cause::mismatch, 0, uint8_t(r), field, uint32_t(all[0].sequence)}, 0);
    return false;
  }
  return true;
}

bool ControlPlane::header(int rank, uint32_t sequence, Header* header) const {
  const std::lock_guard lock(mutex_);
  for (const Round& round : rounds_) {
    if ((round.present & 1) == 0 || uint32_t(round.headers[0].sequence) != sequence) continue;
    if ((round.present & bit_of(rank)) == 0) return false;
    *header = round.headers[size_t(rank)];
    return true;
  }
  return false;
}

uint64_t ControlPlane::last_sequence(int rank) const {
  const std::lock_guard lock(mutex_);
  const uint64_t seen = last_sequence_[size_t(rank)];
  Header next{};  // of a call that this rank is not in: it waits in the socket
  const int socket = closed_ ? -1 : peers_[size_t(rank)].headers.get();
  const bool waits = socket >= 0 && ::recv(socket, &next, sizeof next, MSG_PEEK | MSG_DONTWAIT) == sizeof next;
  return waits && next.sequence == seen + 1 ? next.sequence : seen;
}

}  // namespace dpcomm
