// The stand-in for the CUDA runtime: that tests of the p2p engine may believe it. What ends a process, and what needs
// two of them, happens in children: this program again, with the name of a scene.
#include <fcntl.h>
#include <poll.h>
#include <spawn.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <map>
#include <string>
#include <thread>

#include "check.h"
#include "stand_in/stand_in.h"

using stand_in::counters;
using stand_in::machine;

namespace {

#define OK(...) CHECK((__VA_ARGS__) == cudaSuccess)

constexpr auto kDeadline = std::chrono::seconds(30);

// False: it has not come true in time.
bool eventually(const std::function<bool()>& holds) {
  for (const auto end = std::chrono::steady_clock::now() + kDeadline; std::chrono::steady_clock::now() < end;) {
    if (holds()) return true;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return false;
}

// ---- a kernel that does what its parameter says ------------------------------------------------------------------

using Body = std::function<void(unsigned cta, unsigned grid)>;
constexpr int kThreads = 64;
const char kBodyKernel = 0, kAddKernel = 0;  // their addresses

struct Add {
  std::atomic<int>* to;
  int values[3];
};

void register_kernels() {
  stand_in::register_kernel(
      &kBodyKernel,
      [](void** params, unsigned cta, unsigned grid) { (**static_cast<const Body**>(params[0]))(cta, grid); }, kThreads,
      sizeof(const Body*));
  stand_in::register_kernel(
      &kAddKernel,
      [](void** params, unsigned, unsigned) {
        const Add& add = *static_cast<const Add*>(params[0]);
        for (int value : add.values) *add.to += value;
      },
      kThreads, sizeof(Add));
}

cudaError_t launch(const void* key, void* param, cudaStream_t stream, unsigned grid, bool cooperative,
                   unsigned threads) {
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeCooperative;
  attributes[0].val.cooperative = cooperative;
  attributes[1].id = cudaLaunchAttributeMemSyncDomain;
  attributes[1].val.memSyncDomain = cudaLaunchMemSyncDomainRemote;
  cudaLaunchConfig_t config{};
  config.gridDim = {grid, 1, 1};
  config.blockDim = {threads, 1, 1};
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  void* params[] = {param};
  return cudaLaunchKernelExC(&config, key, params);
}

// The body outlives the kernel.
cudaError_t launch(const Body& body, cudaStream_t stream, unsigned grid = 1, bool cooperative = true) {
  const Body* pointer = &body;
  return launch(&kBodyKernel, &pointer, stream, grid, cooperative, kThreads);
}

cudaError_t launch_add(std::atomic<int>& to, int value, cudaStream_t stream) {
  Add add{&to, {value, 0, 0}};
  const cudaError_t error = launch(&kAddKernel, &add, stream, 1, true, kThreads);
  add.values[0] = -1000;  // too late
  return error;
}

// Holds a stream until it is opened.
struct Gate {
  std::atomic<bool> begun{false}, open{false};
  Body body = [this](unsigned, unsigned) {
    begun = true;
    CHECK(eventually([this] { return open.load(); }));
  };
};

struct StreamOf {
  explicit StreamOf(int device, unsigned flags = cudaStreamNonBlocking) {
    OK(cudaSetDevice(device));
    OK(cudaStreamCreateWithPriority(&handle, flags, -5));
    OK(cudaSetDevice(0));
  }
  ~StreamOf() { OK(cudaStreamDestroy(handle)); }
  operator cudaStream_t() const { return handle; }
  cudaStream_t handle = nullptr;
};

struct EventOf {
  EventOf() { OK(cudaEventCreateWithFlags(&handle, cudaEventDisableTiming)); }
  ~EventOf() { OK(cudaEventDestroy(handle)); }
  operator cudaEvent_t() const { return handle; }
  cudaEvent_t handle = nullptr;
};

char* allocate(size_t bytes) {
  void* p = nullptr;
  OK(cudaMalloc(&p, bytes));
  return static_cast<char*>(p);
}

// ---- children ----------------------------------------------------------------------------------------------------

struct Ended {
  int status = -1;
  std::string said;  // on stderr
  bool aborted_with(const char* text) const {
    return WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT && said.find(text) != std::string::npos;
  }
  bool well() const {
    const bool is = WIFEXITED(status) && WEXITSTATUS(status) == 0;
    if (!is) std::fprintf(stderr, "a child ended with status %#x and said:\n%s", unsigned(status), said.c_str());
    return is;
  }
};

// Runs a scene in a child, to its end. Its own alarm is the deadline.
Ended play(const std::vector<std::string>& arguments, const std::string& described = "") {
  int ends[2];
  if (!CHECK(pipe2(ends, O_CLOEXEC) == 0)) return {};
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, ends[1], STDERR_FILENO);
  posix_spawn_file_actions_addopen(&actions, STDOUT_FILENO, "/dev/null", O_WRONLY, 0);
  std::vector<char*> argv{const_cast<char*>("test_stand_in")};
  for (const auto& argument : arguments) argv.push_back(const_cast<char*>(argument.c_str()));
  argv.push_back(nullptr);
  std::string variable = "STAND_IN_MACHINE=" + described;
  std::vector<char*> environment{variable.data()};
  for (char** one = environ; *one; ++one)
    if (std::strncmp(*one, "STAND_IN_MACHINE=", 17) != 0) environment.push_back(*one);
  environment.push_back(nullptr);
  pid_t pid = -1;
  CHECK(posix_spawn(&pid, "/proc/self/exe", &actions, nullptr, argv.data(), environment.data()) == 0);
  posix_spawn_file_actions_destroy(&actions);
  close(ends[1]);
  Ended ended;
  char text[4096];
  for (ssize_t got; (got = read(ends[0], text, sizeof text)) > 0;) ended.said.append(text, size_t(got));
  close(ends[0]);
  CHECK(waitpid(pid, &ended.status, 0) == pid);
  return ended;
}

// ---- streams, events ---------------------------------------------------------------------------------------------

void test_a_stream_is_in_order_and_asynchronous() {
  StreamOf stream(0), other(0);
  Gate gate;
  std::vector<int> order;
  const Body first = [&](unsigned, unsigned) { order.push_back(1); };
  const Body second = [&](unsigned, unsigned) { order.push_back(2); };
  const Body elsewhere = [&](unsigned, unsigned) {};
  OK(launch(gate.body, stream));
  OK(launch(first, stream));
  OK(launch(second, stream));
  CHECK(cudaStreamQuery(stream) == cudaErrorNotReady);
  OK(launch(elsewhere, other));
  OK(cudaStreamSynchronize(other));  // is not held up
  CHECK(cudaStreamQuery(stream) == cudaErrorNotReady);
  gate.open = true;
  OK(cudaStreamSynchronize(stream));
  OK(cudaStreamQuery(stream));
  CHECK(order == std::vector<int>{1, 2});
  CHECK(cudaGetLastError() == cudaErrorNotReady);
}

void test_events_order_streams() {
  StreamOf one(0), two(1);
  EventOf event, never;
  Gate gate;
  std::atomic<int> sum{0}, seen{-1};
  const Body look = [&](unsigned, unsigned) { seen = sum.load(); };
  OK(cudaEventQuery(event));
  OK(cudaStreamWaitEvent(two, never, 0));
  OK(launch(gate.body, one));
  OK(launch_add(sum, 7, one));
  OK(cudaEventRecord(event, one));
  OK(cudaStreamWaitEvent(two, event, 0));
  OK(cudaSetDevice(1));
  OK(launch(look, two));
  OK(cudaSetDevice(0));
  CHECK(cudaEventQuery(event) == cudaErrorNotReady);
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  CHECK(seen == -1);
  gate.open = true;
  OK(cudaStreamSynchronize(two));
  CHECK(seen == 7);
  OK(cudaEventSynchronize(event));
  OK(cudaEventQuery(event));
  CHECK(cudaEventRecord(event, two) == cudaErrorInvalidResourceHandle);  // the event is of device 0
}

void test_a_wait_is_for_what_was_recorded_by_then() {
  StreamOf one(0), two(0);
  EventOf event;
  Gate gate;
  OK(cudaEventRecord(event, one));
  OK(cudaStreamWaitEvent(two, event, 0));
  OK(launch(gate.body, one));
  OK(cudaEventRecord(event, one));
  OK(cudaStreamSynchronize(two));  // not for the second record
  CHECK(cudaEventQuery(event) == cudaErrorNotReady);
  gate.open = true;
  OK(cudaEventSynchronize(event));
}

void test_times_between_events() {
  StreamOf stream(0);
  cudaEvent_t start = nullptr, end = nullptr;
  OK(cudaEventCreate(&start));
  OK(cudaEventCreate(&end));
  const Body nap = [](unsigned, unsigned) { std::this_thread::sleep_for(std::chrono::milliseconds(5)); };
  float ms = 0;
  CHECK(cudaEventElapsedTime(&ms, start, end) == cudaErrorInvalidResourceHandle);
  OK(cudaEventRecord(start, stream));
  OK(launch(nap, stream));
  OK(cudaEventRecord(end, stream));
  OK(cudaEventSynchronize(end));
  OK(cudaEventElapsedTime(&ms, start, end));
  CHECK(ms >= 5);
  OK(cudaEventDestroy(start));
  OK(cudaEventDestroy(end));
}

void test_the_legacy_stream_and_the_others() {
  StreamOf blocking(0, cudaStreamDefault), free(0);
  Gate gate;
  std::atomic<int> sum{0};
  OK(launch(gate.body, nullptr));
  OK(launch_add(sum, 1, blocking));
  OK(launch_add(sum, 10, free));
  OK(cudaStreamSynchronize(free));
  CHECK(cudaStreamQuery(blocking) == cudaErrorNotReady && sum == 10);
  gate.open = true;
  OK(cudaStreamSynchronize(blocking));
  CHECK(sum == 11);
  Gate other;
  OK(launch(other.body, blocking));
  OK(launch_add(sum, 100, nullptr));
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  CHECK(cudaStreamQuery(nullptr) == cudaErrorNotReady && sum == 11);
  other.open = true;
  OK(cudaDeviceSynchronize());
  CHECK(sum == 111);
}

void test_host_functions_may_not_call_the_runtime() {
  StreamOf stream(0);
  std::atomic<int> got{0};
  OK(cudaLaunchHostFunc(
      stream,
      [](void* data) {
        void* p = nullptr;
        *static_cast<std::atomic<int>*>(data) = cudaMalloc(&p, 1);
      },
      &got));
  OK(cudaStreamSynchronize(stream));
  CHECK(got == cudaErrorNotPermitted);
}

// ---- kernels -----------------------------------------------------------------------------------------------------

void test_all_ctas_of_a_launch_are_there_at_once() {
  StreamOf stream(1);
  const auto most = unsigned(machine().sms * machine().blocks_per_sm);
  std::atomic<unsigned> arrived{0}, right_device{0};
  const Body meet = [&](unsigned cta, unsigned grid) {
    int device = -1;
    right_device += cudaGetDevice(&device) == cudaSuccess && device == 1 && cta < grid;
    ++arrived;
    CHECK(eventually([&] { return arrived == grid; }));
  };
  OK(cudaSetDevice(1));
  OK(launch(meet, stream, most));
  OK(cudaStreamSynchronize(stream));
  CHECK(arrived == most && right_device == most);
  CHECK(launch(meet, stream, most + 1) == cudaErrorCooperativeLaunchTooLarge);
  std::atomic<unsigned> ran{0};
  const Body count = [&](unsigned, unsigned) { ++ran; };
  OK(launch(count, stream, 3 * most + 1, false));  // in waves
  OK(cudaStreamSynchronize(stream));
  CHECK(ran == 3 * most + 1);
  OK(cudaSetDevice(0));
}

void test_a_launch_waits_until_it_fits() {
  StreamOf one(0), two(0), three(0);
  const auto most = unsigned(machine().sms * machine().blocks_per_sm);
  Gate gate;
  const Body nothing = [](unsigned, unsigned) {};
  OK(launch(gate.body, one, 1));
  CHECK(eventually([&] { return gate.begun.load(); }));
  OK(launch(nothing, two, most));
  OK(launch(nothing, three, most - 1));
  OK(cudaStreamSynchronize(three));
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  CHECK(cudaStreamQuery(two) == cudaErrorNotReady);
  gate.open = true;
  OK(cudaStreamSynchronize(two));
  OK(cudaStreamSynchronize(one));
}

void test_a_launch_that_is_not_cooperative_takes_what_room_there_is() {
  StreamOf one(0), two(0);
  const auto most = unsigned(machine().sms * machine().blocks_per_sm);
  Gate gate;
  std::atomic<unsigned> ran{0};
  const Body count = [&](unsigned, unsigned) { ++ran; };
  OK(launch(gate.body, one, 1));
  CHECK(eventually([&] { return gate.begun.load(); }));
  OK(launch(count, two, 2 * most, false));
  OK(cudaStreamSynchronize(two));
  CHECK(ran == 2 * most && cudaStreamQuery(one) == cudaErrorNotReady);
  gate.open = true;
  OK(cudaStreamSynchronize(one));
}

void test_launches_that_fail() {
  StreamOf here(0), there(1);
  const Body nothing = [](unsigned, unsigned) {};
  const Body* pointer = &nothing;
  const char unknown = 0;
  CHECK(launch(&unknown, &pointer, here, 1, true, kThreads) == cudaErrorInvalidDeviceFunction);
  CHECK(launch(&kBodyKernel, &pointer, here, 1, true, kThreads + 1) == cudaErrorLaunchOutOfResources);
  CHECK(launch(&kBodyKernel, &pointer, here, 0, true, kThreads) == cudaErrorInvalidConfiguration);
  CHECK(launch(nothing, there) == cudaErrorInvalidResourceHandle);  // device 0 is current
  machine().launch = cudaErrorLaunchOutOfResources;
  CHECK(launch(nothing, here) == cudaErrorLaunchOutOfResources);
  machine().launch = cudaSuccess;
  machine().no_kernel_image = true;
  cudaFuncAttributes attributes;
  CHECK(launch(nothing, here) == cudaErrorNoKernelImageForDevice);
  CHECK(cudaFuncGetAttributes(&attributes, &kBodyKernel) == cudaErrorNoKernelImageForDevice);
  machine().no_kernel_image = false;
  OK(cudaFuncGetAttributes(&attributes, &kBodyKernel));
  CHECK(attributes.maxThreadsPerBlock == kThreads);
  int blocks = 0;
  OK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, &kBodyKernel, kThreads, 0));
  CHECK(blocks == machine().blocks_per_sm);
  OK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, &kBodyKernel, kThreads + 1, 0));
  CHECK(blocks == 0);
  cudaGetLastError();
}

