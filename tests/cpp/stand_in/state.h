// What the parts of the stand-in share. One mutex guards everything; nothing that takes long happens under it.
#pragma once
#include <chrono>
#include <condition_variable>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <thread>

#include "stand_in.h"

namespace stand_in {

using Clock = std::chrono::steady_clock;

// Prints and aborts.
[[noreturn, gnu::format(printf, 1, 2)]] void die(const char* format, ...);

// ---- calls -------------------------------------------------------------------------------------------------------

enum class Rule {
  asks,    // works in device code and after a sticky error; not logged
  plain,   // touches the device
  unsafe,  // and is forbidden while somebody captures (cudaStreamCaptureMode)
};
// What a call returns before it does anything; cudaSuccess: it may go on.
cudaError_t begin(const char* name, Rule rule);
// Keeps an error for cudaGetLastError.
cudaError_t remember(cudaError_t error);

template <class Body>
cudaError_t call(const char* name, Rule rule, Body body) {
  const cudaError_t refused = begin(name, rule);
  return remember(refused != cudaSuccess ? refused : body());
}

// ---- streams -----------------------------------------------------------------------------------------------------

struct Fence {
  bool done = false;
  Clock::time_point at;
};

// `ready` is asked under the mutex until it is true, `run` is called without it. Both may be empty.
struct Operation {
  std::string what;
  std::function<void()> run;
  std::function<bool()> ready;
};

struct Node {
  Operation operation;
  std::set<int> after;
};

struct Stream;

struct Capture {
  uint64_t id;
  cudaStreamCaptureMode mode;
  std::thread::id thread;
  Stream* origin;
  bool valid = true;
  std::vector<Node> nodes;
  std::set<Stream*> members;  // the origin too
};

struct Stream {
  cudaStream_t handle;
  int device;
  bool blocking;  // orders itself with the legacy default stream
  int priority;
  std::deque<Operation> queue;  // the first stays while it runs
  uint64_t enqueued = 0, completed = 0;
  std::thread worker;
  std::condition_variable wake;
  bool closing = false, exited = false;
  std::shared_ptr<Capture> capture;
  std::set<int> frontier;  // nodes of the capture that the next one comes after
};

struct Event {
  int device;
  bool timing;
  std::shared_ptr<Fence> fence;      // of the last record; null: none yet
  std::shared_ptr<Capture> capture;  // the last record was captured: these nodes
  std::set<int> nodes;
};

struct Function {
  Kernel kernel;
  int threads;
  size_t param_bytes;
};

struct State {
  std::mutex mutex;
  std::condition_variable changed;  // an operation, a kernel, a worker has ended
  bool stopping = false;            // the process exits

  uint64_t next_handle = 16;
  std::map<uint64_t, std::unique_ptr<Stream>> streams;  // legacy default streams too
  std::array<Stream*, kMostDevices> legacy{};
  std::vector<std::unique_ptr<Stream>> destroyed;  // their workers may still have work
  std::map<uint64_t, std::unique_ptr<Event>> events;
  std::set<std::shared_ptr<Capture>> captures;  // those that have not ended
  std::map<const void*, std::shared_ptr<const Function>> functions;
  std::array<unsigned, kMostDevices> resident{};  // CTAs that a device runs
  std::multiset<std::string> running;             // what to name when it does not end

  std::vector<std::string> log;
  std::vector<Launch> launches;
};

// Made at first use and never destroyed; when the process exits all threads are joined.
State& state();
int& current_device();   // of the calling thread
bool& in_device_code();  // the calling thread plays a CTA or a host function

// All signals but those of faults stay with the program's own threads.
std::thread start_thread(std::function<void()> body);

// A handle is a number that is never used again, in the guise of a pointer.
template <class Handle>
Handle make_handle(uint64_t number) {
  return reinterpret_cast<Handle>(static_cast<uintptr_t>(number));
}
template <class Handle>
uint64_t number_of(Handle handle) {
  return static_cast<uint64_t>(reinterpret_cast<uintptr_t>(handle));
}
uint64_t new_handle();  // under the mutex

// Under the mutex. Null: no such stream. Ends the process where it has been destroyed.
Stream* find_stream(cudaStream_t handle);
// Under the mutex: puts it behind what the stream has, captures or not.
void enqueue(Stream& stream, Operation operation);
// Puts it into the stream, or into the graph that the stream captures.
cudaError_t submit(cudaStream_t handle, Operation operation);
// The same, and waits until it is done. The stream does not capture.
cudaError_t submit_and_wait(cudaStream_t handle, Operation operation);
// Waits for what the streams of a device (-1: of all) have now.
cudaError_t drain(int device);

// ---- capture (under the mutex) -----------------------------------------------------------------------------------

// cudaErrorStreamCaptureUnsupported where the calling thread may not do unsafe things now; spoils these captures.
cudaError_t refuse_unsafe();
cudaError_t capture_operation(Stream& stream, Operation operation);
void leave_capture(Stream& stream);  // as it is destroyed

// ---- kernels -----------------------------------------------------------------------------------------------------

// Runs body(0) ... body(count - 1) at once, each in a thread of its own, and waits for them.
void in_parallel(unsigned count, const std::function<void(unsigned)>& body);
// Runs it some time, in a thread of its own.
void in_background(std::function<void()> body);
void join_pool();

// ---- memory ------------------------------------------------------------------------------------------------------

enum class Kind { device, imported, adopted, pinned, registered };

// Ends the process unless [address, address + bytes) is good for `name`: inside one known piece of memory, or, where
// `ordinary` host memory will do, outside all. True: known. kind: of which.
bool check_range(const char* name, const void* address, size_t bytes, bool ordinary, Kind* kind = nullptr);
int physical_device(int ordinal);
void release_imports();  // at exit: they are closed

}  // namespace stand_in
