// A stand-in for the CUDA runtime: the part of its C API that the p2p engine and its tests use, on a machine without a
// GPU. Device memory is host memory, a stream is a thread that works through a queue, a kernel is a host function and
// each CTA of a launch a thread of its own. Link it instead of cudart.
//
// Faithful where a program could come to depend on it: what is asynchronous is asynchronous, fresh memory is not zero,
// cooperative launches wait until all their CTAs fit, capture forks and joins over events, cudaFree waits for the
// device, a forked child cannot go on. Streams made without cudaStreamNonBlocking order themselves with the legacy
// default stream of their device; the others do not.
//
// Not faithful: no timing; in one process every address works from every device, whatever peer access says (see
// Machine::says); processes do not share a device's CTAs nor its limit of memory; a graph runs each branch at once.
//
// Misuse that a GPU answers with undefined behaviour ends the process, with a line on stderr.
#pragma once
#include <cuda_runtime_api.h>

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace stand_in {

constexpr int kMostDevices = 8;

// A value that tests change while other threads call the runtime.
template <class T>
class Knob {
 public:
  Knob(T value = T{}) : value_(value) {}
  Knob(const Knob& other) : value_(other.value_.load()) {}
  Knob& operator=(const Knob& other) {
    value_ = other.value_.load();
    return *this;
  }
  operator T() const { return value_; }

 private:
  std::atomic<T> value_;
};

// What the runtime pretends to have. Members that are no Knob are set before the first call. An error that is not
// cudaSuccess is what the calls it is named after return instead of doing anything.
struct Machine {
  int devices = 2;
  std::vector<int> visible;  // physical device of each ordinal; empty: 0, 1, 2, ... UUIDs and peer access go by it
  int sms = 16;
  int blocks_per_sm = 1;
  int major = 9, minor = 0;
  size_t memory_bytes = size_t{512} << 20;  // of each device, for each process
  int driver_version = CUDART_VERSION;

  // [physical device that reads and writes][whose memory]. `says`: what the driver answers. `holds`: whether data
  // really arrive; where they do not, cudaIpcOpenMemHandle gives a private copy. Within a process it cannot be
  // simulated.
  using Matrix = std::array<std::array<bool, kMostDevices>, kMostDevices>;
  Matrix says = all(true), holds = all(true);
  static Matrix all(bool value);  // for pairs of different devices; the diagonal is true

  Knob<cudaError_t> driver = cudaSuccess;  // every call; for cudaGetDeviceCount: cudaErrorNoDevice, InsufficientDriver
  Knob<cudaError_t> sticky = cudaSuccess;  // every call that could touch the device: a context that is lost
  Knob<cudaError_t> ipc_get = cudaSuccess, ipc_open = cudaSuccess;
  Knob<cudaError_t> host_register = cudaSuccess;
  Knob<cudaError_t> launch = cudaSuccess;
  Knob<bool> no_kernel_image = false;  // cudaFuncGetAttributes, launches: cudaErrorNoKernelImageForDevice
  // Freeing what a living process has imported is undefined behaviour; true: counted (Counters) instead of fatal.
  Knob<bool> allow_free_while_imported = false;
  Knob<bool> log = false;          // see log(), launches()
  Knob<int> exit_deadline_s = 60;  // how long the exit of the process waits for kernels to end before it aborts
};

// At first use: the defaults, changed by the environment variable STAND_IN_MACHINE: pairs key=value with commas
// between.
//   devices=2  visible=1:0  sms=16  blocks_per_sm=1  capability=9.0  memory_mib=512  exit_deadline_s=60
//   peers=all|none|drop (none: the driver says no; drop: it says yes and data do not arrive)   ipc=ok|fail
//   register=ok|fail   image=ok|none   driver=ok|none|old   imported=die|allow (free while imported)
// Anything else ends the process.
Machine& machine();

struct Counters {
  // What exists now.
  std::atomic<int64_t> allocations{0}, host_allocations{0}, registrations{0}, imports{0};
  std::atomic<int64_t> streams{0}, events{0}, graphs{0}, graph_execs{0};
  // What has happened so far.
  std::atomic<int64_t> malloc_calls{0}, launches{0}, freed_while_imported{0};
};
Counters& counters();

// While machine().log: names of the calls in order ("cudaMalloc"), but for those that only ask (cudaGetDevice, ...).
std::vector<std::string> log();
void clear_log();

// While machine().log: launches in order; kernels that a graph replays included.
struct Launch {
  const void* key;
  unsigned grid, threads;  // CTAs, threads of each
  int device;
  bool cooperative;
  int sync_domain;  // cudaLaunchMemSyncDomain
};
std::vector<Launch> launches();

// What runs when `key` is launched. A kernel takes one parameter of param_bytes bytes, which is copied at launch:
// params[0] points to the copy. cta is in [0, grid). A launch with more threads than `threads` fails. Keys are kept for
// ever; registering one again replaces it. A CTA may call cudaGetDevice; other calls fail.
using Kernel = std::function<void(void** params, unsigned cta, unsigned grid)>;
void register_kernel(const void* key, Kernel kernel, int threads, size_t param_bytes);

// Ordinary host memory that plays device memory from now on (a test's tensors); forget it before it is freed.
void adopt_memory(void* address, size_t bytes, int device);
void forget_memory(void* address);

}  // namespace stand_in
