// Engine nccl: GPUs of any hosts. NCCL moves what our kernels have encoded; sockets of our own agree on each call
// beside it, tell of failures, and so no wait is without an end.
//
//   caller's stream   --- ready --\                                           /-- join: waits for `ended`
//   engine's stream                begin, steps, NCCL, steps, NCCL, steps, end
//
// `begin` and `end` are kernels too: the host learns from them how far the GPU is, and `end` lets nobody go on before
// all ranks have announced the same call, nor after a failure without NaNs in the bucket.
#pragma once
#include <atomic>
#include <chrono>
#include <memory>
#include <mutex>
#include <optional>

#include "../carried/schedule.h"
#include "../engine.h"
#include "../gpu/segment_tables.h"
#include "../host/call_ledger.h"
#include "../host/communicators.h"
#include "../host/control_plane.h"
#include "../host/origin.h"
#include "carrier.h"
#include "launches.h"
#include "scratch.h"
#include "two_level_memory.h"

namespace dpcomm {

// What ranks ask for; equal on all of them.
struct NcclWish {
  int64_t scratch_bytes;    // of one rank's slots, at most
  int64_t slice_bytes = 0;  // 0: what performs best
  int max_ctas = 0;         // of a launch; 0: for steps one for each SM
};

// What the GPU works in. It outlives the engine where something is still to come on the GPU.
struct NcclMemory {
  NcclMemory(int rank, int nranks, const NcclWish& wish, const NcclHosts& hosts);
  ~NcclMemory();
  NcclMemory(const NcclMemory&) = delete;

  const int64_t slot_bytes, native_bytes;  // of a slot; of codes that NCCL adds up at once, the same on all ranks
  SegmentTables tables;
  Scratch scratch;
  std::unique_ptr<TwoLevelMemory> two_level;  // null: none
  DeviceArray<uint64_t> nonfinite_groups;
  CallState* state;  // pinned host memory
};

class NcclEngine final : public Engine {
 public:
  struct Peer {
    int pid;
    std::string host;  // empty: this host
  };
  struct Place {
    int rank, device;
    NcclWish wish;
    std::vector<Peer> peers;           // by rank, this one included
    std::vector<PeerSockets> sockets;  // by rank, this one's empty
    const nccl::Library& library;
    NcclHosts hosts = {};
  };
  static std::unique_ptr<NcclEngine> make(Place place);
  ~NcclEngine() override;

  // Joins the other ranks, on all at once. Then the first calls, which move and check a pattern; afterwards messages
  // carry `name`, and those calls are not counted.
  void connect(const nccl::UniqueId& id, double timeout_s, const std::function<bool()>& interrupted);
  void verify(double timeout_s, const std::string& name, const std::function<bool()>& interrupted);

  int rank() const override { return team_.rank; }
  int nranks() const override { return team_.nranks; }
  bool in_forked_child() const override { return origin_.in_forked_child(); }
  int device() const override { return device_; }
  uintptr_t stream() const override { return reinterpret_cast<uintptr_t>(stream_.get()); }
  void allreduce(const Call& call) override;  // internal error: calls need a stream
  std::shared_ptr<Pending> enqueue(const Call& call, uintptr_t stream) override;
  void abort(const std::string& reason) override;
  void check() override;
  void close() override;
  Stats stats(bool reset) override;
  Description describe() override;

 private:
  class OnStream;
  class Launcher;
  class InsideHost;
  using Clock = std::chrono::steady_clock;
  struct Part {  // a table of segments_
    int64_t first, count, groups;
  };
  struct Flight {  // one call on its way onto the stream
    const Call& call;
    Header header;
    BucketTable table;
    int64_t wire_bytes = 0;  // that this rank sends to others; of two levels, to other hosts
    // Of two levels.
    Header between = {};
    Shards shards = {};
    std::vector<Part> parts = {};  // the shards that this rank owns
  };

