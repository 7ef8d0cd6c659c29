// Engine shm: the ranks are processes of one host (or threads of this process) that share memory.
#pragma once
#include <atomic>
#include <memory>
#include <mutex>
#include <optional>

#include "../engine.h"
#include "../host/arena.h"
#include "../host/communicators.h"
#include "../host/control.h"
#include "../host/origin.h"
#include "channels.h"
#include "kernels.h"

namespace dpcomm {

constexpr int kMostChannels = 8;

// What ranks ask for; equal on all of them.
struct Wish {
  int64_t arena_bytes;          // of one rank, at most
  int channels = 1;             // at most
  bool fewer_channels = false;  // if a measurement at start says that they are faster
  bool crowded = false;         // more ranks than processors: a rank that spins keeps its peer from running
  int slots = 0;                // a power of two, at least 4; 0: what performs best
  int64_t slice_bytes = 0;      // 0: what performs best
};

// What follows from it, on every rank alike.
struct Geometry {
  int nranks, channels, slots;
  int64_t slot_bytes, slice_bytes;
  int64_t channel_bytes;  // mailbox and slots of one channel of one rank
  int64_t arena_bytes;    // of one rank, all included
  bool fewer_channels, crowded;
};
// The largest slots that perform well and fit; throws Error(argument) if arena_bytes cannot hold the smallest.
Geometry geometry(int nranks, const Wish& wish);

class ShmEngine final : public Engine {
 public:
  struct Peer {
    Arena arena;      // its memory as mapped here (my own at [rank])
    int pid = 0;      // 0: in another PID namespace
    UniqueFd socket;  // closed by the kernel when the peer dies
  };
  ShmEngine(int rank, const Geometry& geometry, std::vector<Peer> peers, const Isa& isa, int rejected_connections);
  // Ranks that are threads of this process and share one mapping of all arenas.
  ShmEngine(int rank, const Geometry& geometry, std::shared_ptr<std::vector<Arena>> arenas, const Isa& isa);
  ~ShmEngine() override;

  // First calls, on all ranks at once: moves and checks a pattern, then measures both kinds of stores and the number of
  // channels. Throws like allreduce. Afterwards messages carry `name`, and the calls so far are not counted.
  void verify(double timeout_s, const std::string& name);

  int rank() const override { return team_.rank; }
  int nranks() const override { return team_.nranks; }
  bool in_forked_child() const override { return origin_.in_forked_child(); }
  void allreduce(const Call& call) override;
  void abort(const std::string& reason) override;
  void check() override;
  void close() override;
  Stats stats(bool reset) override;
  Description describe() override;

 private:
  // How one channel waits. The first one's thread is the caller's: it also asks whether the call was interrupted.
  struct ChannelPatience final : Patience {
    ShmEngine* engine = nullptr;
    const std::vector<Mailbox*>* box = nullptr;  // of this channel, of every rank
    bool callers = false;
    bool give_up(int peer) override;
    bool timed_out(const Flag* flag, uint32_t value, int peer) override;
    uint64_t last_in_ring() const;
  };
  struct Channel {
    std::vector<Mailbox*> box;  // of every rank
    ChannelPatience patience;
    int spins = 0;  // see Waiting
    Tally tally;    // of the current call
    bool ok = false;
  };

  // shm_call.cpp: one call.
  Header begin(const Call& call, Bucket& bucket);
  int64_t slices(const Header& header, const Bucket& bucket) const;
  int channels_for(int64_t slices) const;
  void play(Channel& channel, const Team& team, const Bucket& bucket, const Header& header, StoreTurns& stores);
  void count(const Header& header, const Bucket& bucket, int channels);
  bool asked_to_stop(const Call* call);
  void end_stores(const StoreTurns& turns);

  void fail(Failure failure);
  void join(int rank, const Geometry& geometry, const std::vector<char*>& arenas);
  void watch_peers();
  Mailbox& mine() const { return *channels_[0].box[size_t(team_.rank)]; }

  // shm_verify.cpp: the first calls.
  void check_pattern();
  void touch_all_slots(const Call& call);
  double fastest_call(const Call& call);
  void choose_channels();
  void of_slowest_rank(std::vector<float>& times);

  // shm_errors.cpp
  Error cause_error(const Call* call);
  std::string prefix(Code code, const Call* call) const;
  FailureText failure_text() const;
  uint64_t shown(uint64_t sequence) const { return sequence - uncounted_; }

  const Origin origin_;                         // the arenas are not mapped in a forked child
  std::vector<Peer> peers_;                     // by rank; without arenas where ranks are threads
  std::shared_ptr<std::vector<Arena>> arenas_;  // of ranks that are threads
  std::vector<Channel> channels_;               // fixed once joined: patience and calls point into it
  Channels threads_;
  std::vector<uint64_t> watches_;
  ControlPage* control_ = nullptr;  // of rank 0
  Team team_{};                     // without a channel
  const Isa& isa_;
  StorePolicy stores_;
  bool trials_ = false;  // the policy is measured again while running
  int used_channels_ = 1;
  bool fewer_channels_ = false;  // still to be measured
  int most_spins_ = 0;           // see Waiting
  int64_t timeout_ns_ = 0;
  const int rejected_connections_;
  const int64_t arena_bytes_;
  std::string name_ = "new";
  uint64_t uncounted_ = 0;         // calls made by verify()
  std::vector<Segment> segments_;  // of the current call; kept for its capacity
  const Call* current_ = nullptr;  // the call that runs
  std::atomic<bool> told_{false};  // this rank's caller has been given the first cause
  std::atomic<bool> closed_{false};
  std::mutex abort_mutex_;
  std::mutex stats_mutex_;
  Stats stats_;
  std::optional<KnownCommunicator> known_;  // last: it asks for all of the above
};

}  // namespace dpcomm
