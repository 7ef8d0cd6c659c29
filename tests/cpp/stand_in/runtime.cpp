// What every call goes through: the state, errors, the log, the end of the process.
#include <execinfo.h>
#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <utility>

#include "state.h"

namespace stand_in {
namespace {

pid_t& owner() {
  static pid_t pid = getpid();
  return pid;
}
thread_local cudaError_t last_error = cudaSuccess;

// Nothing that a worker has not begun is begun any more; what runs must end.
void stop_workers(State& s) {
  std::unique_lock lock(s.mutex);
  s.stopping = true;
  s.changed.notify_all();
  for (auto& [number, stream] : s.streams) s.destroyed.push_back(std::move(stream));
  s.streams.clear();
  s.legacy = {};
  for (auto& stream : s.destroyed) stream->wake.notify_all();
  const auto deadline = Clock::now() + std::chrono::seconds(machine().exit_deadline_s);
  const bool ended = s.changed.wait_until(lock, deadline, [&] {
    for (auto& stream : s.destroyed)
      if (stream->worker.joinable() && !stream->exited) return false;
    return true;
  });
  if (ended) return;
  std::string names;
  for (const auto& what : s.running) names += " " + what;
  die("the process exits, but this still runs after %d s:%s", int(machine().exit_deadline_s), names.c_str());
}

void shut_down() {
  if (getpid() != owner()) return;  // a forked child has none of the threads
  State& s = state();
  stop_workers(s);
  for (auto& stream : s.destroyed)
    if (stream->worker.joinable()) stream->worker.join();
  join_pool();
  release_imports();
}

}  // namespace

void die(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  char text[1024];
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  std::fprintf(stderr, "stand-in CUDA runtime: %s\n", text);
  void* frames[32];
  backtrace_symbols_fd(frames, backtrace(frames, 32), STDERR_FILENO);
  std::abort();
}

State& state() {
  static State* const only = [] {
    auto* s = new State;
    owner();
    counters();
    machine();
    std::atexit(shut_down);
    return s;
  }();
  return *only;
}

int& current_device() {
  thread_local int device = 0;
  return device;
}

bool& in_device_code() {
  thread_local bool inside = false;
  return inside;
}

Counters& counters() {
  static Counters* const only = new Counters;
  return *only;
}

std::thread start_thread(std::function<void()> body) {
  sigset_t most, before;
  sigfillset(&most);
  for (int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGTRAP}) sigdelset(&most, fault);
  pthread_sigmask(SIG_SETMASK, &most, &before);
  std::thread thread(std::move(body));
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  return thread;
}

uint64_t new_handle() { return state().next_handle += 16; }

cudaError_t begin(const char* name, Rule rule) {
  State& s = state();
  if (getpid() != owner()) return cudaErrorInitializationError;  // whoever held the mutex at the fork is gone
  const cudaError_t driver = machine().driver, sticky = machine().sticky;
  if (driver != cudaSuccess) return driver;
  if (machine().devices == 0) return cudaErrorNoDevice;
  if (rule == Rule::asks) return cudaSuccess;
  std::unique_lock lock(s.mutex);
  if (machine().log) s.log.push_back(name);
  if (s.stopping) return cudaErrorCudartUnloading;
  if (in_device_code()) return cudaErrorNotPermitted;
  if (sticky != cudaSuccess) return sticky;
  return rule == Rule::unsafe ? refuse_unsafe() : cudaSuccess;
}

cudaError_t remember(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

std::vector<std::string> log() {
  std::unique_lock lock(state().mutex);
  return state().log;
}

std::vector<Launch> launches() {
  std::unique_lock lock(state().mutex);
  return state().launches;
}

void clear_log() {
  std::unique_lock lock(state().mutex);
  state().log.clear();
  state().launches.clear();
}

}  // namespace stand_in

using namespace stand_in;

cudaError_t cudaGetLastError() {
  const cudaError_t sticky = machine().sticky;
  if (sticky != cudaSuccess) return sticky;
  return std::exchange(last_error, cudaSuccess);
}

cudaError_t cudaPeekAtLastError() {
  const cudaError_t sticky = machine().sticky;
  return sticky != cudaSuccess ? sticky : last_error;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

// There is no libcuda behind this runtime.
cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  *function = nullptr;
  *found = cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = machine().driver_version;
  return cudaSuccess;
}
