#include "engine.h"

#include <algorithm>

#include "../core/protocol.h"
#include "../gpu/device.h"
#include "../gpu/native_kernels.h"
#include "../host/call_facts.h"
#include "../host/pattern.h"
#include "../host/watchdog.h"
#include "launcher.h"
#include "on_stream.h"

namespace dpcomm {

namespace {

constexpr int kFirstEvents = 32;
constexpr double kDrainS = 5;  // a call in flight at close
constexpr double kCloseS = 2;  // NCCL's own farewell

// Two levels take three quarters of the memory: calls of theirs are large, flat ones beside them rare.
int64_t flat_bytes(const NcclWish& wish, const NcclHosts& hosts) {
  return hosts.hosts.empty() ? wish.scratch_bytes : wish.scratch_bytes / 4;
}

int64_t slot_bytes_for(int nranks, const NcclWish& wish, const NcclHosts& hosts) {
  const int64_t fits = Scratch::slot_bytes_for(nranks, kCarriedSlots, flat_bytes(wish, hosts));
  if (fits < Scratch::kLeastSlotBytes)
    throw Error(Code::argument, "an arena of " + std::to_string(wish.scratch_bytes) + " bytes is too small for " +
                                    std::to_string(nranks) + " ranks. Raise DPCOMM_ARENA_MB.");
  return Scratch::slot_bytes_within(fits, wish.slice_bytes);
}

void require_usable(int device) {
  if (const std::string reason = cuda_unusable_reason(); !reason.empty())
    throw Error(Code::argument, "CUDA not available: " + reason + ".");
  // All kernels are loaded now: loading one may wait for the device, where a call may already wait for a peer.
  // Error(version) where they were built for other GPUs.
  for (const void* kernel : {begin_kernel(), end_kernel()}) threads_of(kernel, device);
  for (const void* kernel : kernels_of(step_kernel)) threads_of(kernel, device);
  for (const void* kernel : native_kernels()) threads_of(kernel, device);
  for (const void* kernel : kernels_of([](Dtype d, CodecKind c, Algorithm) { return inside_kernel(d, c); }))
    threads_of(kernel, device);
}

void nap() { std::this_thread::sleep_for(std::chrono::milliseconds(1)); }

// A kernel is still to come, or NCCL's, behind other work of the device: it will find its memory.
void park(const std::shared_ptr<NcclMemory>& memory) {
  static auto* const parked = new std::vector<std::shared_ptr<NcclMemory>>;
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  parked->push_back(memory);
}

}  // namespace

NcclMemory::NcclMemory(int rank, int nranks, const NcclWish& wish, const NcclHosts& hosts)
    : slot_bytes(slot_bytes_for(nranks, wish, hosts)),
      native_bytes(Scratch::common_bytes(nranks, kCarriedSlots, slot_bytes)),
      scratch(rank, nranks, kCarriedSlots, slot_bytes),
      two_level(hosts.hosts.empty()
                    ? nullptr
                    : std::make_unique<TwoLevelMemory>(rank, nranks, hosts,
                                                       wish.scratch_bytes - flat_bytes(wish, hosts), wish.slice_bytes)),
      nonfinite_groups(1) {
  void* p = nullptr;
  check_cuda(cudaHostAlloc(&p, sizeof(CallState), cudaHostAllocPortable), "cudaHostAlloc");
  state = new (p) CallState{};
}

NcclMemory::~NcclMemory() { cudaFreeHost(state); }

std::unique_ptr<NcclEngine> NcclEngine::make(Place place) {
  require_usable(place.device);
  const CurrentDevice current(place.device);
  return std::unique_ptr<NcclEngine>(new NcclEngine(std::move(place)));
}

NcclEngine::NcclEngine(Place p)
    : device_(p.device),
      peers_(std::move(p.peers)),
      stream_(p.device),
      events_(kFirstEvents),
      memory_(std::make_shared<NcclMemory>(p.rank, int(peers_.size()), p.wish, p.hosts)),
      asked_ctas_(p.wish.max_ctas),
      most_ctas_(p.wish.max_ctas > 0 ? p.wish.max_ctas : attribute(cudaDevAttrMultiProcessorCount, p.device)),
      comm_(NcclCommunicator::make(p.library)) {
  const int64_t slot_bytes = memory_->slot_bytes;
  team_ = {p.rank, int(peers_.size()), memory_->scratch.box(), nullptr, kCarriedSlots, slot_bytes, slot_bytes, true};
  std::vector<UniqueFd> headers;
  for (PeerSockets& s : p.sockets) headers.push_back(std::move(s.headers));
  plane_ = std::make_unique<ControlPlane>(p.rank, std::move(p.sockets));
  ledger_ = std::make_unique<CallLedger>(
      p.rank, std::move(headers),
      CallLedger::Listener{
          [state = memory_->state](uint64_t call) { store_release(&state->agreed, call); },  // pairs with end_call()
          [this](const Failure& failure, uint64_t blamed) { plane_->propose(failure, blamed); }});
  carrier_ = std::make_unique<NcclCarrier>(*comm_, device_, stream_.get(), events_, [this] { return given_up(); });
  tick_ = Watchdog::instance().tick([this] { tick(); });
}

NcclEngine::~NcclEngine() { close(); }

void NcclEngine::connect(const nccl::UniqueId& id, double timeout_s, const std::function<bool()>& interrupted) {
  timeout_s_ = timeout_s;
  const CurrentDevice current(device_);
  patience_until_ = after(timeout_s);
  try {
    comm_->connect(id, rank(), nranks(), [&] { return given_up() || (interrupted && interrupted()); });
  } catch (const NcclCommunicator::Broken& error) {
    note_broken(error.what());
    throw cause_error(nullptr);
  }
}

// Over every path: pairs of ranks, and NCCL's own all-reduce. NCCL connects at the first message.
void NcclEngine::verify(double timeout_s, const std::string& name, const std::function<bool()>& interrupted) {
  timeout_s_ = timeout_s;
  const CurrentDevice current(device_);
  for (const Algorithm algorithm : {Algorithm::direct, Algorithm::automatic}) {
    PatternCall pattern(rank());
    const DeviceArray<int32_t> data(pattern.data);
    pattern.call.addresses = {reinterpret_cast<char*>(data.data())};
    pattern.call.algorithm = algorithm;
    const auto pending = enqueue(pattern.call, stream());
    if (!pending->synchronize(2 * timeout_s, interrupted)) throw stuck_error();
    if (const std::exception_ptr error = pending->error()) std::rethrow_exception(error);
    pattern.data = data.read();
    if (const int64_t at = pattern.first_wrong(nranks()); at >= 0)
      throw Error(Code::internal, prefix(Code::internal, &pattern.call) + "NCCL does not deliver what was sent, at " +
                                      "element " + std::to_string(at) +
                                      ". Please report this with the output of `python -m dpcomm info`.");
  }
  uncounted_ = sequence_;
  stats(true);
  name_ = name;
  known_.emplace([this] { return failure_text(); });
}

void NcclEngine::allreduce(const Call&) {
  throw Error(Code::internal, "[dpcomm:INTERNAL] calls of engine nccl need a stream: use enqueue()");
}

std::shared_ptr<Pending> NcclEngine::enqueue(const Call& call, uintptr_t stream) {
  refuse_fork();
  if (!serves(call)) throw failure_text().unserved(call);
  if (int64_t(call.counts.size()) > most_tensors(call))
    throw Error(Code::unsupported, prefix(Code::unsupported, &call) + std::to_string(call.counts.size()) +
                                       " tensors in one call, and " + std::to_string(most_tensors(call)) +
                                       " are possible. Lower bucket_cap_mb, or pass fewer at a time.");
  if (failed()) throw cause_error(&call);
  try {
    return put(call, reinterpret_cast<cudaStream_t>(stream));
  } catch (const Error& error) {
    if (error.code != Code::cuda) throw;
    throw_cuda(error, call, stream);
  }
}

bool NcclEngine::serves(const Call& call) const {
  if (call.algorithm == Algorithm::native) return adds_up(call);
  return call.algorithm == Algorithm::two_level ? serves_two_levels(call) : served(call);
}

// Shards have tables of their own, which together are hardly longer than the bucket's.
int64_t NcclEngine::most_tensors(const Call& call) {
  return call.algorithm == Algorithm::two_level ? SegmentTables::kMost / 2 - kMaxRanks : SegmentTables::kMost;
}

// `end` is launched however the call goes: it fills the bucket with NaNs where it went wrong. If this throws, whatever
// the caller's stream does next comes behind that all the same.
std::shared_ptr<Pending> NcclEngine::put(const Call& call, cudaStream_t stream) {
  const CurrentDevice current(device_);
  const std::lock_guard lock(put_mutex_);
  const bool capturing = is_capturing(stream);
  const EventPool::Lent ready = events_.take(), ended = events_.take();
  check_cuda(cudaEventRecord(ready.get(), stream), "cudaEventRecord");
  check_cuda(cudaStreamWaitEvent(stream_.get(), ready.get(), 0),
             "cudaStreamWaitEvent (an error of earlier work shows here)");
  patience_until_ = after(timeout_s_);
  const Flight flight = prepare(call, capturing);
  const std::exception_ptr moving = attempt(call, [&] {
    BeginLaunch begin{memory_->state};
    launch(begin_kernel(), 1, &begin);
    return move(flight);
  });
  if (moving) {  // what NCCL's own threads had still to put on a stream comes before the end, too, or not at all
    for (const auto until = after(kCloseS); !comm_->abort_has_returned() && Clock::now() < until;) nap();
    carrier_->join_all();
  }
  const std::exception_ptr ending = attempt(call, [&] {
    EndLaunch end{memory_->state, flight.header.sequence, memory_->nonfinite_groups.data(), call.dtype, flight.table};
    launch(end_kernel(), 1, &end);
    return Arrival{};
  });
  check_cuda(cudaEventRecord(ended.get(), stream_.get()), "cudaEventRecord");
  if (flight.table.segments && !capturing) memory_->tables.used(ended);
  if (moving || ending) {
    check_cuda(cudaStreamWaitEvent(stream, ended.get(), 0), "cudaStreamWaitEvent");
    std::rethrow_exception(moving ? moving : ending);
  }
  const std::lock_guard stats_lock(stats_mutex_);
  count_call(stats_, flight.header, flight.wire_bytes);
  return std::make_shared<OnStream>(*this, ended);
}

// A part of a call. All ranks know what goes wrong in it before this returns, so that `end` fills the bucket.
std::exception_ptr NcclEngine::attempt(const Call& call, const std::function<Arrival()>& part) {
  try {
    const Arrival arrival = part();
    if (arrival.kind == Arrival::Kind::here) return nullptr;
    note_broken(arrival.text);
    throw cause_error(&call);
  } catch (const Error& error) {
    if (error.code == Code::cuda) abort(error.what()), wait_until_failed();
    return std::current_exception();
  }
}

NcclEngine::Flight NcclEngine::prepare(const Call& call, bool capturing) {
  Flight flight{call, {}, {}};
  BucketTable& table = flight.table;
  table.groups = fill_segments(call, segments_);
  table.count = int64_t(segments_.size());
  flight.header = header_of(call, table.groups, nranks(), Reach::network);
  if (steps_aside(call)) flight.header.algorithm = uint8_t(Algorithm::native);
  if (call.algorithm == Algorithm::two_level)
    cut_shards(flight, segments_);
  else
    flight.wire_bytes = wire_bytes(flight.header, table.groups, rank(), nranks(), Reach::network);
  if (table.count <= kInlineSegments)
    std::copy_n(segments_.begin(), table.count, table.few);
  else
    table.segments = memory_->tables.put(segments_, stream_.get(), capturing, timeout_s_);
  flight.header.sequence = ++sequence_;
  plane_->note_call(sequence_);
  ledger_->post(flight.header);
  return flight;
}

// A part is never longer than the bucket: where one lies on the device, the other does, too.
BucketTable NcclEngine::table_of(const Flight& flight, const Part& part) const {
  BucketTable table{part.count, part.groups, nullptr, {}};
  if (flight.table.segments)
    table.segments = flight.table.segments + part.first;
  else
    std::copy_n(segments_.begin() + part.first, part.count, table.few);
  return table;
}

Arrival NcclEngine::move(const Flight& flight) {
  const Algorithm algorithm = Algorithm(flight.header.algorithm);
  if (algorithm == Algorithm::native) return add_natively(flight);
  if (algorithm == Algorithm::two_level) return move_in_two_levels(flight);
  const Bucket bucket{segments_.data(), flight.table.count, flight.table.groups};
  const int64_t bytes = group_bytes(flight.call.dtype, flight.call.codec);
  const CarriedCall call{team_, bucket, flight.header, bytes, timeout_s_};
  const int parts = parts_of(flight.header, nranks());
  carrier_->begin((flight.table.groups + parts - 1) / parts > most_groups(team_.slot_bytes, team_.slice_bytes, bytes));
  Launcher launcher(*this, team_, flight.header, flight.table);
  return play(*carrier_, launcher, call);
}

int NcclEngine::ctas_for(const StepLaunch& launch) const {
  const Header& header = launch.header;
  const int parts = parts_of(header, launch.team.nranks);
  const int64_t chunk = (launch.bucket.groups + parts - 1) / parts;
  const int64_t slice = most_groups(launch.team.slot_bytes, launch.team.slice_bytes,
                                    group_bytes(Dtype(header.dtype), CodecKind(header.codec)));
  return ctas_of(std::min(chunk, slice), most_ctas_);
}

int NcclEngine::ctas_of(int64_t groups, int most) {
  return int(std::clamp<int64_t>((groups + kGroupsOfCta - 1) / kGroupsOfCta, 1, most));
}

void NcclEngine::launch(const void* kernel, int ctas, void* parameters) {
  void* arguments[] = {parameters};
  check_cuda(cudaLaunchKernel(kernel, dim3(unsigned(ctas)), dim3(kCtaThreads), arguments, 0, stream_.get()),
             "cudaLaunchKernel");
}

// Stop, drain, say goodbye, give the memory back.
void NcclEngine::close() {
  if (in_forked_child() || closed_) return;
  bool idle = idle_within(failed() ? 0 : kDrainS);
  if (!idle) abort("closed while operations were in flight");
  if (closed_.exchange(true)) return;
  known_.reset();
  // The goodbye promises that all of my calls have been announced.
  for (const auto until = after(kCloseS); !ledger_->all_sent() && Clock::now() < until;) ledger_->poll(), nap();
  plane_->close(sequence_);
  if (failed() || !idle) {
    fail_on_device();
    idle = idle_within(kDrainS);
  }
  Watchdog::instance().forget(tick_);
  ledger_->close();
  if (!comm_->close(kCloseS) || !idle) park(memory_);
}

bool NcclEngine::idle_within(double timeout_s) {
  try {
    const CurrentDevice current(device_);
    const EventPool::Lent now = events_.take();
    check_cuda(cudaEventRecord(now.get(), stream_.get()), "cudaEventRecord");
    return ended_within(now.get(), timeout_s);
  } catch (const Error&) {
    return true;  // the context is lost, or the process ends: nothing runs any more
  }
}

Stats NcclEngine::stats(bool reset) {
  refuse_fork();
  const std::lock_guard lock(stats_mutex_);
  const int64_t nonfinite = int64_t(load_acquire(&memory_->state->nonfinite_groups));
  Stats now = stats_;
  now.nonfinite_groups = nonfinite - nonfinite_before_;
  if (reset) stats_ = {}, nonfinite_before_ = nonfinite;
  return now;
}

Description NcclEngine::describe() {
  refuse_fork();
  Description d;
  d.engine = "nccl";
  d.name = name_;
  d.arena_bytes = memory_->scratch.bytes();
  if (const TwoLevelMemory* const two = memory_->two_level.get()) {
    d.arena_bytes += two->bytes();
    d.hosts = two->partition().hosts();
    d.intra_codec = name_of(two->codec_inside());
  }
  d.slot_bytes = team_.slot_bytes;
  d.slots = team_.slots;
  d.max_ctas = most_ctas_;
  d.aside_bytes = 1;
  d.sequence = sequence_ - uncounted_;
  d.device = device_;
  for (const DeviceInfo& info : cuda_devices())
    if (info.ordinal == device_) d.device_name = info.name;
  d.arena = "device";
  d.carrier = "NCCL " + nccl::version_text(comm_->library().version) + " (" + comm_->library().path + ")";
  for (const Peer& p : peers_) d.pids.push_back(p.pid);
  return d;
}

}  // namespace dpcomm
