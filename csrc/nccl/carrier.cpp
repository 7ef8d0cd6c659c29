#include "carrier.h"

#include <utility>

namespace dpcomm {

NcclCarrier::NcclCarrier(NcclCommunicator& comm, int device, cudaStream_t steps, EventPool& events,
                         std::function<bool()> stopped)
    : comm_(comm), steps_(steps), wire_(device), events_(events), stopped_(std::move(stopped)) {}

void NcclCarrier::begin(bool beside) {
  beside_ = beside;
  flights_.clear();
}

int64_t NcclCarrier::exchange(const std::vector<Transfer>& sends, const std::vector<Transfer>& receives) {
  Flight& flight = flights_.emplace_back();
  const cudaStream_t wire = beside_ ? wire_.get() : steps_;
  try {
    if (beside_) {
      const EventPool::Lent written = events_.take();
      check_cuda(cudaEventRecord(written.get(), steps_), "cudaEventRecord");
      check_cuda(cudaStreamWaitEvent(wire, written.get(), 0), "cudaStreamWaitEvent");
    }
    if (!sends.empty() || !receives.empty())
      comm_.group(
          [&](const nccl::Api& api, nccl::Comm comm) {
            using nccl::DataType;
            for (const Transfer& t : sends)
              comm_.took(api.Send(t.data, size_t(t.bytes), DataType::uint8, t.peer, comm, wire), "ncclSend");
            for (const Transfer& t : receives)
              comm_.took(api.Recv(t.data, size_t(t.bytes), DataType::uint8, t.peer, comm, wire), "ncclRecv");
          },
          stopped_);
    if (beside_) {
      flight.here = events_.take();
      check_cuda(cudaEventRecord(flight.here.get(), wire), "cudaEventRecord");
    }
  } catch (const std::exception& error) {
    flight.broken = error.what();
  }
  return int64_t(flights_.size()) - 1;
}

Arrival NcclCarrier::wait(int64_t ticket, double) {
  const Flight& flight = flights_[size_t(ticket)];
  if (!flight.broken.empty()) return {Arrival::Kind::broken, -1, flight.broken};
  if (flight.here) {
    const cudaError_t status = cudaStreamWaitEvent(steps_, flight.here.get(), 0);
    if (status != cudaSuccess) return {Arrival::Kind::broken, -1, cudaGetErrorString(status)};
  }
  return {};
}

void NcclCarrier::join_all() {
  if (!beside_) return;
  const EventPool::Lent all = events_.take();
  if (cudaEventRecord(all.get(), wire_.get()) == cudaSuccess) cudaStreamWaitEvent(steps_, all.get(), 0);
  cudaGetLastError();
}

}  // namespace dpcomm
