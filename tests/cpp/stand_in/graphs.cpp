// Stream capture and graphs. A graph is a list of operations, each with those it comes after; as in CUDA, events carry
// a capture from stream to stream and everything must come back to the stream where it began.
#include <utility>

#include "state.h"

struct CUgraph_st {
  std::vector<stand_in::Node> nodes;
};

struct CUgraphExec_st {
  std::shared_ptr<struct Program> program;
};

struct Program {
  std::vector<stand_in::Node> nodes;
  bool running = false;  // launches of one executable graph do not overlap
};

namespace stand_in {
namespace {

thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

bool forbids_unsafe(const Capture& capture) {
  const bool mine = capture.thread == std::this_thread::get_id() && capture.mode != cudaStreamCaptureModeRelaxed;
  if (thread_mode == cudaStreamCaptureModeRelaxed) return false;
  return mine || (thread_mode == cudaStreamCaptureModeGlobal && capture.mode == cudaStreamCaptureModeGlobal);
}

// The legacy default stream would have to wait for a stream that captures and orders itself with it.
bool depends_on_capture(const Stream& stream) {
  if (&stream != state().legacy[static_cast<size_t>(stream.device)]) return false;
  bool depends = false;
  for (auto& capture : state().captures)
    for (Stream* member : capture->members)
      if (member->blocking && member->device == stream.device) {
        capture->valid = false;
        depends = true;
      }
  return depends;
}

void finish(const std::shared_ptr<Capture>& capture) {
  for (Stream* member : capture->members) {
    member->capture = nullptr;
    member->frontier.clear();
  }
  capture->members.clear();
  state().captures.erase(capture);
}

// Everything that was captured comes before the end of the stream where it began.
bool is_joined(const Capture& capture) {
  std::set<int> before = capture.origin->frontier;
  for (int i = int(capture.nodes.size()) - 1; i >= 0; --i)  // what comes after a node has a higher number
    if (before.count(i)) before.insert(capture.nodes[size_t(i)].after.begin(), capture.nodes[size_t(i)].after.end());
  return before.size() == capture.nodes.size();
}

// One launch: nodes begin as soon as those before them have ended.
class Run {
 public:
  Run(const std::vector<Node>& nodes, int device) : nodes_(nodes), device_(device), waits_(nodes.size()) {
    for (size_t i = 0; i < nodes.size(); ++i) waits_[i] = nodes[i].after.size();
  }
  void operator()() {
    std::unique_lock lock(mutex_);
    left_ = nodes_.size();
    for (size_t i = 0; i < nodes_.size(); ++i)
      if (nodes_[i].after.empty()) start(i);
    ended_.wait(lock, [&] { return left_ == 0; });
  }

 private:
  void start(size_t i) {
    in_background([this, i] {
      current_device() = device_;
      if (nodes_[i].operation.run) nodes_[i].operation.run();
      std::unique_lock lock(mutex_);
      for (size_t next = i + 1; next < nodes_.size(); ++next)
        if (nodes_[next].after.count(int(i)) && --waits_[next] == 0) start(next);
      if (--left_ == 0) ended_.notify_all();  // under the mutex: it is gone as soon as the waiter has seen zero
    });
  }

  const std::vector<Node>& nodes_;
  const int device_;
  std::mutex mutex_;
  std::condition_variable ended_;
  std::vector<size_t> waits_;
  size_t left_ = 0;
};

}  // namespace

cudaError_t refuse_unsafe() {
  cudaError_t error = cudaSuccess;
  for (auto& capture : state().captures)
    if (forbids_unsafe(*capture)) {
      capture->valid = false;
      error = cudaErrorStreamCaptureUnsupported;
    }
  return error;
}

cudaError_t capture_operation(Stream& stream, Operation operation) {
  if (depends_on_capture(stream)) return cudaErrorStreamCaptureImplicit;
  if (!stream.capture) {
    enqueue(stream, std::move(operation));
    return cudaSuccess;
  }
  Capture& capture = *stream.capture;
  if (!capture.valid) return cudaErrorStreamCaptureInvalidated;
  capture.nodes.push_back({std::move(operation), stream.frontier});
  stream.frontier = {int(capture.nodes.size()) - 1};
  return cudaSuccess;
}

void leave_capture(Stream& stream) {
  const auto capture = stream.capture;
  if (!capture) return;
  capture->valid = false;
  if (capture->origin == &stream) return finish(capture);
  capture->members.erase(&stream);
  stream.capture = nullptr;
}

}  // namespace stand_in

