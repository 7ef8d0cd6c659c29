// Engines gloo, torch and two_level: tensors on the CPU of any host; a carrier moves the messages, sockets of our own
// agree on each call before and tell of failures.
#pragma once
#include <atomic>
#include <memory>
#include <mutex>
#include <optional>

#include "../carried/schedule.h"
#include "../engine.h"
#include "../host/arena.h"
#include "../host/communicators.h"
#include "../host/control_plane.h"
#include "../host/origin.h"
#include "kernels.h"
#include "two_level.h"

namespace dpcomm {

// What ranks ask for; equal on all of them.
struct CarriedWish {
  int64_t scratch_bytes;    // of one rank, at most
  int64_t slice_bytes = 0;  // 0: what performs best
};

// How ranks that are elsewhere are spoken of.
struct CarriedPeer {
  int pid;
  std::string host;  // empty: this host
};

class CarriedEngine final : public Engine {
 public:
  // `peers`: by rank, this one included. `memory`: of engine two_level. Throws Error(argument) if scratch_bytes cannot
  // hold the smallest slots.
  CarriedEngine(int rank, const CarriedWish& wish, std::vector<CarriedPeer> peers, std::unique_ptr<ControlPlane> plane,
                std::unique_ptr<Carrier> carrier, const Isa& isa, const std::string& engine_name,
                std::unique_ptr<HostMemory> memory = nullptr);
  ~CarriedEngine() override;

  // First call, on all ranks at once: moves and checks a pattern. Throws like allreduce. Afterwards messages carry
  // `name`, and the call is not counted.
  void verify(double timeout_s, const std::string& name);

  int rank() const override { return team_.rank; }
  int nranks() const override { return team_.nranks; }
  bool in_forked_child() const override { return origin_.in_forked_child(); }
  bool served_from_outside() const override { return true; }
  void allreduce(const Call& call) override;
  void abort(const std::string& reason) override;
  void check() override;
  void close() override;
  Stats stats(bool reset) override;
  Description describe() override;

  // True once the communicator has failed; false after timeout_s, or when it was closed. Any thread: somebody must then
  // abort the carrier, so that a call that waits for it returns.
  bool wait_failed(double timeout_s) { return plane_->wait_failed(timeout_s); }

 private:
  Header begin(const Call& call, Bucket& bucket);
  void agree(const Call& call, const Header& header);
  void move(const Call& call, const Header& header, const Bucket& bucket);
  bool serves(const Call& call) const;
  bool takes_two_levels(const Call& call) const;
  bool adds_up(const Call& call) const;  // whether the carrier does
  bool steps_aside(const Call& call, int64_t groups) const;
  Arrival add_by_carrier(const Call& call);
  [[noreturn]] void fail_arrival(const Call& call, const Arrival& arrival);
  [[noreturn]] void fail(const Call& call);
  void check_pattern();
  Error cause_error(const Call* call, bool in_call);
  FailureText failure_text() const;

  const Origin origin_;
  const std::vector<CarriedPeer> peers_;
  const std::unique_ptr<ControlPlane> plane_;
  const std::unique_ptr<Carrier> carrier_;
  const Isa& isa_;
  const std::string engine_name_;
  Arena scratch_;
  std::vector<Mailbox*> box_;  // my copies of everyone's arena
  Team team_{};                // of all ranks
  std::unique_ptr<TwoLevel> two_level_;
  double timeout_s_ = 0;
  std::string name_ = "new";
  std::atomic<uint64_t> sequence_{0};  // calls begun
  uint64_t uncounted_ = 0;             // of them, made by verify()
  int64_t used_bytes_ = 0;             // of the scratch
  std::vector<Segment> segments_;      // of the current call; kept for its capacity
  std::vector<Header> headers_;        // of the current call, by rank
  std::atomic<bool> told_{false};      // this rank's caller has been given the first cause
  std::atomic<bool> closed_{false};
  std::mutex stats_mutex_;
  Stats stats_;
  std::optional<KnownCommunicator> known_;  // last: it asks for all of the above
};

}  // namespace dpcomm
