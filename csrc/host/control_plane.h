// What ranks without common memory have instead of a shared control page: two sockets per pair, one for the first cause
// and for goodbyes, one for the headers of calls. Knows nothing of payload, nor of what ranks do in a call.
//
// Who decides on the first cause: the lowest rank that is there and answers, called the arbiter. Whoever meets a cause
// proposes it to the arbiter, and adopts what that announces. If it does not answer (a stopped process), the next one
// is asked; so two decisions need an arbiter that goes on just when the others have given it up.
#pragma once
#include <atomic>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "control_frame.h"
#include "unique_fd.h"

namespace dpcomm {

struct PeerSockets {
  UniqueFd control, headers;
  int pid = 0;
};

class ControlPlane {
 public:
  // [own rank] is empty. The sockets are connected streams; nothing has been said on them yet.
  ControlPlane(int rank, std::vector<PeerSockets> peers);
  // Closes, if nobody has, and waits for the calls of other threads, which end within 100 ms.
  ~ControlPlane();
  ControlPlane(const ControlPlane&) = delete;

  // A copy of what all ranks are told, for reading. Texts and masks of a cause are there before its failure word.
  ControlPage& page() { return *page_; }
  uint64_t failure() const { return load_acquire(&page_->failure); }  // pairs with (1)

  // For engines that exchange no headers here: which call of mine is the last.
  void note_call(uint64_t sequence) { sequence_ = sequence; }

  // Any thread, never waits. `blamed`: a bit for each rank that the cause is about; for a time-out, whom this rank has
  // waited for. Only the first proposal counts, but for time-outs: ranks wait in chains, and whoever has waited in vain
  // himself is not to blame.
  void propose(Failure failure, uint64_t blamed, const std::string& reason = "");
  // How long the arbiter has for an answer, and how long it hears of other time-outs before it decides on one. In ticks
  // of the watchdog (100 ms), which come on top.
  static constexpr double kDecideS = 0.4, kGatherS = 0.12;
  // For headers that complete the text of a mismatch. They have been sent: whoever noticed it had them all.
  static constexpr double kRestS = 0.5;

  // Waits until the first cause is decided. False when there is none after timeout_s, or when the plane is closed.
  bool wait_failed(double timeout_s);

  // Sends mine to all and receives one header of each peer, in order; then all ranks compare them, alike. One thread at
  // a time. False: there is a failure, or one is being decided (wait_failed), or the plane is closed. interrupted:
  // asked every 100 ms, true ends the wait (the caller has proposed the cause).
  bool exchange_headers(const Header& mine, std::vector<Header>& all, double timeout_s,
                        const std::function<bool()>& interrupted);

  // What a rank announced in the call that had this number on rank 0. False if it is not known (any more): the last two
  // exchanges are kept.
  bool header(int rank, uint32_t sequence, Header* header) const;
  uint64_t last_sequence(int rank) const;  // of the last header that has come

  // Says goodbye (closed[own rank] of the peers becomes 1 + last_sequence) and ends all waits here. Idempotent.
  void close(uint64_t last_sequence);

 private:
  struct Incoming {
    ControlFrame frame;
    size_t received = 0;
  };
  struct Round {  // one exchange of headers
    std::vector<Header> headers = {};
    uint64_t present = 0;  // a bit for each rank whose header is there
  };
  struct Waiting;  // a round under way
  struct InUse {   // of the thread that made it
    explicit InUse(ControlPlane& used) : plane(used) { plane.enter(); }
    ~InUse() { plane.leave(); }
    InUse(const InUse&) = delete;
    ControlPlane& plane;
  };

  static uint64_t bit_of(int rank) { return uint64_t{1} << rank; }
  static double now_s();
  bool failing() const { return failure() != 0 || proposed_.load() || closed_.load(); }

  // The first cause. All under mutex_.
  bool receive(int rank);
  void take(int rank, const ControlFrame& frame);
  void hung_up(int rank);
  void suggest(const Failure& failure, uint64_t blamed, const std::string& reason);
  void suggest(const ControlFrame& frame);
  void consider();
  void ask(int arbiter);
  bool peers_may_know_more() const;
  bool more_may_have_waited() const;
  ControlFrame verdict() const;
  void decide(ControlFrame frame);
  void send(int rank, const ControlFrame& frame);

  // The exchange of headers (control_plane_headers.cpp).
  void send_headers(const Header& mine, Waiting& waiting);
  bool receive_headers(Waiting& waiting);
  bool await_headers(Waiting& waiting, double timeout_s, const std::function<bool()>& interrupted);
  bool propose_for_missing(const Waiting& waiting, double now, bool late);
  void sleep_for_headers(const Waiting& waiting, double seconds) const;
  void keep(const Waiting& waiting);
  bool agree(const std::vector<Header>& all);

  void forget_watches();
  void enter();
  void leave();

  static constexpr double kLongestS = 1e8;  // of a wait: beyond it a clock's count could overflow

  const int rank_, nranks_;
  const uint64_t others_;  // a bit for each peer
  const uint64_t generation_;
  std::vector<PeerSockets> peers_;
  const std::unique_ptr<ControlPage> page_;
  std::vector<uint64_t> watches_;
  std::atomic<bool> proposed_{false}, closed_{false};  // written under mutex_
  std::atomic<uint64_t> sequence_{0};                  // of my last call

  mutable std::mutex mutex_;  // guards all below. Not held while a watch is forgotten, nor during callers' callbacks
  std::condition_variable changed_;
  std::vector<Incoming> incoming_;
  ControlFrame proposal_{};  // if proposed_
  int asked_ = -1;           // the arbiter that has the proposal
  double asked_at_ = 0;
  // A bit for each rank. ended: read no more. gone: not asked (ended, or said goodbye). silent: did not answer in time.
  // died: ended without goodbye. heard: has proposed to me. deaf: did not take what was sent.
  uint64_t ended_ = 0, gone_ = 0, silent_ = 0, died_ = 0, heard_ = 0, deaf_ = 0;
  uint64_t timed_out_ = 0, waited_for_ = 0;  // who has proposed a time-out, and whom they blame
  Round rounds_[2];                          // the last two, in turns
  uint64_t rounds_begun_ = 0;
  std::vector<uint64_t> last_sequence_;
  int users_ = 0;  // threads inside; the last one to leave a closed plane closes the sockets
};

}  // namespace dpcomm