  explicit NcclEngine(Place place);
  // The context of the GPU does not survive a fork.
  void refuse_fork() const { origin_.refuse_fork("CUDA cannot be used after a fork: use the spawn start method."); }
  std::shared_ptr<Pending> put(const Call& call, cudaStream_t stream);
  bool serves(const Call& call) const;
  static int64_t most_tensors(const Call& call);
  std::exception_ptr attempt(const Call& call, const std::function<Arrival()>& part);
  Flight prepare(const Call& call, bool capturing);
  BucketTable table_of(const Flight& flight, const Part& part) const;
  Arrival move(const Flight& flight);
  static int ctas_of(int64_t groups, int most);  // a warp for each group, if so many fit
  int ctas_for(const StepLaunch& launch) const;
  void launch(const void* kernel, int ctas, void* parameters);
  bool idle_within(double timeout_s);

  // two_level.cpp
  bool serves_two_levels(const Call& call) const;
  void cut_shards(Flight& flight, std::vector<Segment>& table) const;
  Arrival move_in_two_levels(const Flight& flight);

  // native.cpp
  static bool adds_up(const Call& call);
  static bool steps_aside(const Call& call);
  Arrival add_natively(const Flight& flight);
  void add_values(const Call& call);
  void add_codes(const Flight& flight);

  // failures.cpp
  void tick();
  void look_for_absent();
  void look_at_nccl();
  void fail_on_device();
  void note_broken(const std::string& text);
  void wait_until_failed();
  [[noreturn]] void throw_cuda(const Error& error, const Call& call, uintptr_t stream);
  Error cause_error(const Call* call, bool of_the_call_itself = false);
  Error stuck_error() const;
  FailureText failure_text() const;
  bool find_header(int rank, uint32_t sequence, Header* header) const;
  std::string prefix(Code code, const Call* call) const { return failure_text().prefix(code, call); }
  uint64_t others() const;
  bool failed() const { return plane_->failure() != 0; }
  bool given_up() const { return failed() || closed_ || Clock::now() > patience_until_.load(); }
  static Clock::time_point after(double seconds);

  const Origin origin_;
  const int device_;
  const std::vector<Peer> peers_;
  StreamLoan stream_;
  EventPool events_;
  const std::shared_ptr<NcclMemory> memory_;
  const int asked_ctas_, most_ctas_;  // 0: not limited; of a launch of steps
  const std::unique_ptr<NcclCommunicator, NcclCommunicator::LetGo> comm_;
  Team team_{};
  std::unique_ptr<ControlPlane> plane_;
  std::unique_ptr<CallLedger> ledger_;
  std::unique_ptr<NcclCarrier> carrier_;
  uint64_t tick_ = 0;

  std::string name_ = "new";
  std::atomic<double> timeout_s_{0};
  std::atomic<Clock::time_point> patience_until_{Clock::time_point::max()};  // of the host, with NCCL's calls
  std::atomic<uint64_t> sequence_{0};  // calls begun by this host; graphs replay more
  uint64_t uncounted_ = 0;             // of them made by verify
  std::atomic<bool> told_{false};      // this rank's caller has been given the first cause
  std::atomic<bool> closed_{false}, failing_{false};
  std::atomic<Clock::time_point> failed_at_{Clock::time_point::max()};
  std::mutex put_mutex_;           // one call is put on the stream at a time
  std::vector<Segment> segments_;  // of that call, and of its shards; kept for its capacity
  // Of the watchdog's thread: what the GPU and NCCL said when they last said something new.
  uint64_t seen_begun_ = 0, seen_ended_ = 0;
  Clock::time_point moved_at_{}, broken_at_ = Clock::time_point::max();
  std::mutex stats_mutex_;
  Stats stats_;
  int64_t nonfinite_before_ = 0;
  std::optional<KnownCommunicator> known_;  // last: it asks for all of the above
};

}  // namespace dpcomm
