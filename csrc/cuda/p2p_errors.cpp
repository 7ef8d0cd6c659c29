// What a p2p engine tells of a failure, and to whom.
#include <cstdio>

#include "../core/protocol.h"
#include "../gpu/sticky.h"
#include "p2p_engine.h"

namespace dpcomm {

FailureText P2pEngine::failure_text() const {
  FailureText text{};
  text.rank = rank_;
  text.nranks = geometry_.nranks;
  text.name = name_;
  text.timeout_s = timeout_s_;
  text.control = control_;
  for (const Peer& p : peers_) text.pids.push_back(p.pid);
  text.sequence = calls_.load();
  text.uncounted = uncounted_;
  text.header = [this](int rank, uint32_t sequence, Header* header) { return team_->header(rank, sequence, header); };
  text.last_sequence = [this](int rank) { return __atomic_load_n(&memory_->shared->calls[rank], __ATOMIC_RELAXED); };
  return text;
}

Error P2pEngine::cause_error(const Call* call, bool of_the_call_itself) {
  const Failure failure = first_cause();
  const bool first = !told_.exchange(true) || of_the_call_itself;
  const FailureText text = failure_text();
  return text.met(failure, call, first, !text.was_late(failure));
}

// A stream that does not exist is the caller's mistake, and nothing has begun. All else ends the communicator: the
// others would wait for this rank.
void P2pEngine::throw_cuda(const Error& error, const Call& call, uintptr_t stream) {
  const std::string what = error.what();
  if (is_invalid_stream(error) && !failed()) {
    --calls_;
    char handle[32];
    std::snprintf(handle, sizeof handle, "stream 0x%llx", static_cast<unsigned long long>(stream));
    throw Error(Code::cuda, prefix(Code::cuda, &call) + what + ", " + handle + ". Does it exist, on this device?");
  }
  abort(what);
  throw Error(error.code, prefix(error.code, &call) + sticky_text(error));
}

void P2pEngine::check() {
  refuse_fork();
  look();
  if (!failed()) return;
  told_ = true;
  throw failure_text().explain(first_cause(), nullptr, true);
}

}  // namespace dpcomm
