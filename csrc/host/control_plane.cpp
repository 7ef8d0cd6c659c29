// The first cause: who decides, and how all learn it. control_plane_headers.cpp has the other half.
#include "control_plane.h"

#include <algorithm>
#include <bit>
#include <chrono>

#include "../error.h"
#include "watchdog.h"

namespace dpcomm {
namespace {

using Kind = ControlFrame::Kind;

uint64_t all_bits(int nranks) { return nranks >= 64 ? ~uint64_t{0} : (uint64_t{1} << nranks) - 1; }

}  // namespace

double ControlPlane::now_s() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

ControlPlane::ControlPlane(int rank, std::vector<PeerSockets> peers)
    : rank_(rank),
      nranks_(int(peers.size())),
      others_(all_bits(nranks_) & ~bit_of(rank)),
      generation_(fork_generation()),
      peers_(std::move(peers)),
      page_(std::make_unique<ControlPage>()),
      incoming_(peers_.size()),
      last_sequence_(peers_.size()) {
  if (nranks_ > kMaxRanks || rank < 0 || rank >= nranks_)
    throw Error(Code::internal, "control plane of rank " + std::to_string(rank) + " of " + std::to_string(nranks_));
  try {
    for (int r = 0; r < nranks_; ++r) {
      if (r == rank_) continue;
      watches_.push_back(Watchdog::instance().watch_bytes(peers_[size_t(r)].control.get(), [this, r] {
        const std::lock_guard lock(mutex_);
        if (closed_) return false;
        const bool more = receive(r);
        consider();
        return more;
      }));
    }
    watches_.push_back(Watchdog::instance().tick([this] {
      const std::lock_guard lock(mutex_);
      if (!closed_) consider();
    }));
  } catch (...) {  // nobody calls the destructor
    forget_watches();
    throw;
  }
}

ControlPlane::~ControlPlane() {
  if (generation_ != fork_generation()) return;  // other threads, and what they hold, are not here
  close(0);
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return users_ == 0; });  // bounded: they look at closed_ every 100 ms
}

void ControlPlane::forget_watches() {
  for (const uint64_t watch : watches_) Watchdog::instance().forget(watch);
}

void ControlPlane::close(uint64_t last_sequence) {
  if (generation_ != fork_generation()) return;
  const InUse use(*this);
  {
    const std::lock_guard lock(mutex_);
    if (closed_.exchange(true)) return;
    ControlFrame goodbye{ControlFrame::kMagic, Kind::goodbye, 0, 0, last_sequence + 1, {}};
    for (int r = 0; r < nranks_; ++r) send(r, goodbye);
    changed_.notify_all();
  }
  forget_watches();
}

void ControlPlane::enter() {
  const std::lock_guard lock(mutex_);
  ++users_;
}

void ControlPlane::leave() {
  const std::lock_guard lock(mutex_);
  if (--users_ > 0) return;
  if (closed_)
    for (PeerSockets& peer : peers_) {
      hang_up(peer.control);
      hang_up(peer.headers);
    }
  changed_.notify_all();
}

void ControlPlane::propose(Failure failure, uint64_t blamed, const std::string& reason) {
  const std::lock_guard lock(mutex_);
  if (closed_) return;
  suggest(failure, blamed, reason);
  consider();
}

bool ControlPlane::wait_failed(double timeout_s) {
  const InUse use(*this);
  std::unique_lock lock(mutex_);
  changed_.wait_for(lock, std::chrono::duration<double>(std::min(timeout_s, kLongestS)),
                    [this] { return failure() != 0 || closed_; });
  return failure() != 0;
}

// False once nothing more is to be read from that rank.
bool ControlPlane::receive(int rank) {
  Incoming& in = incoming_[size_t(rank)];
  while ((ended_ & bit_of(rank)) == 0) {
    const int socket = peers_[size_t(rank)].control.get();
    const Piece piece = receive_rest(socket, &in.frame, sizeof in.frame, in.received);
    if (piece == Piece::none_yet) return true;
    in.received = 0;
    if (piece == Piece::hung_up)
      hung_up(rank);
    else
      take(rank, in.frame);
  }
  return false;
}

void ControlPlane::take(int rank, const ControlFrame& frame) {
  if (!well_formed(frame, nranks_)) {  // whatever follows means nothing either
    ended_ |= bit_of(rank), gone_ |= bit_of(rank);
    return suggest({Cause::internal, uint8_t(rank), 0, Field::none, uint32_t(sequence_)}, bit_of(rank), "");
  }
  switch (frame.kind) {
    case Kind::propose:
      heard_ |= bit_of(rank);
      return suggest(frame);
    case Kind::decided:
      return decide(frame);  // and so all learn it, even if the sender has told nobody else
    case Kind::goodbye:
      gone_ |= bit_of(rank);
      set_once(&page_->closed[rank], frame.closed);
  }
}

