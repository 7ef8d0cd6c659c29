// What engine nccl does when something goes wrong, and what it tells whom. The watchdog's thread looks at the GPU's
// progress, at NCCL and at the control plane, every 100 ms; it makes no call of the CUDA runtime, which could spoil
// somebody's capture of a graph.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <thread>

#include "../core/protocol.h"
#include "../gpu/sticky.h"
#include "engine.h"

namespace dpcomm {

namespace {

// How long an error of NCCL's waits for the control plane to say what is behind it: mostly a peer has died.
constexpr double kCauseWaitS = 1.0;

}  // namespace

NcclEngine::Clock::time_point NcclEngine::after(double seconds) {
  return Clock::now() +
         std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(std::min(seconds, 1e8)));
}

uint64_t NcclEngine::others() const { return ((uint64_t{1} << (nranks() - 1) << 1) - 1) & ~(uint64_t{1} << rank()); }

void NcclEngine::tick() {
  if (failed()) return fail_on_device();
  look_at_nccl();
  look_for_absent();
}

void NcclEngine::look_at_nccl() {
  const std::string text = comm_->async_error();
  if (text.empty()) return;
  if (broken_at_ == Clock::time_point::max()) broken_at_ = Clock::now();
  if (Clock::now() - broken_at_ < std::chrono::duration<double>(kCauseWaitS)) return;
  plane_->propose({Cause::aborted, uint8_t(rank()), 0, Field::none, uint32_t(sequence_)}, 0, text);
}

// A call's time counts from when the GPU has come to it, whatever its stream had to do before.
void NcclEngine::look_for_absent() {
  const uint64_t ended = load_acquire(&memory_->state->ended), begun = load_acquire(&memory_->state->begun);
  if (begun == ended || begun != seen_begun_ || ended != seen_ended_) {
    seen_begun_ = begun, seen_ended_ = ended, moved_at_ = Clock::now();
    return;
  }
  const uint64_t call = ledger_->agreed() + 1, absent = sequence_ >= call ? ledger_->missing(call) & others() : 0;
  for (int r = 0; r < nranks(); ++r)  // who left after fewer calls will not come; what it did announce has been heard
    if (const uint64_t left = load_acquire(&plane_->page().closed[r]); (absent >> r & 1) && left != 0 && left <= call)
      return plane_->propose({Cause::peer_closed, uint8_t(r), 0, Field::none, uint32_t(call)}, uint64_t{1} << r);
  if (Clock::now() - moved_at_ < std::chrono::duration<double>(timeout_s_)) return;
  plane_->propose({Cause::timeout, uint8_t(rank()), 0, Field::none, uint32_t(call)}, absent ? absent : others());
}

// The failure word first: what runs on after NCCL was stopped finds it, and fills the bucket with NaNs.
void NcclEngine::fail_on_device() {
  if (failing_.exchange(true)) return;
  failed_at_ = Clock::now();
  store_release(&memory_->state->failure, std::max<uint64_t>(plane_->failure(), 1));  // pairs with end_call()
  comm_->abort();
}

// NCCL has refused or given up a call on this thread. Returns once all ranks know the cause.
void NcclEngine::note_broken(const std::string& text) {
  const Failure mine{Cause::aborted, uint8_t(rank()), 0, Field::none, uint32_t(sequence_)};
  if (!failed() && Clock::now() > patience_until_.load())
    plane_->propose({Cause::timeout, mine.rank, 0, Field::none, mine.sequence}, others());
  else if (!plane_->wait_failed(kCauseWaitS))
    plane_->propose(mine, 0, text);
  wait_until_failed();
}

// The cause is proposed, and will be decided.
void NcclEngine::wait_until_failed() {
  plane_->wait_failed(kCauseWaitS + 2 * ControlPlane::kDecideS * nranks());
  fail_on_device();
}

FailureText NcclEngine::failure_text() const {
  FailureText text{};
  text.rank = rank();
  text.nranks = nranks();
  text.name = name_;
  text.timeout_s = timeout_s_;
  text.control = &plane_->page();
  for (const Peer& p : peers_) text.pids.push_back(p.pid), text.hosts.push_back(p.host);
  text.sequence = sequence_;
  text.uncounted = uncounted_;
  text.header = [this](int rank, uint32_t sequence, Header* header) { return find_header(rank, sequence, header); };
  text.last_sequence = [this](int rank) { return ledger_->last_sequence(rank); };
  return text;
}

// The control plane may tell of a mismatch before the last of the headers has come.
bool NcclEngine::find_header(int rank, uint32_t sequence, Header* header) const {
  for (const auto until = after(ControlPlane::kRestS); !ledger_->header(rank, sequence, header);) {
    if (Clock::now() > until) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    ledger_->poll();
  }
  return true;
}

Error NcclEngine::cause_error(const Call* call, bool of_the_call_itself) {
  const Failure failure = unpack(plane_->failure());
  const bool first = !told_.exchange(true) || of_the_call_itself;
  const FailureText text = failure_text();
  return text.met(failure, call, first, !text.was_late(failure));
}

Error NcclEngine::stuck_error() const {
  return Error(Code::timeout,
               prefix(Code::timeout, nullptr) +
                   "NCCL has not let go of the GPU after ncclCommAbort, or a call's stream does not move. "
                   "Restart the process: nothing else ends this.");
}

// A stream that does not exist is the caller's mistake, and nothing has begun. All else ends the communicator: the
// others would wait for this rank.
void NcclEngine::throw_cuda(const Error& error, const Call& call, uintptr_t stream) {
  const std::string what = error.what();
  if (is_invalid_stream(error)) {
    char handle[32];
    std::snprintf(handle, sizeof handle, "stream 0x%llx", static_cast<unsigned long long>(stream));
    throw Error(Code::cuda, prefix(Code::cuda, &call) + what + ", " + handle + ". Does it exist, on this device?");
  }
  abort(what);
  throw Error(error.code, prefix(error.code, &call) + sticky_text(error));
}

void NcclEngine::abort(const std::string& reason) {
  if (in_forked_child() || closed_) return;
  plane_->propose({Cause::aborted, uint8_t(rank()), 0, Field::none, uint32_t(sequence_)}, 0, reason);
}

void NcclEngine::check() {
  refuse_fork();
  if (!failed()) return;
  told_ = true;
  throw failure_text().explain(unpack(plane_->failure()), nullptr, true);
}

}  // namespace dpcomm
