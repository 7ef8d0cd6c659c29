#include "carried_engine.h"

#include <algorithm>

#include "../host/call_facts.h"
#include "../host/pattern.h"
#include "carried_steps.h"

namespace dpcomm {

namespace {

// How long a carrier's error waits for the control plane to say what is behind it.
constexpr double kCauseWaitS = 1.0;
// The carrier's own all-reduce takes tensors in pieces that each have the time limit, two at once: gloo then has as
// many threads at work, which cost some per cent where processors are few (docs/performance.md). So pieces are large.
constexpr int64_t kPieceBytes = int64_t{128} << 20;

// From which size on it takes what no codec encodes; 0: never. Two ranks are as fast alone; three have each hear two
// others at once, where a ring hears one.
int64_t aside_bytes(int nranks) { return nranks == 2 ? 0 : 512 * 1024; }

template <class T>
void divide(char* data, int64_t count, int nranks) {
  T* const x = reinterpret_cast<T*>(data);
  for (int64_t i = 0; i < count; ++i) x[i] /= T(nranks);
}

}  // namespace

CarriedEngine::CarriedEngine(int rank, const CarriedWish& wish, std::vector<CarriedPeer> peers,
                             std::unique_ptr<ControlPlane> plane, std::unique_ptr<Carrier> carrier, const Isa& isa,
                             const std::string& engine_name, std::unique_ptr<HostMemory> memory)
    : peers_(std::move(peers)),
      plane_(std::move(plane)),
      carrier_(std::move(carrier)),
      isa_(isa),
      engine_name_(engine_name) {
  const int nranks = int(peers_.size());
  const int64_t flat_bytes = memory ? wish.scratch_bytes / 4 : wish.scratch_bytes;
  const int64_t slot_bytes = carried_slot_bytes(nranks, flat_bytes, wish.slice_bytes);
  const int64_t arena = carried_arena_bytes(nranks, slot_bytes);
  used_bytes_ = carried_used_bytes(nranks, slot_bytes);
  scratch_ = Arena::sparse(size_t(nranks * arena), size_t(used_bytes_));
  for (int r = 0; r < nranks; ++r) box_.push_back(reinterpret_cast<Mailbox*>(scratch_.data() + r * arena));
  team_ = {rank, nranks, box_.data(), &plane_->page().failure, kCarriedSlots, slot_bytes, slot_bytes, true};
  if (memory)
    two_level_ = std::make_unique<TwoLevel>(rank, nranks, std::move(*memory), wish.scratch_bytes / 2, *plane_, isa_);
}

CarriedEngine::~CarriedEngine() { close(); }

void CarriedEngine::verify(double timeout_s, const std::string& name) {
  timeout_s_ = timeout_s;
  if (team_.nranks > 1) check_pattern();
  uncounted_ = sequence_;
  stats(true);
  name_ = name;
  known_.emplace([this] { return failure_text(); });
}

void CarriedEngine::allreduce(const Call& call) {
  origin_.refuse_fork();
  if (plane_->failure() != 0) throw cause_error(&call, false);
  if (!serves(call)) throw failure_text().unserved(call);
  if (team_.nranks == 1) return;
  Bucket bucket{};
  const Header header = begin(call, bucket);
  agree(call, header);
  move(call, header, bucket);
}

Header CarriedEngine::begin(const Call& call, Bucket& bucket) {
  const int64_t groups = fill_segments(call, segments_);
  bucket = {segments_.data(), int64_t(segments_.size()), groups};
  Header header = header_of(call, groups, team_.nranks, Reach::network);
  header.sequence = ++sequence_;
  if (takes_two_levels(call)) {
    header.algorithm = uint8_t(Algorithm::two_level);
    header.layout ^= two_level_->partition().hash();
  } else if (steps_aside(call, groups)) {
    header.algorithm = uint8_t(Algorithm::native);
  }
  const int64_t chunk_bytes = groups * group_bytes(call.dtype, call.codec) / parts_of(header, team_.nranks);
  team_.slice_bytes = slice_bytes_for(chunk_bytes, team_.slot_bytes);
  return header;
}

// Before the carrier sees a size: libraries that are given different ones abort, hang or return garbage.
void CarriedEngine::agree(const Call& call, const Header& header) {
  const int64_t start = now_ns();
  // The caller's thread asks about Ctrl-C, and aborts; this one would have to wait for Python's lock.
  if (!plane_->exchange_headers(header, headers_, timeout_s_, nullptr)) fail(call);
  const std::lock_guard lock(stats_mutex_);
  stats_.wait_s += double(now_ns() - start) * 1e-9;
}

void CarriedEngine::move(const Call& call, const Header& header, const Bucket& bucket) {
  Tally tally;
  tally.since = now_ns();
  int64_t sent = 0;
  Arrival end;
  if (Algorithm(header.algorithm) == Algorithm::two_level) {
    const auto ended = two_level_->play(*carrier_, bucket, header, timeout_s_, tally);
    if (!ended) fail(call);
    end = *ended;
    sent = two_level_->wire_bytes();
  } else {
    TimedSteps steps(isa_, team_, bucket, header, tally);
    const CarriedCall carried{team_, bucket, header, group_bytes(call.dtype, call.codec), timeout_s_};
    const bool aside = Algorithm(header.algorithm) == Algorithm::native;
    end = aside ? add_by_carrier(call) : play(*carrier_, steps, carried);
    sent = wire_bytes(header, bucket.groups, team_.rank, team_.nranks, Reach::network);
  }
  tally.enter(Phase::wait);
  if (end.kind != Arrival::Kind::here) fail_arrival(call, end);
  const std::lock_guard lock(stats_mutex_);
  count_call(stats_, header, sent);
  add_times(stats_, tally);
  stats_.nonfinite_groups += tally.nonfinite_groups;
}

bool CarriedEngine::serves(const Call& call) const {
  if (call.algorithm == Algorithm::native) return adds_up(call);
  if (call.algorithm != Algorithm::two_level) return served(call);
  Call open = call;
  open.algorithm = Algorithm::automatic;
  return two_level_ && served(open);
}

bool CarriedEngine::takes_two_levels(const Call& call) const {
  if (call.algorithm != Algorithm::automatic) return call.algorithm == Algorithm::two_level;
  return two_level_ && TwoLevel::suits(call);
}

bool CarriedEngine::adds_up(const Call& call) const {
  return call.codec == CodecKind::none && call.op <= Op::mean && carrier_->adds(call.dtype);
}

// Values that nothing encodes gain nothing here: the carrier's own all-reduce sends the same bytes
// (docs/performance.md). A fixed rule, from data that are equal on all ranks.
bool CarriedEngine::steps_aside(const Call& call, int64_t groups) const {
  if (call.algorithm != Algorithm::automatic || !adds_up(call)) return call.algorithm == Algorithm::native;
  const int64_t bytes = groups * group_bytes(call.dtype, call.codec);
  const int64_t tensors = std::max<int64_t>(1, int64_t(call.counts.size()));  // each an all-reduce of its own
  const int64_t least = aside_bytes(team_.nranks);
  return least > 0 && bytes >= least && bytes / tensors >= kLeastSliceBytes / 2;
}

Arrival CarriedEngine::add_by_carrier(const Call& call) {
  std::vector<Transfer> ranges;
  for (size_t i = 0; i < call.counts.size(); ++i)
    for (int64_t at = 0, bytes = call.counts[i] * element_bytes(call.dtype); at < bytes; at += kPieceBytes)
      ranges.push_back({-1, call.addresses[i] + at, std::min(kPieceBytes, bytes - at)});
  Arrival end = carrier_->wait(carrier_->add(ranges, call.dtype), timeout_s_);
  if (end.kind != Arrival::Kind::here || call.op == Op::sum) return end;
  const DefaultFloatEnvironment environment;
  for (size_t i = 0; i < call.counts.size(); ++i) {
    if (call.dtype == Dtype::float32) divide<float>(call.addresses[i], call.counts[i], team_.nranks);
    if (call.dtype == Dtype::float64) divide<double>(call.addresses[i], call.counts[i], team_.nranks);
  }
  return end;
}

// A carrier's own words are the last resort: mostly it fails because of something that the control plane knows.
void CarriedEngine::fail_arrival(const Call& call, const Arrival& arrival) {
  const uint32_t sequence = uint32_t(sequence_.load());
  if (arrival.kind == Arrival::Kind::late) {
    const uint64_t others = ((uint64_t{1} << (team_.nranks - 1) << 1) - 1) & ~(uint64_t{1} << team_.rank);
    const uint64_t late = arrival.peer >= 0 ? uint64_t{1} << arrival.peer : others;
    plane_->propose({Cause::timeout, uint8_t(team_.rank), 0, Field::none, sequence}, late);
  } else if (!plane_->wait_failed(kCauseWaitS)) {
    plane_->propose({Cause::aborted, uint8_t(team_.rank), 0, Field::none, sequence}, 0,
                    engine_name_ + ": " + arrival.text);
  }
  fail(call);
}

// Returns memory to the caller first: nothing touches it from here on.
void CarriedEngine::fail(const Call& call) {
  carrier_->abort();
  // As long as it takes to ask all ranks in vain, before this one decides.
  plane_->wait_failed(kCauseWaitS + 2 * ControlPlane::kDecideS * team_.nranks);
  throw cause_error(&call, true);
}

// A rank that calls after a time-out did not wait; whether it was late says nothing. Ranks wait in chains: one that
// others waited for may have been waiting itself.
Error CarriedEngine::cause_error(const Call* call, bool in_call) {
  const Failure failure = unpack(plane_->failure());  // acquires the fields beside it
  return failure_text().met(failure, call, !told_.exchange(true), in_call);
}

FailureText CarriedEngine::failure_text() const {
  FailureText text{};
  text.rank = team_.rank;
  text.nranks = team_.nranks;
  text.name = name_;
  text.timeout_s = timeout_s_;
  text.control = &plane_->page();
  for (const CarriedPeer& p : peers_) text.pids.push_back(p.pid), text.hosts.push_back(p.host);
  text.sequence = sequence_;
  text.uncounted = uncounted_;
  text.header = [this](int rank, uint32_t sequence, Header* header) { return plane_->header(rank, sequence, header); };
  text.last_sequence = [this](int rank) { return plane_->last_sequence(rank); };
  return text;
}

void CarriedEngine::abort(const std::string& reason) {
  if (in_forked_child() || closed_) return;
  plane_->propose({Cause::aborted, uint8_t(team_.rank), 0, Field::none, uint32_t(sequence_.load())}, 0, reason);
}

void CarriedEngine::check() {
  origin_.refuse_fork();
  const uint64_t word = plane_->failure();
  if (word != 0) throw failure_text().explain(unpack(word), nullptr, true);
}

void CarriedEngine::close() {
  if (in_forked_child() || closed_.exchange(true)) return;
  known_.reset();
  plane_->close(sequence_);
  carrier_->close();
}

Stats CarriedEngine::stats(bool reset) {
  origin_.refuse_fork();
  const std::lock_guard lock(stats_mutex_);
  const Stats now = stats_;
  if (reset) stats_ = {};
  return now;
}

Description CarriedEngine::describe() {
  origin_.refuse_fork();
  Description d;
  d.engine = engine_name_;
  d.name = name_;
  d.simd = isa_.name;
  d.store = "plain";
  d.arena_bytes = used_bytes_ + (two_level_ ? two_level_->bytes() : 0);
  d.slot_bytes = team_.slot_bytes;
  d.slots = team_.slots;
  d.aside_bytes = carrier_->adds(Dtype::float32) && !two_level_ ? aside_bytes(team_.nranks) : 0;
  if (two_level_) d.hosts = two_level_->partition().hosts(), d.intra_codec = name_of(two_level_->codec_inside());
  d.sequence = sequence_ - uncounted_;
  for (const CarriedPeer& p : peers_) d.pids.push_back(p.pid);
  return d;
}

void CarriedEngine::check_pattern() {
  PatternCall pattern(team_.rank);
  allreduce(pattern.call);
  if (const int64_t at = pattern.first_wrong(team_.nranks); at >= 0)
    throw Error(Code::internal, failure_text().prefix(Code::internal, &pattern.call) + engine_name_ +
                                    " does not deliver what was sent, at element " + std::to_string(at) +
                                    ". Please report this with the output of `python -m dpcomm info`.");
}

}  // namespace dpcomm
