#include "device_team.h"

#include <algorithm>
#include <chrono>

#include "../core/protocol.h"
#include "../host/call_facts.h"
#include "../host/failure_text.h"
#include "p2p_kernels.h"

namespace dpcomm {

using Clock = std::chrono::steady_clock;

namespace {

constexpr int kFirstEvents = 32;

Clock::time_point after(double seconds) {
  return Clock::now() +
         std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(std::min(seconds, 1e8)));
}

uint64_t to_ns(double seconds) { return uint64_t(std::min(seconds * 1e9, 9e18)); }

std::vector<Mailbox*> boxes(const DeviceTeam::Setup& s) {
  std::vector<Mailbox*> box;
  for (int k = 0; k < s.geometry.channels; ++k)
    for (char* arena : s.arenas) box.push_back(reinterpret_cast<Mailbox*>(arena + k * s.geometry.channel_bytes));
  return box;
}

std::vector<P2pRank> players(const DeviceTeam::Setup& s, Mailbox* const* box, RankState* states) {
  std::vector<P2pRank> all;
  for (const int rank : s.ranks) all.push_back({rank, box, states + all.size(), s.status + rank});
  return all;
}

}  // namespace

DeviceTeam::DeviceTeam(const Setup& s)
    : device_(s.device),
      ranks_(s.ranks),
      geometry_(s.geometry),
      lease_(s.device, int(s.ranks.size()) * s.geometry.channels),
      far_domain_(attribute(cudaDevAttrComputeCapabilityMajor, s.device) >= 9),
      control_(s.control),
      stream_(s.device),
      events_(kFirstEvents),
      box_(boxes(s)),
      states_(s.ranks.size()),
      players_(players(s, box_.data(), states_.data())),
      team_(1),
      entered_(s.ranks.size()) {
  const P2pGeometry& g = geometry_;
  team_as_written_ = {g.nranks, g.slots, g.slot_bytes, g.pinned, to_ns(s.timeout_s), s.first_cause, players_.data()};
  DeviceArray<P2pTeam>::write(team_.data(), std::vector<P2pTeam>{team_as_written_});
  // Not the device: a rank that is another thread may already wait there for this one.
  check_cuda(cudaStreamSynchronize(nullptr), "cudaStreamSynchronize");
}

DeviceTeam::~DeviceTeam() { idle_within(1); }

void DeviceTeam::set_timeout(double timeout_s) {
  const CurrentDevice current(device_);
  team_as_written_.timeout_ns = to_ns(timeout_s);
  DeviceArray<P2pTeam>::write(team_.data(), std::vector<P2pTeam>{team_as_written_});
}

std::shared_ptr<DeviceTeam::Launch> DeviceTeam::next_of(int here) {
  const uint64_t number = entered_[size_t(here)]++;
  while (issued_ + open_.size() <= number) {
    auto launch = std::make_shared<Launch>();
    launch->segments.resize(ranks_.size());
    launch->headers.resize(ranks_.size());
    launch->ready.resize(ranks_.size());
    open_.push_back(std::move(launch));
  }
  return open_[size_t(number - issued_)];
}

std::shared_ptr<DeviceTeam::Launch> DeviceTeam::enter(int here, const Call& call, cudaStream_t stream) {
  const CurrentDevice current(device_);
  const std::lock_guard lock(mutex_);
  const bool capturing = is_capturing(stream);
  const EventPool::Lent ready = events_.take();
  check_cuda(cudaEventRecord(ready.get(), stream), "cudaEventRecord");
  const size_t at = size_t(here);
  const auto launch = next_of(here);
  const int64_t groups = fill_segments(call, launch->segments[at]);
  launch->headers[at] = header_of(call, groups, geometry_.nranks, Reach::memory);
  launch->ready[at] = ready;
  launch->capturing = launch->capturing || capturing;
  if (++launch->entered < int(ranks_.size())) return launch;
  open_.pop_front();  // whoever enters last has entered all calls before
  ++issued_;
  struct Over {  // however it ends
    DeviceTeam& team;
    Launch& launch;
    ~Over() {
      launch.over = true;
      team.changed_.notify_all();
    }
  } over{*this, *launch};
  try {
    if (agreed(*launch))
      issue(*launch);
    else
      disagreed_ = launch;
  } catch (const Error& error) {
    give_up_for(*control_, ranks_[at], issued_, error.what());
    throw;
  }
  return launch;
}

// One launch plays one header. (Ranks elsewhere are compared with on the device.)
bool DeviceTeam::agreed(const Launch& launch) const {
  for (size_t i = 1; i < ranks_.size(); ++i) {
    const Field field = difference(launch.headers[0], launch.headers[i]);
    if (field == Field::none) continue;
    const Failure failure{Cause::mismatch, uint8_t(ranks_[0]), uint8_t(ranks_[i]), field, uint32_t(issued_)};
    set_once(&control_->failure, pack(failure));
    return false;
  }
  return true;
}

void DeviceTeam::issue(Launch& launch) {
  for (const auto& ready : launch.ready)
    check_cuda(cudaStreamWaitEvent(stream(), ready.get(), 0),
               "cudaStreamWaitEvent (an error of earlier work shows here)");
  const Header& header = launch.headers[0];
  const Segment& last = launch.segments[0].back();
  P2pCall call{};
  call.team = team_.data();
  call.header = header;
  call.groups = last.first_group + groups_of(last.elems);
  const P2pShare share = share_of(geometry_, header, call.groups);
  call.slice_bytes = share.slice_bytes;
  call.channels = share.channels;
  const bool in_table = place_segments(launch, call);
  start(p2p_kernel(Dtype(header.dtype), CodecKind(header.codec), Algorithm(header.algorithm)),
        int(ranks_.size()) * call.channels, call);
  launch.ended = events_.take();
  check_cuda(cudaEventRecord(launch.ended.get(), stream()), "cudaEventRecord");
  if (in_table && !launch.capturing) tables_.used(launch.ended);
}

