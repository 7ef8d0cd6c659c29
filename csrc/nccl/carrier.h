// NCCL as a carrier of messages (csrc/carried/carrier.h): nothing here waits on the host. An exchange is a group of
// ncclSend and ncclRecv behind what the steps' stream has; waiting for it makes that stream wait.
#pragma once
#include <functional>
#include <vector>

#include "../carried/carrier.h"
#include "../gpu/events.h"
#include "communicator.h"

namespace dpcomm {

class NcclCarrier final : public Carrier {
 public:
  // `stopped`: whether the communicator has failed, or its time is up.
  NcclCarrier(NcclCommunicator& comm, int device, cudaStream_t steps, EventPool& events, std::function<bool()> stopped);

  // How the next call travels: beside the steps, on a stream of its own, or between them. A call of one slice has
  // nothing to do meanwhile, and saves the events.
  void begin(bool beside);

  int64_t exchange(const std::vector<Transfer>& sends, const std::vector<Transfer>& receives) override;
  Arrival wait(int64_t ticket, double timeout_s) override;
  // After a call that broke off: the steps' stream waits for the exchanges that nobody has waited for. Best effort.
  void join_all();
  void abort() override { comm_.abort(); }
  void close() override {}

 private:
  struct Flight {
    EventPool::Lent here;  // null: on the steps' own stream
    std::string broken;
  };
  NcclCommunicator& comm_;
  const cudaStream_t steps_;
  StreamLoan wire_;
  EventPool& events_;
  const std::function<bool()> stopped_;
  bool beside_ = false;
  std::vector<Flight> flights_;  // of this call, by ticket
};

}  // namespace dpcomm
