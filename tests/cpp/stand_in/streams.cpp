// Streams: each has a thread that does its operations in order. The thread starts with the first one.
#include <algorithm>

#include "state.h"

namespace stand_in {
namespace {

void work(Stream* stream) {
  State& s = state();
  current_device() = stream->device;
  std::unique_lock lock(s.mutex);
  for (;;) {
    stream->wake.wait(lock, [&] { return s.stopping || stream->closing || !stream->queue.empty(); });
    if (s.stopping || stream->queue.empty()) break;
    Operation& first = stream->queue.front();
    s.changed.wait(lock, [&] { return s.stopping || !first.ready || first.ready(); });
    if (s.stopping) break;
    const auto named = s.running.insert(first.what);
    lock.unlock();
    if (first.run) first.run();
    lock.lock();
    s.running.erase(named);
    stream->queue.pop_front();
    ++stream->completed;
    s.changed.notify_all();
  }
  stream->exited = true;
  s.changed.notify_all();
}

// Threads of destroyed streams that have ended. A worker says so as its last act under the mutex.
void join_ended() {
  for (auto& stream : state().destroyed)
    if (stream->exited && stream->worker.joinable()) stream->worker.join();
}

Stream& new_stream(int device, bool blocking, int priority) {
  State& s = state();
  join_ended();
  auto stream = std::make_unique<Stream>();
  const uint64_t number = new_handle();
  stream->handle = make_handle<cudaStream_t>(number);
  stream->device = device;
  stream->blocking = blocking;
  stream->priority = priority;
  return *(s.streams[number] = std::move(stream));
}

void push(Stream& stream, Operation operation) {
  stream.queue.push_back(std::move(operation));
  ++stream.enqueued;
  if (!stream.worker.joinable()) stream.worker = start_thread([&stream] { work(&stream); });
  stream.wake.notify_one();
}

// Behind what `other` has now.
void push_wait(Stream& stream, Stream& other) {
  if (other.completed == other.enqueued) return;
  push(stream,
       {"wait for another stream", {}, [&other, ticket = other.enqueued] { return other.completed >= ticket; }});
}

cudaError_t wait_until(std::unique_lock<std::mutex>& lock, const std::function<bool()>& holds) {
  State& s = state();
  s.changed.wait(lock, [&] { return s.stopping || holds(); });
  return holds() ? cudaSuccess : cudaErrorCudartUnloading;
}

cudaError_t wait_for(std::unique_lock<std::mutex>& lock, Stream& stream) {
  // Destroyed streams stay where they are until their worker has ended, which they wait for.
  return wait_until(lock, [&stream, ticket = stream.enqueued] { return stream.completed >= ticket; });
}

}  // namespace

Stream* find_stream(cudaStream_t handle) {
  State& s = state();
  const uint64_t number = number_of(handle);
  if (number == 0 || handle == cudaStreamLegacy) {
    Stream*& legacy = s.legacy[static_cast<size_t>(current_device())];
    if (!legacy) legacy = &new_stream(current_device(), true, 0);
    return legacy;
  }
  const auto found = s.streams.find(number);
  if (found != s.streams.end()) return found->second.get();
  if (number % 16 == 0 && number <= s.next_handle) die("a stream is used after cudaStreamDestroy");
  return nullptr;
}

void enqueue(Stream& stream, Operation operation) {
  State& s = state();
  Stream* legacy = s.legacy[static_cast<size_t>(stream.device)];
  if (&stream == legacy) {
    for (auto& [number, other] : s.streams)
      if (other->blocking && other->device == stream.device && other.get() != legacy) push_wait(stream, *other);
  } else if (stream.blocking && legacy) {
    push_wait(stream, *legacy);
  }
  push(stream, std::move(operation));
}

cudaError_t submit(cudaStream_t handle, Operation operation) {
  std::unique_lock lock(state().mutex);
  Stream* stream = find_stream(handle);
  if (!stream) return cudaErrorInvalidResourceHandle;
  return capture_operation(*stream, std::move(operation));
}

cudaError_t submit_and_wait(cudaStream_t handle, Operation operation) {
  std::unique_lock lock(state().mutex);
  Stream* stream = find_stream(handle);
  if (!stream) return cudaErrorInvalidResourceHandle;
  const cudaError_t error = capture_operation(*stream, std::move(operation));
  return error == cudaSuccess && !stream->capture ? wait_for(lock, *stream) : error;
}

cudaError_t drain(int device) {
  State& s = state();
  std::unique_lock lock(s.mutex);
  std::vector<std::pair<Stream*, uint64_t>> tickets;
  const auto note = [&](const std::unique_ptr<Stream>& stream) {
    if (device < 0 || stream->device == device) tickets.emplace_back(stream.get(), stream->enqueued);
  };
  for (auto& [number, stream] : s.streams) note(stream);
  for (auto& stream : s.destroyed) note(stream);
  return wait_until(lock, [&] {
    return std::all_of(tickets.begin(), tickets.end(), [](auto& t) { return t.first->completed >= t.second; });
  });
}

}  // namespace stand_in