// ---- memory ------------------------------------------------------------------------------------------------------

void test_copies() {
  StreamOf stream(0);
  Gate gate;
  char* device = allocate(100);
  char pageable[100], back[100];
  void* pinned = nullptr;
  OK(cudaHostAlloc(&pinned, 100, cudaHostAllocDefault));
  std::memset(pageable, 1, sizeof pageable);
  std::memset(pinned, 1, 100);
  OK(launch(gate.body, stream));
  OK(cudaMemcpyAsync(device, pageable, 50, cudaMemcpyHostToDevice, stream));
  OK(cudaMemcpyAsync(device + 50, pinned, 50, cudaMemcpyHostToDevice, stream));
  std::memset(pageable, 2, sizeof pageable);  // was read before the call came back
  std::memset(pinned, 2, 100);                // is read when its turn comes
  gate.open = true;
  OK(cudaMemcpyAsync(back, device, 100, cudaMemcpyDeviceToHost, stream));  // waits
  CHECK(back[0] == 1 && back[49] == 1 && back[50] == 2 && back[99] == 2);
  OK(cudaMemsetAsync(device, 3, 99, stream));
  OK(cudaStreamSynchronize(stream));
  OK(cudaMemcpy(back, device, 100, cudaMemcpyDefault));
  CHECK(back[0] == 3 && back[98] == 3 && back[99] == 2);
  CHECK(cudaMemcpy(device, device + 50, 10, cudaMemcpyHostToDevice) == cudaErrorInvalidValue);
  OK(cudaFreeHost(pinned));
  OK(cudaFree(device));
  cudaGetLastError();
}

