// Engine p2p: the ranks are GPUs of one host. They write into each other's arenas, in GPU memory or in pinned host
// memory; what the hosts tell each other lies in shared memory.
#pragma once
#include <atomic>
#include <cstddef>
#include <memory>
#include <mutex>
#include <optional>

#include "../host/arena.h"
#include "../host/communicators.h"
#include "../host/origin.h"
#include "device_team.h"
#include "peer_memory.h"

namespace dpcomm {

// At the start of each rank's shared host memory; control and status of rank 0 are in use. Pinned arenas follow.
struct alignas(4096) P2pShared {
  ControlPage control;
  RankStatus status[kMaxRanks];
  uint64_t calls[kMaxRanks];   // [rank]: that its host has begun; for messages
  uint64_t let_go[kMaxRanks];  // 1 once the rank has given back the memory of all others
  PeerExport mine;
};
static_assert(offsetof(P2pShared, status) == 8192 && offsetof(P2pShared, calls) == 16384 && sizeof(P2pShared) == 20480,
              "docs/wire.md, \"Arenas of GPUs\"");

// What the ranks of one process share.
struct P2pMemory {
  std::vector<Arena> host;                // by rank, as mapped here; of ranks of one process only rank 0's
  std::vector<PeerMemory> pins;           // registrations of it
  std::vector<PeerMemory> arenas;         // by rank, as the first device here sees them
  std::atomic<int> open{0};               // ranks of this process that have not closed
  P2pShared* shared = nullptr;            // rank 0's
  const uint64_t* first_cause = nullptr;  // as GPUs see it
  RankStatus* status = nullptr;           // the same

  // Lets go of the memory of all ranks but `rank`, waits a second for the `others`, ranks of other processes, to let go
  // of mine, and frees it. One that does not is dead or busy: its GPU may still write there, and freed memory that is
  // still mapped elsewhere is undefined, so mine is left to the end of the process.
  void give_back(int rank, const std::vector<int>& others);
};

class P2pEngine final : public Engine {
 public:
  struct Peer {
    int pid = 0;
    UniqueFd socket;  // closed by the kernel when the peer dies; none where ranks share a process
    std::string how;  // its memory is reached
  };
  struct Place {
    int rank, here;  // `here`: which of the team's
    std::shared_ptr<DeviceTeam> team;
    std::shared_ptr<P2pMemory> memory;
    std::vector<Peer> peers;
    P2pGeometry geometry;
    int rejected_connections;
  };
  explicit P2pEngine(Place place);
  ~P2pEngine() override;

  // First calls, with the real kernels: moves patterns both ways over every channel and reads them back, and leaves
  // nothing to be loaded later. In three parts, so that one thread can do it for several ranks, and nothing is
  // allocated while kernels wait for each other. Error(p2p) where data does not arrive.
  void prepare_verify(double timeout_s);
  void begin_verify();
  void end_verify(double timeout_s, const std::string& name);

  int rank() const override { return rank_; }
  int nranks() const override { return geometry_.nranks; }
  bool in_forked_child() const override { return origin_.in_forked_child(); }
  int device() const override { return team_->device(); }
  uintptr_t stream() const override { return reinterpret_cast<uintptr_t>(team_->stream()); }
  void allreduce(const Call& call) override;  // internal error: calls need a stream
  std::shared_ptr<Pending> enqueue(const Call& call, uintptr_t stream) override;
  void abort(const std::string& reason) override;
  void check() override;
  void close() override;
  Stats stats(bool reset) override;
  Description describe() override;

 private:
  class OnStream;
  struct Pattern;

  // The context of the GPU does not survive a fork.
  void refuse_fork() const { origin_.refuse_fork("CUDA cannot be used after a fork: use the spawn start method."); }
  void watch_peers();
  void fail(Failure failure);
  void look();
  bool failed() const;
  Failure first_cause() const;
  std::shared_ptr<DeviceTeam::Launch> enter(const Call& call, cudaStream_t stream);
  void absent(const std::vector<int>& ranks);
  void count(const DeviceTeam::Launch& launch);

  // p2p_errors.cpp
  [[noreturn]] void throw_cuda(const Error& error, const Call& call, uintptr_t stream);
  Error cause_error(const Call* call, bool of_the_call_itself = false);  // that call's own error stays what it was
  FailureText failure_text() const;
  std::string prefix(Code code, const Call* call) const { return failure_text().prefix(code, call); }

  const Origin origin_;
  const int rank_, here_;
  const P2pGeometry geometry_;
  std::shared_ptr<DeviceTeam> team_;
  std::shared_ptr<P2pMemory> memory_;
  std::vector<Peer> peers_;
  std::vector<uint64_t> watches_;
  ControlPage* const control_;
  std::unique_ptr<Pattern> pattern_;  // between the halves of verify
  const int rejected_connections_;
  std::string name_ = "new";
  std::atomic<double> timeout_s_{0};
  std::atomic<uint64_t> calls_{0};  // begun by this host; graphs replay more
  uint64_t uncounted_ = 0;          // of them made by verify
  std::atomic<bool> told_{false};   // this rank's caller has been given the first cause
  std::atomic<bool> closed_{false};
  std::mutex abort_mutex_, stats_mutex_;
  Stats stats_;
  int64_t nonfinite_before_ = 0;
  std::optional<KnownCommunicator> known_;  // last: it asks for all of the above
};

}  // namespace dpcomm
