// Groups: what a thread calls between GroupStart and GroupEnd, connections, and the way into the stream.
#include <utility>

#include "state.h"

namespace stand_in_nccl {
namespace {

// Of the calling thread.
struct Group {
  int depth = 0;
  Result error = Result::success;  // of a call in it
  std::vector<Call> calls;
};
// No thread_local: ThreadSanitizer of GCC 12 does not bear that of a library which is loaded while threads start.
Group& group() {
  static auto* const mutex = new std::mutex;
  static auto* const groups = new std::map<std::thread::id, Group>;
  const Lock lock(*mutex);
  return (*groups)[std::this_thread::get_id()];
}

constexpr std::pair<int, int> kAll{-1, -1};

// NCCL works on the device of the communicator, whichever is current; the default stream is that of the device.
class OnDevice {
 public:
  explicit OnDevice(int device) : before_(std::exchange(runtime().current_device(), device)) {}
  ~OnDevice() { runtime().current_device() = before_; }

 private:
  const int before_;
};

// From and to which rank; a rank needs no connection to itself.
std::set<std::pair<int, int>> connections(const Work& work) {
  std::set<std::pair<int, int>> needed;
  const int rank = work.comm->rank;
  for (const Call& call : work.calls) {
    if (call.kind == Kind::all_reduce && work.comm->ranks > 1) needed.insert(kAll);
    if (call.kind == Kind::all_reduce || call.peer == rank) continue;
    needed.insert(call.kind == Kind::send ? std::pair{rank, call.peer} : std::pair{call.peer, rank});
  }
  for (const auto& has : work.comm->connected) needed.erase(has);
  return needed;
}

// All that the connection joins have asked for it.
bool is_made(const Communicator& comm, std::pair<int, int> connection) {
  const auto asked = [&](int rank) { return comm.clique->asked.count({connection, rank}) > 0; };
  if (connection != kAll) return asked(connection.first) && asked(connection.second);
  for (int rank = 0; rank < comm.ranks; ++rank)
    if (!asked(rank)) return false;
  return true;
}

Result enqueue(const std::shared_ptr<Work>& work) {
  Communicator& comm = *work->comm;
  const Stream stream = work->calls.front().stream;
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  if (runtime().is_capturing(stream, &status) != cudaSuccess) return Result::unhandled_cuda_error;
  work->captured = status != cudaStreamCaptureStatusNone;
  if (work->captured)
    ++comm.captured;
  else
    work->ticket = ++comm.enqueued;
  const std::string what = "NCCL group of rank " + std::to_string(comm.rank);
  if (runtime().submit(stream, {what, [work] { run(*work); }, {}}) == cudaSuccess) return Result::success;
  if (!work->captured) --comm.enqueued;
  return Result::unhandled_cuda_error;
}

// Waits for the peers and enqueues.
Result complete(Lock& lock, const std::shared_ptr<Work>& work, const std::set<std::pair<int, int>>& needed) {
  Communicator& comm = *work->comm;
  for (const auto& connection : needed) comm.clique->asked.insert({connection, comm.rank});
  state().changed.notify_all();
  const auto is_over = [&] { return comm.aborted || comm.error != Result::success; };
  wait(lock, "rank " + std::to_string(comm.rank) + " connects to its peers", [&] {
    if (is_over()) return true;
    for (const auto& connection : needed)
      if (!is_made(comm, connection)) return false;
    return true;
  });
  if (is_over() || state().stopping) return comm.aborted ? Result::internal_error : comm.error;
  comm.connected.insert(needed.begin(), needed.end());
  return enqueue(work);
}

void complete_later(const std::shared_ptr<Work>& work, const std::set<std::pair<int, int>>& needed) {
  work->comm->pending = true;
  count("background_groups", work->comm->rank);
  in_background(work->comm->device, [work, needed] {
    Lock lock(state().mutex);
    const Result result = complete(lock, work, needed);
    if (result != Result::success && work->comm->error == Result::success)
      set_error(*work->comm, result, "a group could not be enqueued");
    work->comm->pending = false;
    state().changed.notify_all();
  });
}

// A rank that sends to itself receives in the same group.
void check_self(const Work& work) {
  int balance = 0;
  for (const Call& call : work.calls)
    if (call.kind != Kind::all_reduce && call.peer == work.comm->rank) balance += call.kind == Kind::send ? 1 : -1;
  if (balance != 0) die("ncclGroupEnd: rank %d sends to itself without a receive, or receives", work.comm->rank);
}

Result end_group() {
  Group& own = group();
  auto work = std::make_shared<Work>();
  work->calls = std::exchange(own.calls, {});
  const Result refused = std::exchange(own.error, Result::success);
  if (refused != Result::success) return refused;
  if (work->calls.empty()) return Result::success;
  const Call& first = work->calls.front();
  work->comm = first.comm;
  for (const Call& call : work->calls) {
    if (call.comm != first.comm) die("ncclGroupEnd: a group of two communicators");
    if (call.stream != first.stream) die("ncclGroupEnd: a group of two streams");
  }
  check_self(*work);
  Lock lock(state().mutex);
  find("ncclGroupEnd", work->comm->handle);
  const auto needed = connections(*work);
  const OnDevice on_device(work->comm->device);
  if (work->comm->blocking || (needed.empty() && !knob("every_group_in_background")))
    return complete(lock, work, needed);
  complete_later(work, needed);
  return Result::in_progress;
}

void check_memory(const char* name, const void* address, size_t bytes) {
  if (bytes > 0) runtime().check_range(name, address, bytes, false, nullptr);
}

// Ends the process where the call makes no sense.
void check(const char* name, const Call& call) {
  const Communicator& comm = *call.comm;
  const size_t size = size_of(call.type);
  if (call.count > SIZE_MAX / 2 / size) die("%s: %lld elements", name, static_cast<long long>(call.count));
  if (call.kind != Kind::all_reduce && (call.peer < 0 || call.peer >= comm.ranks))
    die("%s: peer %d of %d ranks", name, call.peer, comm.ranks);
  if (call.kind == Kind::all_reduce && (call.op < RedOp::sum || call.op > RedOp::avg))
    die("%s: operation %d", name, int(call.op));
  if (comm.finalized) die("%s: after ncclCommFinalize", name);
  const OnDevice on_device(comm.device);
  int device = -1;
  if (runtime().stream_device(call.stream, &device) != cudaSuccess || device != comm.device)
    die("%s: rank %d is on device %d, the stream on %d", name, comm.rank, comm.device, device);
  if (call.kind != Kind::receive) check_memory(name, call.from, call.count * size);
  if (call.kind != Kind::send) check_memory(name, call.to, call.count * size);
}

// Into the group of the thread. NCCL lets an all-reduce of nothing go.
Result add(const char* name, Call call, Handle handle) {
  if (begin(name) != cudaSuccess) return group().error = Result::unhandled_cuda_error;
  Lock lock(state().mutex);
  call.comm = find(name, handle);
  check(name, call);
  if (call.comm->error != Result::success) return group().error = call.comm->error;
  if (call.kind != Kind::all_reduce || call.count > 0) group().calls.push_back(std::move(call));
  return Result::success;
}

// Outside of a group: a group of one.
Result add_or_run(const char* name, Call call, Handle handle) {
  const Result result = add(name, std::move(call), handle);
  return group().depth > 0 ? result : end_group();
}

}  // namespace

size_t size_of(DataType type) {
  switch (type) {
    case DataType::int8:
    case DataType::uint8:
      return 1;
    case DataType::float16:
    case DataType::bfloat16:
      return 2;
    case DataType::int32:
    case DataType::uint32:
    case DataType::float32:
      return 4;
    case DataType::int64:
    case DataType::uint64:
    case DataType::float64:
      return 8;
  }
  die("%d is no ncclDataType_t", int(type));
}

}  // namespace stand_in_nccl