void test_a_free_stream_overtakes_memset() {
  StreamOf stream(0);
  Gate gate;
  char* device = allocate(1);
  OK(cudaMemset(device, 1, 1));
  OK(cudaDeviceSynchronize());
  OK(launch(gate.body, nullptr));
  OK(cudaMemset(device, 2, 1));  // does not wait
  char now = 0;
  OK(cudaMemcpyAsync(&now, device, 1, cudaMemcpyDeviceToHost, stream));
  CHECK(now == 1);
  gate.open = true;
  OK(cudaDeviceSynchronize());
  CHECK(*device == 2);
  OK(cudaFree(device));
}

void test_memory_is_limited_and_not_cleared() {
  size_t free = 0, total = 0;
  const auto before = counters().allocations.load();
  char* half = allocate(machine().memory_bytes / 2);
  CHECK(half[0] != 0 && counters().allocations == before + 1);
  OK(cudaMemGetInfo(&free, &total));
  CHECK(total == machine().memory_bytes && free == total / 2);
  void* more = nullptr;
  CHECK(cudaMalloc(&more, free + 1) == cudaErrorMemoryAllocation && !more);
  OK(cudaSetDevice(1));
  char* other = allocate(1000);  // has room of its own
  OK(cudaSetDevice(0));
  cudaPointerAttributes attributes;
  OK(cudaPointerGetAttributes(&attributes, other + 999));
  CHECK(attributes.type == cudaMemoryTypeDevice && attributes.device == 1);
  OK(cudaFree(half));
  OK(cudaFree(other));
  OK(cudaFree(nullptr));
  CHECK(counters().allocations == before);
  cudaGetLastError();
}

