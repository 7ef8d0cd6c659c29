#include "failure_text.h"

#include <cstdio>

#include "communicators.h"

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

bool give_up_for(ControlPage& control, int rank, uint64_t sequence, const std::string& reason) {
  if (load_acquire(&control.failure) != 0) return false;  // the first cause stands, and its text may be being read
  char* const text = control.reason[rank];
  for (int i = 0; i < kReasonBytes; ++i) {
    const char c = i + 1 < kReasonBytes && size_t(i) < reason.size() ? reason[size_t(i)] : '\0';
    __atomic_store_n(text + i, c, __ATOMIC_RELAXED);
  }
  set_once(&control.failure, pack({Cause::aborted, uint8_t(rank), 0, Field::none, uint32_t(sequence)}));
  return true;
}

std::string FailureText::prefix(Code code, const Call* call) const {
  std::string text = std::string("[dpcomm:") + name_of(code) + "] rank " + std::to_string(rank) + "/" +
                     std::to_string(nranks) + " comm=" + name + " seq=" + std::to_string(shown(sequence));
  if (call) text += " " + call->text();
  return text + ": ";
}

Error FailureText::unserved(const Call& call) const {
  const char* why = "codec fp16 serves sum and mean of float32, float16 and bfloat16. Use codec none.";
  if (call.codec == CodecKind::bf16) why = "codec bf16 is of algorithm native, of engine nccl. Use codec fp16.";
  if (call.algorithm == Algorithm::two_level)
    why =
        "algorithm two_level is of engine two_level, and of engine nccl where the communicator was made with it, for "
        "several hosts. Use algorithm auto.";
  if (call.algorithm == Algorithm::native)
    why =
        "algorithm native is the all-reduce of a library: engine nccl has one (codecs none, fp16 and bf16; minima and "
        "maxima of whole numbers only), and engine gloo (codec none, sum and mean of float32 and float64). Use "
        "algorithm auto with codec none or fp16.";
  return Error(Code::unsupported, prefix(Code::unsupported, &call) + why);
}

std::string FailureText::process(int r) const {
  const std::string text = "pid " + std::to_string(pids[size_t(r)]);
  return hosts.empty() || hosts[size_t(r)].empty() ? text : text + " on " + hosts[size_t(r)];
}

Error FailureText::explain(const Failure& f, const Call* call, bool here) const {
  const std::string seq = std::to_string(shown(f.sequence)), who = "rank " + std::to_string(f.rank);
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
      code = Code::peer_lost, what = who + " closed its connection (clean shutdown) at seq " +
                                     std::to_string(shown(control->closed[f.rank] - 1));
      break;
    case Cause::peer_died:
      code = Code::peer_lost,
      what = who + " (" + process(f.rank) + ") disappeared; check its output, and dmesg for the OOM killer";
      break;
    case Cause::timeout:
      code = Code::timeout, what = waiting_text(f, &waiting) + " at seq " + seq;
      break;
    case Cause::aborted:
      what = who + " gave up at seq " + seq + ": " + control->reason[f.rank];
      break;
    case Cause::internal:
      code = Code::internal, what = who + " met an internal error at seq " + seq;
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

Error FailureText::met(const Failure& failure, const Call* call, bool first, bool waited) const {
  return explain(failure, call, first && (waited || failure.cause != Cause::timeout));
}

bool FailureText::was_late(const Failure& failure) const {
  return (__atomic_load_n(&control->waiting_for[failure.rank], __ATOMIC_RELAXED) >> rank & 1) != 0;
}

std::string FailureText::field_values(const Failure& f) const {
  const std::string first = "rank " + std::to_string(f.rank), second = "rank " + std::to_string(f.other);
  const std::string field = field_name(f.field);
  if (f.field == Field::layout)
    return first + " and " + second + " have as many elements, but in tensors of other sizes";
  Header a{}, b{};
  if (!header(f.rank, f.sequence, &a) || !header(f.other, f.sequence, &b))
    return field + " differs between " + first + " and " + second;
  if (f.field == Field::bucket)
    return first + " is in " + field_value(f.field, a) + ", " + second + " in " + field_value(f.field, b);
  return field + ": " + first + " has " + field_value(f.field, a) + ", " + second + " has " + field_value(f.field, b);
}

std::string FailureText::waiting_text(const Failure& f, std::vector<int>* ranks) const {
  const uint64_t late = __atomic_load_n(&control->waiting_for[f.rank], __ATOMIC_RELAXED);
  std::string text = f.rank == rank ? "waiting for " : "rank " + std::to_string(f.rank) + " waited for ";
  for (int r = 0; r < nranks; ++r) {
    if ((late >> r & 1) == 0) continue;
    if (!ranks->empty()) text += ", ";
    ranks->push_back(r);
    text += "rank " + std::to_string(r) + " (" + process(r);
    if (hosts.empty() || hosts[size_t(r)].empty()) text += ", state " + process_state(pids[size_t(r)]);
    text += ", last seq " + std::to_string(shown(last_sequence(r)));
    const std::string elsewhere = call_elsewhere(*this, pids[size_t(r)], hosts.empty() ? "" : hosts[size_t(r)]);
    text += (elsewhere.empty() ? "" : "; ") + elsewhere + ")";
  }
  char limit[48];
  std::snprintf(limit, sizeof limit, " for %g s", timeout_s);
  return text + limit;
}

}  // namespace dpcomm