using namespace stand_in;

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int priority) {
  return call("cudaStreamCreateWithPriority", Rule::plain, [&] {
    if (!stream || (flags != cudaStreamDefault && flags != cudaStreamNonBlocking)) return cudaErrorInvalidValue;
    std::unique_lock lock(state().mutex);
    *stream = new_stream(current_device(), flags != cudaStreamNonBlocking, priority).handle;
    ++counters().streams;
    return cudaSuccess;
  });
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  return cudaStreamCreateWithPriority(stream, flags, 0);
}

cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithFlags(stream, cudaStreamDefault); }

// What it has still to do is done.
cudaError_t cudaStreamDestroy(cudaStream_t handle) {
  return call("cudaStreamDestroy", Rule::plain, [&] {
    State& s = state();
    std::unique_lock lock(s.mutex);
    Stream* stream = find_stream(handle);
    if (!stream || number_of(handle) < 16) return cudaErrorInvalidResourceHandle;
    leave_capture(*stream);
    const auto found = s.streams.find(number_of(handle));
    stream->closing = true;
    stream->wake.notify_one();
    s.destroyed.push_back(std::move(found->second));
    s.streams.erase(found);
    --counters().streams;
    return cudaSuccess;
  });
}

cudaError_t cudaStreamQuery(cudaStream_t handle) {
  return call("cudaStreamQuery", Rule::unsafe, [&] {
    std::unique_lock lock(state().mutex);
    Stream* stream = find_stream(handle);
    if (!stream) return cudaErrorInvalidResourceHandle;
    if (stream->capture) return stream->capture->valid = false, cudaErrorStreamCaptureUnsupported;
    return stream->completed == stream->enqueued ? cudaSuccess : cudaErrorNotReady;
  });
}

cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  return call("cudaStreamSynchronize", Rule::unsafe, [&] {
    std::unique_lock lock(state().mutex);
    Stream* stream = find_stream(handle);
    if (!stream) return cudaErrorInvalidResourceHandle;
    if (stream->capture) return stream->capture->valid = false, cudaErrorStreamCaptureUnsupported;
    return wait_for(lock, *stream);
  });
}

cudaError_t cudaDeviceSynchronize() {
  return call("cudaDeviceSynchronize", Rule::unsafe, [] { return drain(current_device()); });
}

cudaError_t cudaStreamGetDevice(cudaStream_t handle, int* device) {
  return call("cudaStreamGetDevice", Rule::asks, [&] {
    std::unique_lock lock(state().mutex);
    Stream* stream = find_stream(handle);
    if (!stream) return cudaErrorInvalidResourceHandle;
    *device = stream->device;
    return cudaSuccess;
  });
}

cudaError_t cudaStreamGetPriority(cudaStream_t handle, int* priority) {
  return call("cudaStreamGetPriority", Rule::asks, [&] {
    std::unique_lock lock(state().mutex);
    Stream* stream = find_stream(handle);
    if (!stream) return cudaErrorInvalidResourceHandle;
    *priority = stream->priority;
    return cudaSuccess;
  });
}

cudaError_t cudaStreamGetId(cudaStream_t handle, unsigned long long* id) {
  return call("cudaStreamGetId", Rule::asks, [&] {
    std::unique_lock lock(state().mutex);
    Stream* stream = find_stream(handle);
    if (!stream) return cudaErrorInvalidResourceHandle;
    *id = number_of(stream->handle);
    return cudaSuccess;
  });
}

cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
  return call("cudaLaunchHostFunc", Rule::plain, [&] {
    if (!function) return cudaErrorInvalidValue;
    return submit(stream, {"host function",
                           [=] {
                             in_device_code() = true;
                             function(data);
                             in_device_code() = false;
                           },
                           {}});
  });
}