void test_registered_memory() {
  std::vector<char> host(10000);
  void* device = nullptr;
  CHECK(cudaHostGetDevicePointer(&device, host.data(), 0) == cudaErrorInvalidValue);
  OK(cudaHostRegister(host.data(), host.size(), cudaHostRegisterMapped));
  CHECK(cudaHostRegister(host.data() + 5000, 10, 0) == cudaErrorHostMemoryAlreadyRegistered);
  OK(cudaHostGetDevicePointer(&device, host.data() + 5, 0));
  CHECK(device == host.data() + 5);
  cudaPointerAttributes attributes;
  OK(cudaPointerGetAttributes(&attributes, host.data()));
  CHECK(attributes.type == cudaMemoryTypeHost && attributes.devicePointer == host.data());
  OK(cudaHostUnregister(host.data()));
  CHECK(cudaHostUnregister(host.data()) == cudaErrorHostMemoryNotRegistered);
  OK(cudaPointerGetAttributes(&attributes, host.data()));
  CHECK(attributes.type == cudaMemoryTypeUnregistered && !attributes.devicePointer);
  machine().host_register = cudaErrorNotSupported;
  CHECK(cudaHostRegister(host.data(), host.size(), 0) == cudaErrorNotSupported);
  machine().host_register = cudaSuccess;
  stand_in::adopt_memory(host.data(), host.size(), 1);
  OK(cudaPointerGetAttributes(&attributes, host.data()));
  CHECK(attributes.type == cudaMemoryTypeDevice && attributes.device == 1);
  stand_in::forget_memory(host.data());
  cudaGetLastError();
}

void test_free_waits_for_the_device() {
  StreamOf stream(0);
  Gate gate;
  char* memory = allocate(64);
  std::atomic<bool> freed{false};
  OK(launch(gate.body, stream));
  std::thread thread([&] {
    OK(cudaFree(memory));
    freed = true;
  });
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  CHECK(!freed);
  gate.open = true;
  thread.join();
}

// ---- two processes -----------------------------------------------------------------------------------------------

std::string hex(const cudaIpcMemHandle_t& handle) {
  std::string text;
  for (unsigned char byte : handle.reserved) {
    char two[3];
    std::snprintf(two, sizeof two, "%02x", byte);
    text += two;
  }
  return text;
}

