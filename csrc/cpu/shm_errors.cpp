// The failure word of an shm communicator in words: what happened, on which rank, and what to do.
#include <cctype>
#include <cstdio>

#include "shm_engine.h"

namespace dpcomm {

namespace {

// "S (sleeping)" from /proc; empty where it cannot be seen (another PID namespace).
std::string process_state(int pid) {
  char path[32], line[512];
  std::snprintf(path, sizeof path, "/proc/%d/stat", pid);
  std::FILE* file = std::fopen(path, "re");
  if (!file) return "gone";
  const size_t n = std::fread(line, 1, sizeof line - 1, file);
  std::fclose(file);
  line[n] = '\0';
  const std::string text(line);
  const size_t end = text.rfind(')');  // the name may hold anything
  if (end == std::string::npos || end + 2 >= text.size()) return "unknown";
  switch (text[end + 2]) {
    case 'R':
      return "R (running)";
    case 'S':
      return "S (sleeping)";
    case 'D':
      return "D (waiting for a device)";
    case 'T':
      return "T (stopped)";
    case 't':
      return "t (in a debugger)";
    case 'Z':
      return "Z (dead, not yet reaped)";
    default:
      return std::string(1, text[end + 2]);
  }
}

const char* field_name(Field field) {
  switch (field) {
    case Field::none:
      return "nothing";
    case Field::sequence:
      return "call number";
    case Field::bucket:
      return "bucket";
    case Field::dtype:
      return "dtype";
    case Field::op:
      return "op";
    case Field::codec:
      return "codec";
    case Field::algorithm:
      return "algorithm";
    case Field::numel:
      return "numel";
    case Field::tensors:
      return "number of tensors";
    case Field::layout:
      return "sizes of the tensors";
  }
  return "?";
}

std::string field_value(Field field, const Header& h) {
  switch (field) {
    case Field::none:
      return "";
    case Field::sequence:
      return std::to_string(h.sequence);
    case Field::bucket:
      return h.bucket < 0 ? "no bucket" : "bucket " + std::to_string(h.bucket);
    case Field::dtype:
      return name_of(Dtype(h.dtype));
    case Field::op:
      return name_of(Op(h.op));
    case Field::codec:
      return name_of(CodecKind(h.codec));
    case Field::algorithm:
      return name_of(Algorithm(h.algorithm));
    case Field::numel:
      return std::to_string(h.numel);
    case Field::tensors:
      return std::to_string(h.tensors);
    case Field::layout:
      return "others";
  }
  return "?";
}

}  // namespace

std::string ShmEngine::prefix(Code code, const Call* call) const {
  std::string text = std::string("[dpcomm:") + name_of(code) + "] rank " + std::to_string(team_.rank) + "/" +
                     std::to_string(team_.nranks) + " comm=" + name_ +
                     " seq=" + std::to_string(shown(__atomic_load_n(&mine().sequence, __ATOMIC_RELAXED)));
  if (call) text += " " + call->text();
  return text + ": ";
}

// The first time a caller on this rank meets the cause, it gets the cause itself, if that is a fact about the group. A
// rank that was late for a time-out, and every call after the first, is told that the communicator has been aborted.
Error ShmEngine::cause_error(const Call* call) {
  const Failure failure = unpack(load_acquire(team_.failure));
  const bool during = failure.sequence == uint32_t(mine().sequence);
  bool here = !told_.exchange(true);
  if (failure.cause == Cause::timeout) {
    const uint64_t late = __atomic_load_n(&control_->waiting_for[failure.rank], __ATOMIC_RELAXED);
    here = here && during && (late >> team_.rank & 1) == 0;
  }
  return explain(failure, call, here);
}

Error ShmEngine::explain(const Failure& f, const Call* call, bool here) const {
  const std::string seq = std::to_string(shown(f.sequence)), rank = "rank " + std::to_string(f.rank);
  Code code = Code::aborted;
  std::string what, advice = " Make a new communicator (after a failed step of DDP: dpcomm.recover(ddp)).";
  std::vector<int> waiting;
  switch (f.cause) {
    case Cause::none:
      code = Code::internal, what = "it failed and nobody said why";
      break;
    case Cause::mismatch:
      code = Code::mismatch, what = field_values(f) + " (seq " + seq + ")",
      advice = " Every rank must make the same calls in the same order.";
      break;
    case Cause::peer_closed:
      code = Code::peer_lost, what = rank + " closed its connection (clean shutdown) at seq " +
                                     std::to_string(shown(control_->closed[f.rank] - 1));
      break;
    case Cause::peer_died:
      code = Code::peer_lost, what = rank + " (pid " + std::to_string(peers_[f.rank].pid) +
                                     ") disappeared; check its output, and dmesg for the OOM killer";
      break;
    case Cause::timeout:
      code = Code::timeout, what = waiting_text(f, &waiting) + " at seq " + seq;
      break;
    case Cause::aborted:
      what = rank + " gave up at seq " + seq + ": " + control_->reason[f.rank];
      break;
    case Cause::internal:
      code = Code::internal, what = rank + " met an internal error at seq " + seq;
      break;
  }
  if (!here && code != Code::aborted) {
    what = "communicator aborted at seq " + seq + " because: [" + name_of(code) + "] " + what;
    code = Code::aborted;
  }
  Error error(code, prefix(code, call) + what + "." + advice);
  if (code == Code::peer_lost) error.rank = f.rank;
  if (code == Code::timeout) error.waiting_for = waiting;
  return error;
}

std::string ShmEngine::field_values(const Failure& f) const {
  const size_t page = (f.sequence + 1) % 2;  // every call counts on the first channel, and the first one had page 0
  const std::vector<Mailbox*>& box = channels_[0].box;
  const Header& a = box[f.rank]->header[page][f.rank];
  const Header& b = box[f.other]->header[page][f.other];
  const std::string name = field_name(f.field);
  if (f.field == Field::bucket)
    return "rank " + std::to_string(f.rank) + " is in " + field_value(f.field, a) + ", rank " +
           std::to_string(f.other) + " in " + field_value(f.field, b);
  if (f.field == Field::layout)
    return "rank " + std::to_string(f.rank) + " and rank " + std::to_string(f.other) +
           " have as many elements, but in tensors of other sizes";
  return name + ": rank " + std::to_string(f.rank) + " has " + field_value(f.field, a) + ", rank " +
         std::to_string(f.other) + " has " + field_value(f.field, b);
}

std::string ShmEngine::waiting_text(const Failure& f, std::vector<int>* ranks) const {
  const uint64_t late = __atomic_load_n(&control_->waiting_for[f.rank], __ATOMIC_RELAXED);
  std::string text = f.rank == team_.rank ? "waiting for " : "rank " + std::to_string(f.rank) + " waited for ";
  for (int r = 0; r < team_.nranks; ++r) {
    if ((late >> r & 1) == 0) continue;
    if (!ranks->empty()) text += ", ";
    ranks->push_back(r);
    text += "rank " + std::to_string(r) + " (pid " + std::to_string(peers_[r].pid) + ", state " +
            process_state(peers_[r].pid) + ", last seq " +
            std::to_string(shown(__atomic_load_n(&channels_[0].box[size_t(r)]->sequence, __ATOMIC_RELAXED))) + ")";
  }
  char limit[48];
  std::snprintf(limit, sizeof limit, " for %g s", double(timeout_ns_) * 1e-9);
  return text + limit;
}

void ShmEngine::check() {
  refuse_fork();
  const uint64_t word = load_acquire(team_.failure);
  if (word != 0) throw explain(unpack(word), nullptr, true);
}

}  // namespace dpcomm