using namespace stand_in_nccl;

STAND_IN_EXPORT Result ncclGroupStart() {
  ++group().depth;
  return Result::success;
}

STAND_IN_EXPORT Result ncclGroupEnd() {
  if (group().depth == 0) die("ncclGroupEnd without ncclGroupStart");
  return --group().depth > 0 ? Result::success : end_group();
}

STAND_IN_EXPORT Result ncclSend(const void* from, size_t count, DataType type, int peer, Handle comm, Stream stream) {
  return add_or_run("ncclSend", {Kind::send, {}, from, nullptr, count, type, peer, {}, stream}, comm);
}

STAND_IN_EXPORT Result ncclRecv(void* to, size_t count, DataType type, int peer, Handle comm, Stream stream) {
  return add_or_run("ncclRecv", {Kind::receive, {}, nullptr, to, count, type, peer, {}, stream}, comm);
}

STAND_IN_EXPORT Result ncclAllReduce(const void* from, void* to, size_t count, DataType type, RedOp op, Handle comm,
                                     Stream stream) {
  return add_or_run("ncclAllReduce", {Kind::all_reduce, {}, from, to, count, type, -1, op, stream}, comm);
}

AS_DECLARED(GroupStart);
AS_DECLARED(GroupEnd);
AS_DECLARED(Send);
AS_DECLARED(Recv);
AS_DECLARED(AllReduce);
