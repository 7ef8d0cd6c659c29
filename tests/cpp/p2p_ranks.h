// What tests of engine p2p have in common: ranks on the stand-in CUDA runtime, what they call, what they throw.
#pragma once
#include <chrono>
#include <functional>
#include <optional>
#include <string>
#include <thread>

#include "check.h"
#include "core_steps.h"
#include "cuda/p2p_builder.h"
#include "queue.h"
#include "stand_in/stand_in.h"

namespace p2p {

using namespace dpcomm;
using Clock = std::chrono::steady_clock;
using steps::Layout;
using steps::Step;

#define OK(...) CHECK((__VA_ARGS__) == cudaSuccess)

constexpr double kLongS = 60;  // for what should take milliseconds
constexpr int64_t kMiB = 1 << 20;

inline double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

inline bool eventually(const std::function<bool()>& holds, double within_s = kLongS) {
  for (const auto start = Clock::now(); seconds_since(start) < within_s;) {
    if (holds()) return true;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return false;
}

inline P2pWish wish(int max_ctas = 2, bool pinned = false) {
  P2pWish w{2 * kMiB};
  w.max_ctas = max_ctas, w.pinned = pinned;
  w.slice_bytes = 2048;  // small calls take several slices, and all slots
  return w;
}

using Queues = std::vector<std::unique_ptr<Queue>>;

// The ranks of one communicator, all in this process.
inline Queues local(const std::vector<int>& devices, const P2pWish& w = wish(), double timeout_s = kLongS) {
  Queues all;
  for (auto& engine : p2p_local(devices, w, timeout_s, "abcd"))
    all.push_back(std::make_unique<Queue>(std::move(engine)));
  return all;
}

inline void in_threads(int count, const std::function<void(int)>& body) {
  std::vector<std::thread> threads;
  for (int i = 0; i < count; ++i) threads.emplace_back(body, i);
  for (std::thread& thread : threads) thread.join();
}

// The same, by builders that are threads: they shake hands, as processes do.
inline Queues built(const std::vector<int>& devices, const P2pWish& w = wish(), double timeout_s = kLongS) {
  const int n = int(devices.size());
  std::vector<std::unique_ptr<P2pBuilder>> builders;
  std::vector<Endpoint> endpoints;
  for (int r = 0; r < n; ++r) {
    const int channels = p2p_channels(devices[size_t(r)], n, w);
    builders.push_back(std::make_unique<P2pBuilder>(r, n, devices[size_t(r)], w, channels));
    endpoints.push_back(builders.back()->endpoint());
  }
  Queues all(devices.size());
  for (auto& builder : builders) CHECK(builder->probe(endpoints) == std::vector<bool>(devices.size(), true));
  in_threads(n, [&](int r) {
    builders[size_t(r)]->bind(Secret{}, kLongS);
    all[size_t(r)] = std::make_unique<Queue>(builders[size_t(r)]->finish(timeout_s, "abcd"));
  });
  return all;
}

// As processes do, at about the same time: each waits for the others to let go of its memory.
inline void close_all(Queues& ranks) {
  in_threads(int(ranks.size()), [&](int r) { ranks[size_t(r)]->close(1); });
}

struct StreamOf {
  explicit StreamOf(int device) : device(device) {
    const CurrentDevice current(device);
    OK(cudaStreamCreateWithFlags(&handle, cudaStreamNonBlocking));
  }
  StreamOf(StreamOf&& other) noexcept : device(other.device), handle(std::exchange(other.handle, nullptr)) {}
  ~StreamOf() {
    if (handle) OK(cudaStreamDestroy(handle));
  }
  operator cudaStream_t() const { return handle; }
  uintptr_t number() const { return reinterpret_cast<uintptr_t>(handle); }
  bool done() const { return cudaStreamSynchronize(handle) == cudaSuccess; }
  int device;
  cudaStream_t handle = nullptr;
};

inline std::vector<StreamOf> streams_of(const Queues& ranks) {
  std::vector<StreamOf> all;
  for (const auto& rank : ranks) all.emplace_back(rank->engine().device());
  return all;
}

// A kernel that runs a function of the host.
using Body = std::function<void()>;
inline const char kBodyKey = 0;
inline void launch(const Body& body, const StreamOf& stream) {  // the body outlives the kernel
  stand_in::register_kernel(
      &kBodyKey, [](void** params, unsigned, unsigned) { (**static_cast<const Body**>(params[0]))(); }, 32,
      sizeof(const Body*));
  const CurrentDevice current(stream.device);
  const Body* pointer = &body;
  void* params[] = {&pointer};
  cudaLaunchConfig_t config{};
  config.gridDim = {1, 1, 1}, config.blockDim = {32, 1, 1};
  config.stream = stream;
  OK(cudaLaunchKernelExC(&config, &kBodyKey, params));
}

// Holds a stream until it is opened; opens at the end in any case.
struct Gate {
  ~Gate() { open = true; }
  std::atomic<bool> begun{false}, open{false};
  Body body = [this] {
    begun = true;
    CHECK(eventually([this] { return open.load(); }));
  };
};

// Captures what `work` puts into the stream.
inline cudaGraphExec_t captured(const StreamOf& stream, const std::function<void()>& work) {
  const CurrentDevice current(stream.device);
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  work();
  OK(cudaStreamEndCapture(stream, &graph));
  OK(cudaGraphInstantiate(&exec, graph, 0));
  OK(cudaGraphDestroy(graph));
  return exec;
}

inline Call call_of(Step& step, int rank) {
  const Bucket bucket = step.bucket(rank);
  Call call;
  for (size_t s = 0; s < step.layout.size(); ++s) {
    call.addresses.push_back(bucket.segments[s].data);
    call.counts.push_back(step.layout[s]);
  }
  call.dtype = step.dtype, call.op = step.op, call.codec = step.codec, call.algorithm = step.algorithm;
  return call;
}

// One tensor of ones, twos, ...: of rank r, r + 1 everywhere.
template <class T = float>
struct Data {
  Data(int64_t elems, int rank) : x(size_t(elems), T(rank + 1)) {
    call.addresses = {reinterpret_cast<char*>(x.data())};
    call.counts = {elems};
    call.dtype = std::is_same_v<T, float> ? Dtype::float32 : Dtype::int32;
  }
  Data(const Data&) = delete;
  bool all(T value) const {
    return std::all_of(x.begin(), x.end(), [value](T v) { return v == value; });
  }
  bool all_nan() const {
    return std::all_of(x.begin(), x.end(), [](T v) { return v != v; });
  }
  std::vector<T> x;
  Call call;
};

// The Error that f throws; a failed check and an empty one if there is none.
inline Error error_of(const std::function<void()>& f) {
  try {
    f();
  } catch (const Error& error) {
    return error;
  }
  CHECK(!"it throws");
  return Error(Code::internal, "nothing was thrown");
}
inline Error error_of(Pending& pending) {
  return error_of([&] {
    if (const auto error = pending.error()) std::rethrow_exception(error);
  });
}

// Whether it is this error, with these words.
inline bool says(const Error& error, Code code, const std::vector<std::string>& words) {
  bool all = error.code == code;
  for (const std::string& word : words) all = all && std::string(error.what()).find(word) != std::string::npos;
  if (!all) std::fprintf(stderr, "  it says: %s: %s\n", name_of(error.code), error.what());
  return all;
}

// Behind the stream's work and before what comes later.
inline void run_on(Queue& queue, const Call& call, const StreamOf& stream) {
  queue.enqueue(call, stream.number())->join(stream.number(), kLongS, {});
}

// One call on all ranks from one thread; true if it ended well.
inline bool run_all(Queues& ranks, const std::function<Call(int)>& call) {
  std::vector<std::shared_ptr<Pending>> pending;
  for (size_t r = 0; r < ranks.size(); ++r)
    pending.push_back(ranks[r]->enqueue(call(int(r)), ranks[r]->engine().stream()));
  bool well = true;
  for (const auto& p : pending) well = p->synchronize(kLongS, {}) && !p->error() && well;
  return well;
}

// Whether calls still add up.
inline bool usable(Queues& ranks) {
  std::vector<std::unique_ptr<Data<>>> data;
  for (size_t r = 0; r < ranks.size(); ++r) data.push_back(std::make_unique<Data<>>(7001, int(r)));
  const bool well = run_all(ranks, [&](int r) { return data[size_t(r)]->call; });
  const size_t n = ranks.size();
  return well && std::all_of(data.begin(), data.end(), [&](const auto& d) { return d->all(float(n * (n + 1) / 2)); });
}

// What exists after everything was given back: nothing but the streams, which are lent again (events.h); as many as
// were in use at once.
inline void check_nothing_is_left(int64_t streams_at_once = 3) {
  const stand_in::Counters& c = stand_in::counters();
  CHECK(c.streams <= streams_at_once);
  const std::pair<const char*, int64_t> all[] = {{"allocations", c.allocations},
                                                 {"host allocations", c.host_allocations},
                                                 {"registrations", c.registrations},
                                                 {"imports", c.imports},
                                                 {"events", c.events},
                                                 {"graphs", c.graphs},
                                                 {"graph execs", c.graph_execs}};
  for (const auto& [what, count] : all)
    if (!CHECK(count == 0)) std::fprintf(stderr, "  %s: %lld\n", what, (long long)count);
}

}  // namespace p2p
