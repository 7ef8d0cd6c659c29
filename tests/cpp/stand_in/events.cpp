// Events: a place in a stream's queue, or in a graph that is being captured.
#include "state.h"

namespace stand_in {
namespace {

// Null: no such event. Ends the process where it has been destroyed.
Event* find_event(cudaEvent_t handle) {
  State& s = state();
  const uint64_t number = number_of(handle);
  const auto found = s.events.find(number);
  if (found != s.events.end()) return found->second.get();
  if (number > 16 && number % 16 == 0 && number <= s.next_handle) die("an event is used after cudaEventDestroy");
  return nullptr;
}

bool passed(const Event& event) { return !event.fence || event.fence->done; }

cudaError_t record(Event& event, Stream& stream) {
  if (event.device != stream.device) return cudaErrorInvalidResourceHandle;
  if (stream.capture) {
    if (!stream.capture->valid) return cudaErrorStreamCaptureInvalidated;
    event.capture = stream.capture;
    event.nodes = stream.frontier;
    event.fence = nullptr;
    return cudaSuccess;
  }
  auto fence = std::make_shared<Fence>();
  const cudaError_t error = capture_operation(stream, {"event",
                                                       [fence] {
                                                         std::unique_lock lock(state().mutex);
                                                         fence->at = Clock::now();
                                                         fence->done = true;
                                                       },
                                                       {}});
  if (error != cudaSuccess) return error;
  event.capture = nullptr;
  event.nodes.clear();
  event.fence = fence;
  return cudaSuccess;
}

// The stream becomes part of the event's capture, or has been already.
cudaError_t join(Stream& stream, const Event& event) {
  Capture& capture = *event.capture;
  if (!state().captures.count(event.capture)) return cudaErrorCapturedEvent;  // it has ended
  if (!capture.valid) return cudaErrorStreamCaptureInvalidated;
  if (stream.capture && stream.capture != event.capture) {
    capture.valid = stream.capture->valid = false;
    return cudaErrorStreamCaptureMerge;
  }
  if (&stream == state().legacy[static_cast<size_t>(stream.device)]) {
    capture.valid = false;
    return cudaErrorStreamCaptureImplicit;
  }
  stream.capture = event.capture;
  capture.members.insert(&stream);
  stream.frontier.insert(event.nodes.begin(), event.nodes.end());
  return cudaSuccess;
}

cudaError_t wait(Stream& stream, const Event& event) {
  if (event.capture) return join(stream, event);
  if (stream.capture) {
    if (!stream.capture->valid) return cudaErrorStreamCaptureInvalidated;
    if (!event.fence) return cudaSuccess;
    stream.capture->valid = false;
    return cudaErrorStreamCaptureIsolation;
  }
  if (passed(event)) return cudaSuccess;
  enqueue(stream, {"wait for an event", {}, [fence = event.fence] { return fence->done; }});
  return cudaSuccess;
}

cudaError_t refuse_captured(Event& event) {
  if (!event.capture) return cudaSuccess;
  event.capture->valid = false;
  return cudaErrorCapturedEvent;
}

}  // namespace
}  // namespace stand_in

using namespace stand_in;

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
  return call("cudaEventCreateWithFlags", Rule::plain, [&] {
    if (!event || (flags & ~unsigned(cudaEventBlockingSync | cudaEventDisableTiming))) return cudaErrorInvalidValue;
    State& s = state();
    std::unique_lock lock(s.mutex);
    const uint64_t number = new_handle();
    auto made = std::make_unique<Event>();
    made->device = current_device();
    made->timing = !(flags & cudaEventDisableTiming);
    s.events[number] = std::move(made);
    *event = make_handle<cudaEvent_t>(number);
    ++counters().events;
    return cudaSuccess;
  });
}

cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, cudaEventDefault); }

cudaError_t cudaEventDestroy(cudaEvent_t handle) {
  return call("cudaEventDestroy", Rule::plain, [&] {
    State& s = state();
    std::unique_lock lock(s.mutex);
    if (!find_event(handle)) return cudaErrorInvalidResourceHandle;
    s.events.erase(number_of(handle));
    --counters().events;
    return cudaSuccess;
  });
}

cudaError_t cudaEventRecord(cudaEvent_t handle, cudaStream_t stream_handle) {
  return call("cudaEventRecord", Rule::plain, [&] {
    std::unique_lock lock(state().mutex);
    Event* event = find_event(handle);
    Stream* stream = find_stream(stream_handle);
    return event && stream ? record(*event, *stream) : cudaErrorInvalidResourceHandle;
  });
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
  if (flags != cudaEventRecordDefault) return remember(cudaErrorNotSupported);
  return cudaEventRecord(event, stream);
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream_handle, cudaEvent_t handle, unsigned flags) {
  return call("cudaStreamWaitEvent", Rule::plain, [&] {
    if (flags != cudaEventWaitDefault) return cudaErrorNotSupported;
    std::unique_lock lock(state().mutex);
    Event* event = find_event(handle);
    Stream* stream = find_stream(stream_handle);
    return event && stream ? wait(*stream, *event) : cudaErrorInvalidResourceHandle;
  });
}

cudaError_t cudaEventQuery(cudaEvent_t handle) {
  return call("cudaEventQuery", Rule::unsafe, [&] {
    std::unique_lock lock(state().mutex);
    Event* event = find_event(handle);
    if (!event) return cudaErrorInvalidResourceHandle;
    const cudaError_t refused = refuse_captured(*event);
    if (refused != cudaSuccess) return refused;
    return passed(*event) ? cudaSuccess : cudaErrorNotReady;
  });
}

cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
  return call("cudaEventSynchronize", Rule::unsafe, [&] {
    State& s = state();
    std::unique_lock lock(s.mutex);
    Event* event = find_event(handle);
    if (!event) return cudaErrorInvalidResourceHandle;
    const cudaError_t refused = refuse_captured(*event);
    if (refused != cudaSuccess || !event->fence) return refused;
    const auto fence = event->fence;
    s.changed.wait(lock, [&] { return s.stopping || fence->done; });
    return fence->done ? cudaSuccess : cudaErrorCudartUnloading;
  });
}

cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t start, cudaEvent_t end) {
  return call("cudaEventElapsedTime", Rule::plain, [&] {
    std::unique_lock lock(state().mutex);
    const Event *first = find_event(start), *last = find_event(end);
    if (!first || !last || !first->fence || !last->fence || !first->timing || !last->timing)
      return cudaErrorInvalidResourceHandle;
    if (!passed(*first) || !passed(*last)) return cudaErrorNotReady;
    *ms = std::chrono::duration<float, std::milli>(last->fence->at - first->fence->at).count();
    return cudaSuccess;
  });
}