// arguments: handle, device, what to do afterwards. Its result: the error of the opening.
int scene_import(const std::vector<std::string>& arguments) {
  cudaIpcMemHandle_t handle;
  for (size_t i = 0; i < sizeof handle; ++i)
    handle.reserved[i] = char(std::stoi(arguments.at(0).substr(2 * i, 2), nullptr, 16));
  OK(cudaSetDevice(std::stoi(arguments.at(1))));
  void *opened = nullptr, *again = nullptr;
  const cudaError_t error = cudaIpcOpenMemHandle(&opened, handle, cudaIpcMemLazyEnablePeerAccess);
  if (error != cudaSuccess) return error;
  OK(cudaIpcOpenMemHandle(&again, handle, cudaIpcMemLazyEnablePeerAccess));
  CHECK(again == opened && counters().imports == 1);
  char* const bytes = static_cast<char*>(opened);
  CHECK(bytes[0] == 42);
  OK(cudaMemset(bytes + 9999, 43, 1));
  OK(cudaIpcCloseMemHandle(again));
  OK(cudaDeviceSynchronize());
  CHECK(bytes[9999] == 43);
  if (arguments.at(2) == "close") OK(cudaIpcCloseMemHandle(opened));
  if (arguments.at(2) == "die") kill(getpid(), SIGKILL);
  if (arguments.at(2) == "stay") {  // until the parent closes its end
    std::fputs("here\n", stderr);
    for (char c; read(STDIN_FILENO, &c, 1) > 0;) {
    }
  }
  return finish();
}

void test_memory_crosses_processes() {
  char* memory = allocate(10000);
  cudaIpcMemHandle_t handle;
  OK(cudaIpcGetMemHandle(&handle, memory + 5000));  // of the whole
  void* opened = nullptr;
  CHECK(cudaIpcOpenMemHandle(&opened, handle, cudaIpcMemLazyEnablePeerAccess) == cudaErrorDeviceUninitialized);
  const auto imported = [&](const char* device, const char* then, const char* described) {
    memory[0] = 42;
    memory[9999] = 0;
    return play({"import", hex(handle), device, then}, described);
  };
  CHECK(imported("0", "close", "").well() && memory[9999] == 43);
  CHECK(imported("1", "close", "").well() && memory[9999] == 43);
  CHECK(imported("1", "leave", "").well() && memory[9999] == 43);
  CHECK(WTERMSIG(imported("1", "die", "").status) == SIGKILL && memory[9999] == 43);
  CHECK(imported("1", "close", "peers=drop").well() && memory[9999] == 0);
  CHECK(imported("0", "close", "peers=drop").well() && memory[9999] == 43);  // no peer: the same device
  CHECK(imported("0", "close", "peers=drop,visible=1").well() && memory[9999] == 0);
  CHECK(WEXITSTATUS(imported("1", "", "peers=none").status) == cudaErrorPeerAccessUnsupported);
  CHECK(WEXITSTATUS(imported("0", "", "ipc=fail").status) == (cudaErrorNotSupported & 0xff));
  CHECK(imported("0", "close", "").well());
  OK(cudaFree(memory));      // those who left or died have nothing open
  memory = allocate(10000);  // behind the same descriptor number
  CHECK(WEXITSTATUS(play({"import", hex(handle), "0", ""}).status) == (cudaErrorInvalidResourceHandle & 0xff));
  OK(cudaFree(memory));
  cudaGetLastError();
}

void test_peer_access() {
  int can = -1;
  OK(cudaDeviceCanAccessPeer(&can, 0, 1));
  CHECK(can == 1);
  OK(cudaDeviceEnablePeerAccess(1, 0));
  CHECK(cudaDeviceEnablePeerAccess(1, 0) == cudaErrorPeerAccessAlreadyEnabled);
  OK(cudaDeviceDisablePeerAccess(1));
  machine().says[0][1] = false;
  OK(cudaDeviceCanAccessPeer(&can, 0, 1));
  CHECK(can == 0 && cudaDeviceEnablePeerAccess(1, 0) == cudaErrorPeerAccessUnsupported);
  machine().says[0][1] = true;
  cudaGetLastError();
}

// ---- graphs ------------------------------------------------------------------------------------------------------

// What begins on one stream, with an empty fork to the other.
struct Captured {
  Captured() {
    OK(cudaStreamBeginCapture(one, cudaStreamCaptureModeGlobal));
    OK(cudaEventRecord(fork, one));
    OK(cudaStreamWaitEvent(two, fork, 0));
  }
  void join() {
    OK(cudaEventRecord(back, two));
    OK(cudaStreamWaitEvent(one, back, 0));
  }
  cudaError_t end() { return cudaStreamEndCapture(one, &graph); }
  ~Captured() {
    if (graph) OK(cudaGraphDestroy(graph));
    cudaGetLastError();
  }
  StreamOf one{0}, two{0};
  EventOf fork, back;
  cudaGraph_t graph = nullptr;
};

void test_a_graph_is_replayed() {
  const auto graphs = counters().graphs + counters().graph_execs;
  std::atomic<int> sum{0}, met{0};
  char input = 0, *device = allocate(8);
  const Body meet = [&](unsigned, unsigned) {  // both branches run at once
    const int mine = ++met;
    CHECK(eventually([&] { return met >= (mine + 1) / 2 * 2; }));
  };
  {
    Captured c;
    OK(launch(meet, c.one));
    OK(launch(meet, c.two));
    OK(launch_add(sum, 5, c.two));
    OK(cudaMemsetAsync(device, 9, 8, c.two));
    OK(cudaMemcpyAsync(device, &input, 1, cudaMemcpyHostToDevice, c.two));  // is read by each replay
    cudaStreamCaptureStatus status{};
    OK(cudaStreamIsCapturing(c.two, &status));
    CHECK(status == cudaStreamCaptureStatusActive);
    c.join();
    OK(launch_add(sum, 100, c.one));
    OK(c.end());
    OK(cudaStreamIsCapturing(c.two, &status));
    CHECK(status == cudaStreamCaptureStatusNone && met == 0 && sum == 0);
    cudaGraphExec_t exec = nullptr;
    OK(cudaGraphInstantiate(&exec, c.graph, 0));
    for (int replay = 1; replay <= 3; ++replay) {
      OK(cudaMemset(device, 0, 8));
      OK(cudaDeviceSynchronize());
      input = char(10 * replay);
      OK(cudaGraphLaunch(exec, c.two));
      OK(cudaStreamSynchronize(c.two));
      CHECK(met == 2 * replay && sum == 105 * replay && device[7] == 9 && device[0] == input);
    }
    OK(cudaGraphLaunch(exec, c.one));
    OK(cudaGraphExecDestroy(exec));  // still runs
    OK(cudaStreamSynchronize(c.one));
    CHECK(sum == 420);
  }
  OK(cudaFree(device));
  CHECK(counters().graphs + counters().graph_execs == graphs);
}

