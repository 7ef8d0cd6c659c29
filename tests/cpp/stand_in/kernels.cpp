// Kernels and their launch. A CTA is a thread of a pool; a device runs as many at once as its machine says.
#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "state.h"

namespace stand_in {
namespace {

// Threads that are idle wait here for the next CTA. It never refuses: CTAs of a launch wait for each other.
struct Pool {
  std::mutex mutex;
  std::condition_variable wake;
  std::deque<std::function<void()>> tasks;
  std::vector<std::thread> threads;
  size_t idle = 0;
  bool stopping = false;
};

Pool& pool() {
  static Pool* const only = new Pool;
  return *only;
}

void serve() {
  Pool& p = pool();
  std::unique_lock lock(p.mutex);
  for (;;) {
    ++p.idle;
    p.wake.wait(lock, [&] { return p.stopping || !p.tasks.empty(); });
    --p.idle;
    if (p.tasks.empty()) return;
    auto task = std::move(p.tasks.front());
    p.tasks.pop_front();
    lock.unlock();
    task();
    task = nullptr;
    lock.lock();
  }
}

}  // namespace

void in_background(std::function<void()> body) {
  Pool& p = pool();
  std::unique_lock lock(p.mutex);
  p.tasks.push_back(std::move(body));
  if (p.tasks.size() > p.idle) p.threads.push_back(start_thread(serve));
  p.wake.notify_one();
}

void in_parallel(unsigned count, const std::function<void(unsigned)>& body) {
  std::mutex mutex;
  std::condition_variable ended;
  unsigned left = count;
  for (unsigned i = 0; i < count; ++i)
    in_background([&, i] {
      body(i);
      std::unique_lock lock(mutex);
      if (--left == 0) ended.notify_all();  // under the mutex: it is gone as soon as the waiter has seen zero
    });
  std::unique_lock lock(mutex);
  ended.wait(lock, [&] { return left == 0; });
}

void join_pool() {
  Pool& p = pool();
  {
    std::unique_lock lock(p.mutex);
    p.stopping = true;
    p.wake.notify_all();
  }
  for (auto& thread : p.threads) thread.join();
}

void register_kernel(const void* key, Kernel kernel, int threads, size_t param_bytes) {
  State& s = state();
  std::unique_lock lock(s.mutex);
  s.functions[key] = std::make_shared<const Function>(Function{std::move(kernel), threads, param_bytes});
}

namespace {

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// One launch: what a stream, or a graph again and again, runs.
struct Grid {
  std::shared_ptr<const Function> function;
  std::shared_ptr<void> parameter;
  Launch launch;
  unsigned capacity;  // CTAs that the device runs at once

  // All CTAs of a cooperative launch are there at once; others come in waves, as many as there is room for.
  void operator()() const {
    note();
    for (unsigned first = 0, count; first < launch.grid; first += count) {
      count = take(launch.grid - first);
      if (count == 0) return;
      in_parallel(count, [&](unsigned i) {
        current_device() = launch.device;
        in_device_code() = true;
        void* params[] = {parameter.get()};
        function->kernel(params, first + i, launch.grid);
        in_device_code() = false;
      });
      give_back(count);
    }
  }