using namespace stand_in;

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  return call("cudaThreadExchangeStreamCaptureMode", Rule::asks, [&] {
    if (*mode < cudaStreamCaptureModeGlobal || *mode > cudaStreamCaptureModeRelaxed) return cudaErrorInvalidValue;
    std::swap(*mode, thread_mode);
    return cudaSuccess;
  });
}

cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
  return call("cudaStreamBeginCapture", Rule::plain, [&] {
    State& s = state();
    std::unique_lock lock(s.mutex);
    Stream* stream = find_stream(handle);
    if (!stream) return cudaErrorInvalidResourceHandle;
    if (stream == s.legacy[static_cast<size_t>(stream->device)]) return cudaErrorStreamCaptureUnsupported;
    if (stream->capture) return cudaErrorIllegalState;
    auto capture = std::make_shared<Capture>();
    capture->id = new_handle();
    capture->mode = mode;
    capture->thread = std::this_thread::get_id();
    capture->origin = stream;
    capture->members.insert(stream);
    stream->capture = capture;
    s.captures.insert(capture);
    return cudaSuccess;
  });
}

cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
  return call("cudaStreamEndCapture", Rule::plain, [&] {
    std::unique_lock lock(state().mutex);
    *graph = nullptr;
    Stream* stream = find_stream(handle);
    if (!stream) return cudaErrorInvalidResourceHandle;
    const auto capture = stream->capture;
    if (!capture) return cudaErrorIllegalState;
    if (capture->mode != cudaStreamCaptureModeRelaxed && capture->thread != std::this_thread::get_id())
      return cudaErrorStreamCaptureWrongThread;
    if (capture->origin != stream) return capture->valid = false, cudaErrorStreamCaptureUnmatched;
    const bool joined = is_joined(*capture);
    finish(capture);
    std::vector<Node> nodes = std::exchange(capture->nodes, {});  // events that were recorded in it keep the rest
    if (!capture->valid) return cudaErrorStreamCaptureInvalidated;
    if (!joined) return cudaErrorStreamCaptureUnjoined;
    *graph = new CUgraph_st{std::move(nodes)};
    ++counters().graphs;
    return cudaSuccess;
  });
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, cudaStreamCaptureStatus* status, unsigned long long* id,
                                     cudaGraph_t* graph, const cudaGraphNode_t** dependencies,
                                     const cudaGraphEdgeData** edges, size_t* count) {
  return call("cudaStreamGetCaptureInfo", Rule::asks, [&] {
    if (graph || dependencies || edges || count) return cudaErrorNotSupported;
    std::unique_lock lock(state().mutex);
    Stream* stream = find_stream(handle);
    if (!stream) return cudaErrorInvalidResourceHandle;
    if (!stream->capture && stream == state().legacy[static_cast<size_t>(stream->device)])
      for (const auto& capture : state().captures)
        for (const Stream* member : capture->members)
          if (member->blocking && member->device == stream->device) return cudaErrorStreamCaptureImplicit;
    *status = cudaStreamCaptureStatusNone;
    if (!stream->capture) return cudaSuccess;
    *status = stream->capture->valid ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusInvalidated;
    if (id) *id = stream->capture->id;
    return cudaSuccess;
  });
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  return cudaStreamGetCaptureInfo(stream, status, nullptr, nullptr, nullptr, nullptr, nullptr);
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long flags) {
  return call("cudaGraphInstantiate", Rule::plain, [&] {
    if (!exec || !graph || flags) return cudaErrorInvalidValue;
    auto program = std::make_shared<Program>();
    program->nodes = graph->nodes;
    *exec = new CUgraphExec_st{program};
    ++counters().graph_execs;
    return cudaSuccess;
  });
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long flags) {
  return cudaGraphInstantiate(exec, graph, flags);
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
  return call("cudaGraphLaunch", Rule::plain, [&] {
    const auto run = [program = exec->program] {
      State& s = state();
      std::unique_lock lock(s.mutex);
      s.changed.wait(lock, [&] { return s.stopping || !program->running; });
      if (s.stopping) return;
      program->running = true;
      lock.unlock();
      Run(program->nodes, current_device())();
      lock.lock();
      program->running = false;
      s.changed.notify_all();
    };
    return submit(stream, {"graph", run, {}});
  });
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  return call("cudaGraphExecDestroy", Rule::plain, [&] {
    delete exec;
    --counters().graph_execs;
    return cudaSuccess;
  });
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  return call("cudaGraphDestroy", Rule::plain, [&] {
    delete graph;
    --counters().graphs;
    return cudaSuccess;
  });
}
