// The ranks of one communicator that live on one device in this process. One launch plays a call of all of them: as
// launches of their own they could wait for each other before all are running.
//
//   caller's streams   --- ready ---\                       /--- join: waits for `ended` ---
//   team's stream                    waits, kernel, `ended`
#pragma once
#include <condition_variable>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "../engine.h"
#include "../gpu/device.h"
#include "../gpu/events.h"
#include "../gpu/segment_tables.h"
#include "../host/control.h"
#include "cta_lease.h"
#include "p2p_call.h"
#include "p2p_geometry.h"

namespace dpcomm {

class DeviceTeam {
 public:
  struct Setup {
    int device;
    std::vector<int> ranks;  // that live here, in order
    P2pGeometry geometry;
    std::vector<char*> arenas;    // of all ranks, at this device's addresses
    const uint64_t* first_cause;  // the same, in host memory
    ControlPage* control;         // that it lies in, at the host's address
    RankStatus* status;           // [rank]
    double timeout_s;             // of one wait on the device
  };

  // One call of all ranks that live here.
  struct Launch {
    std::vector<std::vector<Segment>> segments;  // [rank here]
    std::vector<Header> headers;
    std::vector<EventPool::Lent> ready;  // null: has not entered yet
    int entered = 0;
    bool capturing = false;
    bool over = false;      // launched; or never will be, and the first cause says why
    EventPool::Lent ended;  // null: never launched
  };

  explicit DeviceTeam(const Setup& setup);
  ~DeviceTeam();
  DeviceTeam(const DeviceTeam&) = delete;

  // One rank's part in its next call, behind the stream's earlier work. The last one to enter launches. Throws what the
  // runtime answers: before this rank has entered, or, to the last one, when the launch fails; then the first cause is
  // set.
  std::shared_ptr<Launch> enter(int here, const Call& call, cudaStream_t stream);
  // Tensors that a call of this rank may have.
  int64_t most_tensors() const { return SegmentTables::kMost / int64_t(ranks_.size()); }
  // True once it is over; false when the time ran out, or the caller was interrupted.
  bool await_launch(const Launch& launch, double timeout_s, const std::function<bool()>& interrupted);
  // Makes the stream wait for its end. After await_launch.
  void join(const Launch& launch, cudaStream_t stream);
  // Ranks that have not entered a launch.
  std::vector<int> absent(const Launch& launch);
  // True when nothing that this rank has entered waits for other ranks any more.
  bool settled_within(int here, double timeout_s);
  // Launches that still wait for a rank never will be. The first cause is set.
  void give_up();

  void set_timeout(double timeout_s);  // no call is on its way
  bool idle_within(double timeout_s);
  // A rank that lives here has closed, and nothing is on its way. The last one gives the CTAs back.
  void left();
  // What rank announced for the call of that number, if it is still known; waits a second at most, never throws.
  bool header(int rank, uint32_t sequence, Header* header);

  int device() const { return device_; }
  cudaStream_t stream() const { return stream_.get(); }

 private:
  std::shared_ptr<Launch> next_of(int here);
  bool agreed(const Launch& launch) const;
  void issue(Launch& launch);
  bool place_segments(const Launch& launch, P2pCall& call);
  void start(const void* kernel, int ctas, P2pCall& call);

  const int device_;
  const std::vector<int> ranks_;
  const P2pGeometry geometry_;
  CtaLease lease_;
  const bool far_domain_;  // see start()
  ControlPage* const control_;
  const StreamLoan stream_;
  EventPool events_;
  SegmentTables tables_;
  DeviceArray<Mailbox*> box_;  // [channel][rank]
  DeviceArray<RankState> states_;
  DeviceArray<P2pRank> players_;
  DeviceArray<P2pTeam> team_;
  P2pTeam team_as_written_{};
  std::map<const void*, int> threads_;  // of each kernel's CTAs

  std::mutex mutex_;  // guards all below
  std::condition_variable changed_;
  std::deque<std::shared_ptr<Launch>> open_;  // not everybody has entered yet, in order
  std::vector<uint64_t> entered_;             // [rank here]: calls so far
  uint64_t issued_ = 0;
  size_t closed_ = 0;  // ranks
  std::shared_ptr<Launch> disagreed_;
};

}  // namespace dpcomm