 private:
  void note() const {
    State& s = state();
    std::unique_lock lock(s.mutex);
    if (machine().log) s.launches.push_back(launch);
    ++counters().launches;
  }
  // Of `left` CTAs as many as run now; 0: the process exits.
  unsigned take(unsigned left) const {
    State& s = state();
    unsigned& resident = s.resident[static_cast<size_t>(launch.device)];
    const unsigned least = launch.cooperative ? left : 1;
    std::unique_lock lock(s.mutex);
    s.changed.wait(lock, [&] { return s.stopping || resident + least <= capacity; });
    if (s.stopping) return 0;
    const unsigned count = std::min(left, capacity - resident);
    resident += count;
    return count;
  }
  void give_back(unsigned count) const {
    State& s = state();
    std::unique_lock lock(s.mutex);
    s.resident[static_cast<size_t>(launch.device)] -= count;
    s.changed.notify_all();
  }
};

unsigned threads_of(dim3 size) { return size.x * size.y * size.z; }

std::shared_ptr<const Function> find_function(const void* key) {
  State& s = state();
  std::unique_lock lock(s.mutex);
  const auto found = s.functions.find(key);
  return found == s.functions.end() ? nullptr : found->second;
}

cudaError_t read_attributes(const cudaLaunchConfig_t& config, Launch& launch) {
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config.attrs[i];
    if (attribute.id == cudaLaunchAttributeCooperative)
      launch.cooperative = attribute.val.cooperative != 0;
    else if (attribute.id == cudaLaunchAttributeMemSyncDomain)
      launch.sync_domain = attribute.val.memSyncDomain;
    else if (attribute.id != cudaLaunchAttributePriority && attribute.id != cudaLaunchAttributeIgnore)
      die("cudaLaunchKernelExC: the stand-in does not know attribute %d", int(attribute.id));
  }
  return cudaSuccess;
}

cudaError_t check_size(const Function& function, const Launch& launch, unsigned capacity) {
  if (launch.grid == 0 || launch.threads == 0 || launch.threads > 1024) return cudaErrorInvalidConfiguration;
  if (launch.threads > unsigned(function.threads) || capacity == 0) return cudaErrorLaunchOutOfResources;
  return launch.cooperative && launch.grid > capacity ? cudaErrorCooperativeLaunchTooLarge : cudaSuccess;
}

cudaError_t launch_kernel(const cudaLaunchConfig_t& config, const void* key, void** args) {
  const Machine& m = machine();
  const cudaError_t planted = m.launch;
  if (planted != cudaSuccess) return planted;
  if (m.no_kernel_image) return cudaErrorNoKernelImageForDevice;
  const auto function = find_function(key);
  if (!function) return cudaErrorInvalidDeviceFunction;
  Launch launch{key, threads_of(config.gridDim), threads_of(config.blockDim), current_device(), false, 0};
  const cudaError_t unknown = read_attributes(config, launch);
  if (unknown != cudaSuccess) return unknown;
  const auto capacity = static_cast<unsigned>(m.sms * m.blocks_per_sm);
  const cudaError_t too_large = check_size(*function, launch, capacity);
  if (too_large != cudaSuccess) return too_large;
  {
    std::unique_lock lock(state().mutex);
    const Stream* stream = find_stream(config.stream);
    if (!stream || stream->device != current_device()) return cudaErrorInvalidResourceHandle;
  }
  const size_t bytes = (function->param_bytes + 63) / 64 * 64 + 64;
  std::shared_ptr<void> parameter(std::aligned_alloc(64, bytes), Free{});
  if (function->param_bytes) std::memcpy(parameter.get(), args[0], function->param_bytes);
  const std::string what =
      "kernel of " + std::to_string(launch.grid) + " CTAs on device " + std::to_string(launch.device);
  return submit(config.stream, {what, Grid{function, parameter, launch, capacity}, {}});
}

}  // namespace
}  // namespace stand_in

using namespace stand_in;

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** args) {
  return call("cudaLaunchKernelExC", Rule::plain, [&] { return launch_kernel(*config, function, args); });
}

cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** args, size_t shared,
                             cudaStream_t stream) {
  const cudaLaunchConfig_t config{grid, block, shared, stream, nullptr, 0};
  return call("cudaLaunchKernel", Rule::plain, [&] { return launch_kernel(config, function, args); });
}

cudaError_t cudaLaunchCooperativeKernel(const void* function, dim3 grid, dim3 block, void** args, size_t shared,
                                        cudaStream_t stream) {
  cudaLaunchAttribute cooperative{};
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  const cudaLaunchConfig_t config{grid, block, shared, stream, &cooperative, 1};
  return call("cudaLaunchCooperativeKernel", Rule::plain, [&] { return launch_kernel(config, function, args); });
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* key) {
  return call("cudaFuncGetAttributes", Rule::plain, [&] {
    if (machine().no_kernel_image) return cudaErrorNoKernelImageForDevice;
    const auto function = find_function(key);
    if (!function) return cudaErrorInvalidDeviceFunction;
    *attributes = {};
    attributes->maxThreadsPerBlock = function->threads;
    attributes->numRegs = 65536 / std::max(function->threads, 256);
    attributes->binaryVersion = attributes->ptxVersion = machine().major * 10 + machine().minor;
    return cudaSuccess;
  });
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* key, int threads, size_t) {
  return call("cudaOccupancyMaxActiveBlocksPerMultiprocessor", Rule::plain, [&] {
    if (machine().no_kernel_image) return cudaErrorNoKernelImageForDevice;
    const auto function = find_function(key);
    if (!function) return cudaErrorInvalidDeviceFunction;
    *blocks = threads <= function->threads ? machine().blocks_per_sm : 0;
    return cudaSuccess;
  });
}