void test_what_spoils_a_capture() {
  std::atomic<int> sum{0};
  using Spoil = std::function<cudaError_t(Captured&)>;
  EventOf uncaptured;
  StreamOf busy(0);
  OK(cudaEventRecord(uncaptured, busy));
  void* p = nullptr;
  const std::pair<Spoil, cudaError_t> spoilers[] = {
      {[&](Captured&) { return cudaMalloc(&p, 1); }, cudaErrorStreamCaptureUnsupported},
      {[&](Captured&) { return cudaDeviceSynchronize(); }, cudaErrorStreamCaptureUnsupported},
      {[&](Captured&) { return cudaEventQuery(uncaptured); }, cudaErrorStreamCaptureUnsupported},
      {[&](Captured& c) { return cudaStreamSynchronize(c.two); }, cudaErrorStreamCaptureUnsupported},
      {[&](Captured& c) { return cudaStreamWaitEvent(c.two, uncaptured, 0); }, cudaErrorStreamCaptureIsolation},
      {[&](Captured& c) { return cudaStreamWaitEvent(nullptr, c.fork, 0); }, cudaErrorStreamCaptureImplicit},
  };
  for (const auto& [spoil, error] : spoilers) {
    Captured c;
    CHECK(spoil(c) == error);
    CHECK(launch_add(sum, 1, c.one) == cudaErrorStreamCaptureInvalidated);
    CHECK(c.end() == cudaErrorStreamCaptureInvalidated && !c.graph);
    OK(launch_add(sum, 1, c.one));
    OK(cudaStreamSynchronize(c.one));
  }
  CHECK(sum == 6);
}

void test_captures_must_be_joined_and_apart() {
  std::atomic<int> sum{0};
  {
    Captured c;
    OK(launch_add(sum, 1, c.two));
    CHECK(c.end() == cudaErrorStreamCaptureUnjoined);
  }
  {
    Captured c;
    OK(launch_add(sum, 1, c.two));
    c.join();
    OK(c.end());
    CHECK(cudaEventQuery(c.fork) == cudaErrorCapturedEvent);
    CHECK(cudaStreamWaitEvent(c.one, c.fork, 0) == cudaErrorCapturedEvent);
  }
  {
    Captured c, d;
    CHECK(cudaStreamWaitEvent(c.one, d.fork, 0) == cudaErrorStreamCaptureMerge);
    CHECK(c.end() == cudaErrorStreamCaptureInvalidated && d.end() == cudaErrorStreamCaptureInvalidated);
  }
  {
    Captured c;
    CHECK(cudaStreamBeginCapture(c.two, cudaStreamCaptureModeGlobal) == cudaErrorIllegalState);
    CHECK(cudaStreamBeginCapture(nullptr, cudaStreamCaptureModeGlobal) == cudaErrorStreamCaptureUnsupported);
    c.join();
    OK(c.end());
  }
  CHECK(sum == 0);
}

void test_threads_and_capture_modes() {
  const auto asks_elsewhere = [](bool relaxed) {
    cudaError_t error{};
    std::thread([&] {
      auto mode = cudaStreamCaptureModeRelaxed;
      if (relaxed) OK(cudaThreadExchangeStreamCaptureMode(&mode));
      error = cudaStreamQuery(nullptr);
    }).join();
    return error;
  };
  for (const bool relaxed : {true, false}) {
    Captured c;
    CHECK(asks_elsewhere(relaxed) == (relaxed ? cudaSuccess : cudaErrorStreamCaptureUnsupported));
    if (relaxed) c.join();
    CHECK(c.end() == (relaxed ? cudaSuccess : cudaErrorStreamCaptureInvalidated));
  }
  StreamOf stream(0);
  cudaGraph_t graph = nullptr;
  OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  CHECK(asks_elsewhere(false) == cudaSuccess);
  cudaError_t elsewhere{};
  std::thread([&] { elsewhere = cudaStreamEndCapture(stream, &graph); }).join();
  CHECK(elsewhere == cudaErrorStreamCaptureWrongThread);
  OK(cudaStreamEndCapture(stream, &graph));
  OK(cudaGraphDestroy(graph));
}

// ---- the machine -------------------------------------------------------------------------------------------------