// True where they lie in a table in device memory.
bool DeviceTeam::place_segments(const Launch& launch, P2pCall& call) {
  call.count = int64_t(launch.segments[0].size());
  if (call.count * int64_t(ranks_.size()) <= kInlineSegments) {
    Segment* to = call.few;
    for (const auto& segments : launch.segments) to = std::copy(segments.begin(), segments.end(), to);
    return false;
  }
  std::vector<Segment> all;
  for (const auto& segments : launch.segments) all.insert(all.end(), segments.begin(), segments.end());
  call.segments = tables_.put(all, stream(), launch.capturing, double(team_as_written_.timeout_ns) * 1e-9);
  return true;
}

// Cooperative: all CTAs run at once, or none. On sm_90 and later a release at system scope waits for all stores of its
// domain; in the remote one those of the application's kernels are not among them.
void DeviceTeam::start(const void* kernel, int ctas, P2pCall& call) {
  int& threads = threads_[kernel];
  if (threads == 0) threads = threads_of(kernel, device_);
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeCooperative;
  attributes[0].val.cooperative = 1;
  attributes[1].id = cudaLaunchAttributeMemSyncDomain;
  attributes[1].val.memSyncDomain = cudaLaunchMemSyncDomainRemote;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(ctas));
  config.blockDim = dim3(unsigned(threads));
  config.stream = stream();
  config.attrs = attributes;
  config.numAttrs = far_domain_ ? 2 : 1;
  void* parameters[] = {&call};
  check_cuda(cudaLaunchKernelExC(&config, kernel, parameters), "cudaLaunchKernelExC");
}

bool DeviceTeam::await_launch(const Launch& launch, double timeout_s, const std::function<bool()>& interrupted) {
  const auto deadline = after(timeout_s);
  std::unique_lock lock(mutex_);
  while (!launch.over) {
    const auto nap = std::min<Clock::time_point>(deadline, Clock::now() + std::chrono::milliseconds(100));
    if (changed_.wait_until(lock, nap, [&] { return launch.over; })) break;
    if (Clock::now() >= deadline) return false;
    lock.unlock();  // the question takes Python's lock, whose holder may be waiting for ours
    const bool stop = interrupted && interrupted();
    lock.lock();
    if (stop) return false;
  }
  return true;
}

void DeviceTeam::join(const Launch& launch, cudaStream_t stream) {
  const CurrentDevice current(device_);
  check_cuda(cudaStreamWaitEvent(stream, launch.ended.get(), 0), "cudaStreamWaitEvent");
}

std::vector<int> DeviceTeam::absent(const Launch& launch) {
  const std::lock_guard lock(mutex_);
  std::vector<int> ranks;
  for (size_t i = 0; i < ranks_.size(); ++i)
    if (!launch.ready[i]) ranks.push_back(ranks_[i]);
  return ranks;
}

bool DeviceTeam::settled_within(int here, double timeout_s) {
  std::unique_lock lock(mutex_);
  return changed_.wait_until(lock, after(timeout_s), [&] { return issued_ >= entered_[size_t(here)]; });
}

void DeviceTeam::give_up() {
  const std::lock_guard lock(mutex_);
  if (open_.empty()) return;
  issued_ += open_.size();
  for (const auto& launch : open_) launch->over = true;
  open_.clear();
  for (uint64_t& entered : entered_) entered = issued_;  // nobody enters any more: the communicator is poisoned
  changed_.notify_all();
}

bool DeviceTeam::idle_within(double timeout_s) {
  try {
    const CurrentDevice current(device_);
    const EventPool::Lent now = events_.take();
    check_cuda(cudaEventRecord(now.get(), stream()), "cudaEventRecord");
    return ended_within(now.get(), timeout_s);
  } catch (const Error&) {
    return true;  // the context is lost, or the process ends: nothing runs any more
  }
}

void DeviceTeam::left() {
  const std::lock_guard lock(mutex_);
  if (++closed_ == ranks_.size()) lease_ = CtaLease();
}

bool DeviceTeam::header(int rank, uint32_t sequence, Header* header) {
  {
    const std::lock_guard lock(mutex_);
    for (size_t i = 0; disagreed_ && i < ranks_.size(); ++i)
      if (ranks_[i] == rank) return *header = disagreed_->headers[i], true;
  }
  if (!idle_within(1)) return false;
  // Where all see one memory it lies with its writer, else with every reader, himself included. The first call had page
  // 0.
  try {
    const CurrentDevice current(device_);
    const Mailbox* const box = box_.read()[size_t(geometry_.pinned ? rank : ranks_[0])];
    const Header* const from = &box->header[(sequence + 1) % 2][rank];
    check_cuda(cudaMemcpy(header, from, sizeof *header, cudaMemcpyDefault), "cudaMemcpy");
    return uint32_t(header->sequence) == sequence;
  } catch (const Error&) {  // the context is lost: the message does without
    return false;
  }
}

}  // namespace dpcomm