void ControlPlane::hung_up(int rank) {
  ended_ |= bit_of(rank), gone_ |= bit_of(rank);
  if (load_acquire(&page_->closed[rank]) != 0) return;
  died_ |= bit_of(rank);
  suggest({Cause::peer_died, uint8_t(rank), 0, Field::none, uint32_t(sequence_)}, bit_of(rank), "");
}

void ControlPlane::suggest(const Failure& failure, uint64_t blamed, const std::string& reason) {
  ControlFrame frame{ControlFrame::kMagic, Kind::propose, pack(failure), blamed & all_bits(nranks_), 0, {}};
  if (failure.cause == Cause::peer_closed) frame.closed = std::max<uint64_t>(1, page_->closed[failure.rank]);
  reason.copy(frame.reason, kReasonBytes - 1);
  suggest(frame);
}

void ControlPlane::suggest(const ControlFrame& frame) {
  if (failure() != 0) return;
  const Failure failure = unpack(frame.failure);
  if (failure.cause == Cause::timeout) timed_out_ |= bit_of(failure.rank), waited_for_ |= frame.blamed;
  if (proposed_) return;
  proposal_ = frame;
  proposed_ = true;
}

// Brings the proposal to whoever is the arbiter now. Called whenever something has changed, and at every tick.
void ControlPlane::consider() {
  for (bool looked = false; proposed_ && failure() == 0;) {
    const int arbiter = std::countr_one(gone_ | silent_);  // at most rank_, whose bit is never set
    if (arbiter != asked_) ask(arbiter);
    const double waited_s = now_s() - asked_at_;
    const double patience_s = arbiter != rank_ || peers_may_know_more() ? kDecideS
                              : more_may_have_waited()                  ? kGatherS
                                                                        : 0;
    const bool enough = waited_s >= patience_s;
    if (!looked) {  // the answer may be here: this process may have been stopped for long
      for (int r = 0; enough && r < nranks_; ++r)
        if (r != rank_) receive(r);
      looked = true;
      if (enough) continue;
    }
    if (!enough) return;
    if (arbiter == rank_) return decide(verdict());
    silent_ |= bit_of(arbiter);
  }
}

void ControlPlane::ask(int arbiter) {
  asked_ = arbiter;
  asked_at_ = now_s();
  if (arbiter != rank_) send(arbiter, proposal_);
}

// Whoever has died may have decided before, and told only some. All who live see the hang-up, and propose something to
// me, the new arbiter, or have adopted what the dead one decided, and announce that: sockets keep the order.
bool ControlPlane::peers_may_know_more() const { return died_ != 0 && (others_ & ~(gone_ | silent_ | heard_)) != 0; }

// Of two ranks the one that is blamed did not wait.
bool ControlPlane::more_may_have_waited() const {
  const uint64_t silent = (others_ | bit_of(rank_)) & ~gone_ & ~timed_out_;
  return unpack(proposal_.failure).cause == Cause::timeout && nranks_ > 2 && silent != 0;
}

// The proposal; of a time-out without those who have waited in vain themselves, unless they wait for each other only.
ControlFrame ControlPlane::verdict() const {
  ControlFrame frame = proposal_;
  const uint64_t late = waited_for_ & ~timed_out_;
  if (unpack(frame.failure).cause == Cause::timeout && late != 0) frame.blamed = late;
  return frame;
}

// Once; whatever comes later is not the first cause.
void ControlPlane::decide(ControlFrame frame) {
  if (failure() != 0) return;
  const Failure failure = unpack(frame.failure);
  if (failure.cause == Cause::timeout)
    __atomic_store_n(&page_->waiting_for[failure.rank], frame.blamed, __ATOMIC_RELAXED);
  if (failure.cause == Cause::aborted) std::memcpy(page_->reason[failure.rank], frame.reason, kReasonBytes);
  if (failure.cause == Cause::peer_closed)
    set_once(&page_->closed[failure.rank], frame.closed);  // its goodbye to me may be under way
  store_release(&page_->failure, frame.failure);           // (1)
  frame.kind = Kind::decided;
  for (int r = 0; r < nranks_; ++r) send(r, frame);
  changed_.notify_all();
}

void ControlPlane::send(int rank, const ControlFrame& frame) {
  if (rank == rank_ || (deaf_ & bit_of(rank)) != 0) return;
  if (!send_whole(peers_[size_t(rank)].control.get(), &frame, sizeof frame)) deaf_ |= bit_of(rank);
}

}  // namespace dpcomm