void test_what_devices_say() {
  int count = 0, value = 0;
  OK(cudaGetDeviceCount(&count));
  CHECK(count == machine().devices);
  OK(cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, 1));
  CHECK(value == machine().sms);
  CHECK(cudaDeviceGetAttribute(&value, cudaDevAttrCooperativeLaunch, count) == cudaErrorInvalidDevice);
  CHECK(cudaSetDevice(count) == cudaErrorInvalidDevice);
  cudaDeviceProp zero, one;
  OK(cudaGetDeviceProperties(&zero, 0));
  OK(cudaGetDeviceProperties(&one, 1));
  CHECK(std::memcmp(&zero.uuid, &one.uuid, sizeof zero.uuid) != 0 && zero.pciBusID != one.pciBusID);
  machine().visible = {1, 0};
  cudaDeviceProp swapped;
  OK(cudaGetDeviceProperties(&swapped, 1));
  CHECK(std::memcmp(&zero.uuid, &swapped.uuid, sizeof zero.uuid) == 0);
  machine().visible.clear();
  char bus[16];
  OK(cudaDeviceGetPCIBusId(bus, sizeof bus, 1));
  CHECK(std::string(bus) == "0000:11:00.0");
  CHECK(std::string(cudaGetErrorName(cudaErrorNoDevice)) == "cudaErrorNoDevice");
  CHECK(std::string(cudaGetErrorString(cudaErrorMemoryAllocation)) == "out of memory");
  cudaGetLastError();
}

void test_errors_that_are_planted() {
  int count = 0;
  cudaGetLastError();
  machine().driver = cudaErrorInsufficientDriver;
  CHECK(cudaGetDeviceCount(&count) == cudaErrorInsufficientDriver);
  machine().driver = cudaSuccess;
  CHECK(cudaPeekAtLastError() == cudaErrorInsufficientDriver && cudaGetLastError() == cudaErrorInsufficientDriver);
  CHECK(cudaGetLastError() == cudaSuccess);
  machine().sticky = cudaErrorIllegalAddress;
  CHECK(cudaDeviceSynchronize() == cudaErrorIllegalAddress && cudaFree(nullptr) == cudaErrorIllegalAddress);
  CHECK(cudaGetLastError() == cudaErrorIllegalAddress && cudaGetLastError() == cudaErrorIllegalAddress);
  machine().sticky = cudaSuccess;
  cudaGetLastError();
}

void test_the_log() {
  StreamOf stream(0);
  const Body nothing = [](unsigned, unsigned) {};
  machine().log = true;
  OK(cudaFree(allocate(1)));
  OK(launch(nothing, stream, 2));
  OK(cudaStreamSynchronize(stream));
  machine().log = false;
  const std::vector<std::string> expected = {"cudaMalloc", "cudaFree", "cudaLaunchKernelExC", "cudaStreamSynchronize"};
  CHECK(stand_in::log() == expected);
  const auto launches = stand_in::launches();
  CHECK(launches.size() == 1 && launches[0].key == &kBodyKernel && launches[0].grid == 2);
  CHECK(launches.at(0).threads == kThreads && launches[0].device == 0 && launches[0].cooperative);
  CHECK(launches.at(0).sync_domain == cudaLaunchMemSyncDomainRemote);
  stand_in::clear_log();
  CHECK(stand_in::log().empty() && stand_in::launches().empty());
}

void test_a_forked_child_cannot_go_on() {
  OK(cudaDeviceSynchronize());
  const pid_t child = fork();
  if (child == 0) {
    int count = 0;
    _exit(cudaGetDeviceCount(&count) == cudaErrorInitializationError && cudaFree(nullptr) != cudaSuccess ? 0 : 1);
  }
  int status = -1;
  CHECK(waitpid(child, &status, 0) == child && status == 0);
}

// ---- misuse ------------------------------------------------------------------------------------------------------

void free_while_imported() {
  char* memory = allocate(10000);
  memory[0] = 42;
  cudaIpcMemHandle_t handle;
  OK(cudaIpcGetMemHandle(&handle, memory));
  int words[2], silence[2];
  if (pipe2(words, O_CLOEXEC) != 0 || pipe2(silence, O_CLOEXEC) != 0) return;
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, silence[0], STDIN_FILENO);
  posix_spawn_file_actions_adddup2(&actions, words[1], STDERR_FILENO);
  const std::string text = hex(handle);
  std::string arguments[] = {"test_stand_in", "import", text, "0", "stay"};
  std::vector<char*> argv;
  for (auto& argument : arguments) argv.push_back(argument.data());
  argv.push_back(nullptr);
  pid_t pid = -1;
  posix_spawn(&pid, "/proc/self/exe", &actions, nullptr, argv.data(), environ);
  char said[8];
  if (read(words[0], said, 5) != 5) return;
  cudaFree(memory);  // the child's input ends with this process
}

