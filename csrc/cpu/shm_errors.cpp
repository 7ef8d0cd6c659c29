// What an shm engine tells of a failure, and to whom.
#include "../host/failure_text.h"
#include "shm_engine.h"

namespace dpcomm {

FailureText ShmEngine::failure_text() const {
  FailureText text{};
  text.rank = team_.rank;
  text.nranks = team_.nranks;
  text.name = name_;
  text.timeout_s = double(timeout_ns_) * 1e-9;
  text.control = control_;
  for (const Peer& p : peers_) text.pids.push_back(p.pid);
  text.sequence = __atomic_load_n(&mine().sequence, __ATOMIC_RELAXED);
  text.uncounted = uncounted_;
  text.header = [this](int rank, uint32_t sequence, Header* header) {
    const size_t page = (sequence + 1) % 2;  // every call counts on the first channel, and the first one had page 0
    *header = channels_[0].box[size_t(rank)]->header[page][rank];
    return true;
  };
  text.last_sequence = [this](int rank) {
    return __atomic_load_n(&channels_[0].box[size_t(rank)]->sequence, __ATOMIC_RELAXED);
  };
  return text;
}

std::string ShmEngine::prefix(Code code, const Call* call) const { return failure_text().prefix(code, call); }

// A rank waited if it was in the call that timed out, and on time.
Error ShmEngine::cause_error(const Call* call) {
  const Failure failure = unpack(load_acquire(team_.failure));
  const bool during = failure.sequence == uint32_t(mine().sequence);
  const FailureText text = failure_text();
  return text.met(failure, call, !told_.exchange(true), during && !text.was_late(failure));
}

void ShmEngine::check() {
  origin_.refuse_fork();
  const uint64_t word = load_acquire(team_.failure);
  if (word != 0) throw failure_text().explain(unpack(word), nullptr, true);
}

}  // namespace dpcomm
