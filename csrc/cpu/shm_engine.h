// Engine shm: the ranks are processes of one host (or threads of this process) that share memory.
#pragma once
#include <atomic>
#include <memory>
#include <mutex>

#include "../engine.h"
#include "arena.h"
#include "control.h"
#include "kernels.h"

namespace dpcomm {

// What every rank of a communicator must agree on.
struct Geometry {
  int nranks, slots;
  int64_t slot_bytes, slice_bytes;
  int64_t arena_bytes;  // of one rank, all included
};
// The largest slots of at most 64 KiB that fit; throws Error(argument) if arena_bytes cannot hold the smallest.
Geometry geometry(int nranks, int64_t arena_bytes);

class ShmEngine final : public Engine, private Patience {
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

  // First calls, on all ranks at once: moves and checks a pattern, then measures both store policies. Throws like
  // allreduce. Afterwards messages carry `name`, and the calls so far are not counted.
  void verify(double timeout_s, const std::string& name);

  int rank() const override { return team_.rank; }
  int nranks() const override { return team_.nranks; }
  bool in_forked_child() const override { return fork_generation() != generation_; }
  void allreduce(const Call& call) override;
  void abort(const std::string& reason) override;
  void check() override;
  void close() override;
  Stats stats(bool reset) override;
  Description describe() override;

 private:
  Header begin(const Call& call, Bucket& bucket);
  void count(const Call& call, const Header& header, const Bucket& bucket, const Tally& tally);
  void fail(Failure failure);
  bool give_up(int peer) override;
  void timed_out(const Flag* flag, uint32_t value, int peer) override;
  void join(int rank, const Geometry& geometry);
  void watch_peers();
  void touch_all_slots(const Call& call);
  double fastest_call(Call& call, Store store);
  void check_pattern();

  // shm_errors.cpp: the failure word in words.
  Error cause_error(const Call* call);
  Error explain(const Failure& failure, const Call* call, bool here) const;
  std::string prefix(Code code, const Call* call) const;
  std::string field_values(const Failure& failure) const;
  std::string waiting_text(const Failure& failure, std::vector<int>* ranks) const;
  uint64_t shown(uint64_t sequence) const { return sequence - uncounted_; }

  const uint64_t generation_;
  const int made_in_pid_;
  std::vector<Peer> peers_;                     // by rank; without arenas where ranks are threads
  std::shared_ptr<std::vector<Arena>> arenas_;  // of ranks that are threads
  std::vector<Mailbox*> box_;
  std::vector<uint64_t> watches_;
  ControlPage* control_ = nullptr;  // of rank 0
  Team team_{};
  const Isa& isa_;
  Store store_ = Store::plain;
  int spins_, most_spins_;  // see Waiting
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
};

}  // namespace dpcomm
