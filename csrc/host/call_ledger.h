// The headers of calls that do not wait for them: what each rank says of its calls, compared as it comes in. For
// engines that enqueue calls and go on. (The control plane's exchange_headers waits.) Knows nothing of payload, and
// decides on no cause: it tells a listener the first mismatch, which every rank finds alike.
#pragma once
#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "../core/header.h"
#include "unique_fd.h"

namespace dpcomm {

// A call is named by its place: the n-th header of every rank belongs to call n, whatever number it carries.
class CallLedger {
 public:
  // Called one at a time, from the watchdog's thread and from inside post() and poll(), with no lock of the ledger
  // held: all of its members but close() may be used. Hold nothing over post() and poll() that a listener takes. Must
  // not throw, and not wait.
  struct Listener {
    std::function<void(uint64_t call)> agreed;  // all ranks announced it alike; each call once, in order
    // Once, after all calls before it were agreed; none will be from then on. `blamed` is ControlPlane::propose's.
    std::function<void(const Failure& failure, uint64_t blamed)> failed;
  };

  // So far can a rank get before the others have announced the same calls; a GPU's queue holds some thousands. Then
  // failed() hears of a time-out, which blames those that are missing, and nothing more is announced: this bounds what
  // is kept, by 64 MiB for each rank.
  static constexpr uint64_t kMostAhead = 1 << 20;
  static constexpr uint64_t kKept = 16;  // agreed calls whose headers are still known

  // sockets: by rank, [own rank] is empty. Connected streams on which nothing has been said yet.
  CallLedger(int rank, std::vector<UniqueFd> sockets, Listener listener, uint64_t most_ahead = kMostAhead);
  ~CallLedger();  // closes
  CallLedger(const CallLedger&) = delete;

  // Announces my next call: header.sequence is 1, 2, 3, ... One thread at a time. Never waits: what a socket does not
  // take is sent by later calls, when that peer says something, and by the watchdog, in order.
  void post(const Header& mine);
  void poll();  // reads what has come, sooner than the watchdog's thread would. Any thread, never waits.

  // The last call that all have announced alike. Acquires; pairs with (1) in the source. The listener may hear of it a
  // little later, from another thread.
  uint64_t agreed() const { return agreed_.load(std::memory_order_acquire); }
  // A bit for each rank, this one included, whose header of this call is not here.
  uint64_t missing(uint64_t call) const;
  // Whether all sockets have taken all that was posted, but those that are broken.
  bool all_sent() const;

  // What a rank announced in the call that had this number on rank 0. False if it is not known (any more).
  bool header(int rank, uint32_t sequence, Header* header) const;
  uint64_t last_sequence(int rank) const;  // of the last header seen; 0: none

  // When it returns no listener is called, nor will be: not from inside one. Idempotent. What the sockets have not
  // taken is lost: see all_sent().
  void close();

 private:
  struct Log {  // what one rank has announced
    std::deque<Header> headers = {};
    uint64_t calls = 0, last_sequence = 0;

    uint64_t first() const { return calls - headers.size() + 1; }  // of those that are kept
    const Header& of(uint64_t call) const { return headers[call - first()]; }
    void append(const Header& header);
    void forget_before(uint64_t call);
  };
  // A broken socket is not reported: the control sockets tell why.
  struct Peer {
    UniqueFd socket = {};
    Header incoming[16] = {};  // `received` bytes of it are there, always less than one header between two reads
    size_t received = 0;
    uint64_t sent = 0;                  // bytes of my headers
    bool silent = false, deaf = false;  // nothing more is read, or sent
  };

  static uint64_t bit_of(int rank) { return uint64_t{1} << rank; }
  int nranks() const { return int(peers_.size()); }

  // All under mutex_.
  void receive(int rank);
  void send_rest(int rank);
  bool unsent(const Peer& peer) const;
  void compare();
  Field first_difference(uint64_t call, int* rank) const;
  void forget_old();
  void fail(const Failure& failure, uint64_t blamed);
  uint64_t missing_now(uint64_t call) const;
  void tell(std::unique_lock<std::mutex>& lock);

  bool look_at(int rank);
  void forget_watches();

  const int rank_;
  const uint64_t most_ahead_, generation_;
  const Listener listener_;
  std::vector<uint64_t> watches_;
  std::atomic<uint64_t> agreed_{0};  // written under mutex_

  mutable std::mutex mutex_;  // guards all below. Not held while a watch is forgotten, nor while a listener is called
  std::condition_variable changed_;
  std::vector<Peer> peers_;
  std::vector<Log> logs_;  // by rank
  std::optional<std::pair<Failure, uint64_t>> failure_;
  uint64_t told_ = 0;  // calls that the listener has heard of
  bool told_failure_ = false;
  bool telling_ = false;  // a thread calls the listener now; it goes on until there is no news
  bool closed_ = false;
};

}  // namespace dpcomm