const std::map<std::string, std::pair<std::function<void()>, const char*>>& misuses() {
  static const std::map<std::string, std::pair<std::function<void()>, const char*>> all = {
      {"free twice",
       {[] {
          char* memory = allocate(10);
          cudaFree(memory);
          cudaFree(memory);
        },
        "was freed before"}},
      {"free in the middle", {[] { cudaFree(allocate(10) + 1); }, "does not come from cudaMalloc"}},
      {"free what is imported", {free_while_imported, "has imported and not closed"}},
      {"write past the end",
       {[] {
          char* memory = allocate(10);
          memory[10] = 0;
          cudaFree(memory);
        },
        "behind the end"}},
      {"copy past the end", {[] { cudaMemcpy(allocate(10), "0123456789", 11, cudaMemcpyDefault); }, "past the end"}},
      {"copy to unknown memory",
       {[] {
          char host[4] = {};
          cudaMemcpy(host, "abc", 3, cudaMemcpyHostToDevice);
        },
        "neither device nor registered"}},
      {"copy from freed memory",
       {[] {
          char host[4], *memory = allocate(4);
          cudaFree(memory);
          cudaMemcpy(host, memory, 4, cudaMemcpyDefault);
        },
        "was freed"}},
      {"replay into freed memory",
       {[] {
          char* memory = allocate(4);
          cudaStream_t stream = nullptr;
          cudaGraph_t graph = nullptr;
          cudaGraphExec_t exec = nullptr;
          cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
          cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal);
          cudaMemsetAsync(memory, 0, 4, stream);
          cudaStreamEndCapture(stream, &graph);
          cudaGraphInstantiate(&exec, graph, 0);
          cudaFree(memory);
          cudaGraphLaunch(exec, stream);
          cudaStreamSynchronize(stream);
        },
        "cudaMemsetAsync: "}},
      {"destroy an event twice",
       {[] {
          cudaEvent_t event = nullptr;
          cudaEventCreate(&event);
          cudaEventDestroy(event);
          cudaEventDestroy(event);
        },
        "after cudaEventDestroy"}},
      {"use a destroyed stream",
       {[] {
          cudaStream_t stream = nullptr;
          cudaStreamCreate(&stream);
          cudaStreamDestroy(stream);
          cudaStreamQuery(stream);
        },
        "after cudaStreamDestroy"}},
      {"close twice", {[] { cudaIpcCloseMemHandle(allocate(1)); }, "does not come from cudaIpcOpenMemHandle"}},
  };
  return all;
}

void test_misuse_is_fatal() {
  for (const auto& [name, misuse] : misuses())
    if (!CHECK(play({"misuse", name}).aborted_with(misuse.second))) std::fprintf(stderr, "  %s\n", name.c_str());
  CHECK(play({"nothing"}, "sms=4,colour=red").aborted_with("colour"));
  CHECK(play({"nothing"}, "peers=some").aborted_with("expected all|none|drop"));
  CHECK(play({"nothing"}, "sms=4,peers=none,capability=8.0,memory_mib=9").well());
}

void test_the_end_of_the_process() {
  CHECK(play({"exit", "soon"}, "exit_deadline_s=30").well());
  CHECK(play({"exit", "never"}, "exit_deadline_s=1").aborted_with("kernel of 3 CTAs on device 0"));
}

// A kernel runs, and behind it waits what never begins.
int scene_exit(const std::string& when) {
  static const Body run = [never = when == "never"](unsigned, unsigned) {
    std::this_thread::sleep_for(never ? std::chrono::hours(1) : std::chrono::milliseconds(100));
  };
  static const Body unreachable = [](unsigned, unsigned) { _exit(3); };
  static std::atomic<bool> begun{false};
  cudaStream_t stream = nullptr;
  OK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  OK(cudaLaunchHostFunc(stream, [](void*) { begun = true; }, nullptr));
  OK(launch(run, stream, 3));
  OK(launch(unreachable, stream));
  CHECK(eventually([] { return begun.load(); }));
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  return finish();
}

int play_scene(const std::vector<std::string>& arguments) {
  const rlimit no_core{0, 0};
  setrlimit(RLIMIT_CORE, &no_core);
  const std::string& scene = arguments[0];
  int count = 0;
  if (scene == "nothing") return cudaGetDeviceCount(&count) == cudaSuccess ? 0 : 1;
  if (scene == "import") return scene_import({arguments.begin() + 1, arguments.end()});
  if (scene == "exit") return scene_exit(arguments.at(1));
  if (scene == "misuse") misuses().at(arguments.at(1)).first();
  return 2;
}

}  // namespace

int main(int argc, char** argv) {
  alarm(argc > 1 ? 60 : 240);
  register_kernels();
  if (argc > 1) return play_scene({argv + 1, argv + argc});
  test_a_stream_is_in_order_and_asynchronous();
  test_events_order_streams();
  test_a_wait_is_for_what_was_recorded_by_then();
  test_times_between_events();
  test_the_legacy_stream_and_the_others();
  test_host_functions_may_not_call_the_runtime();
  test_all_ctas_of_a_launch_are_there_at_once();
  test_a_launch_waits_until_it_fits();
  test_a_launch_that_is_not_cooperative_takes_what_room_there_is();
  test_launches_that_fail();
  test_copies();
  test_a_free_stream_overtakes_memset();
  test_memory_is_limited_and_not_cleared();
  test_registered_memory();
  test_free_waits_for_the_device();
  test_memory_crosses_processes();
  test_peer_access();
  test_a_graph_is_replayed();
  test_what_spoils_a_capture();
  test_captures_must_be_joined_and_apart();
  test_threads_and_capture_modes();
  test_what_devices_say();
  test_errors_that_are_planted();
  test_the_log();
  test_a_forked_child_cannot_go_on();
  test_misuse_is_fatal();
  test_the_end_of_the_process();
  return finish();
}
