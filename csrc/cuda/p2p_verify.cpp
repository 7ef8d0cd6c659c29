// The first calls of a p2p communicator: what the driver says of peer access is no proof. Some machines drop writes
// between GPUs in silence (ACS, IOMMU), so data is moved both ways over every channel, by the real kernels.
#include "../core/protocol.h"
#include "../host/pattern.h"
#include "p2p_pattern.h"

namespace dpcomm {

namespace {

constexpr int64_t kElemsPerCta = 4096;  // a slice of 16 KiB for every CTA of every rank

}  // namespace

P2pEngine::Pattern::Pattern(int rank, int nranks, int channels)
    : elems(kElemsPerCta * nranks * channels + 1), image(pattern_of(rank, size_t(elems))) {
  for (const Algorithm algorithm : {Algorithm::direct, Algorithm::ring, Algorithm::oneshot}) {
    buffers.push_back(std::make_unique<DeviceArray<int32_t>>(image));
    Call call;
    call.addresses = {reinterpret_cast<char*>(buffers.back()->data())};
    call.counts = {algorithm == Algorithm::oneshot ? kElemsPerCta : elems};
    call.dtype = Dtype::int32;
    call.algorithm = algorithm;
    calls.push_back(call);
  }
}

int64_t P2pEngine::Pattern::first_wrong(size_t call, int nranks) const {
  return dpcomm::first_wrong(buffers[call]->read(), calls[call].counts[0], nranks);
}

void P2pEngine::prepare_verify(double timeout_s) {
  timeout_s_ = timeout_s;
  const CurrentDevice current(device());
  pattern_ = std::make_unique<Pattern>(rank_, nranks(), geometry_.channels);
}

void P2pEngine::begin_verify() {
  for (const Call& call : pattern_->calls) pattern_->pending.push_back(enqueue(call, stream()));
}

void P2pEngine::end_verify(double timeout_s, const std::string& name) {
  const CurrentDevice current(device());
  const auto refuse = [&](const std::string& what) {
    std::string how = geometry_.pinned ? "pinned host memory" : "memory of GPUs";
    return Error(Code::p2p, "rank " + std::to_string(rank_) + ": " + how + " does not carry data between ranks: " +
                                what + ". Some machines drop writes between GPUs (ACS, IOMMU: see the BIOS).");
  };
  for (size_t i = 0; i < pattern_->calls.size(); ++i) {
    if (!pattern_->pending[i]->synchronize(2 * timeout_s_, {})) throw refuse("a kernel has not ended");
    if (const std::exception_ptr error = pattern_->pending[i]->error()) {
      if (first_cause().cause == Cause::peer_died || first_cause().cause == Cause::peer_closed)
        std::rethrow_exception(error);
      throw refuse("no answer from a peer in " + std::to_string(timeout_s_) + " s");
    }
    if (const int64_t at = pattern_->first_wrong(i, nranks()); at >= 0)
      throw refuse("element " + std::to_string(at) + " of a " + name_of(pattern_->calls[i].algorithm) +
                   " all-reduce is wrong");
  }
  pattern_.reset();
  team_->set_timeout(timeout_s);
  timeout_s_ = timeout_s;
  uncounted_ = calls_;
  stats(true);
  name_ = name;
  known_.emplace([this] { return failure_text(); });
}

}  // namespace dpcomm
