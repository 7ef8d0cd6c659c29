// What tests of the stand-in for libnccl.so.2 have in common: the library, ranks that are threads, device memory.
#pragma once
#include <barrier>
#include <chrono>
#include <cstring>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "nccl/library.h"
#include "stand_in/stand_in.h"
#include "stand_in_nccl/stand_in_nccl.h"

namespace nccl_tests {

using namespace dpcomm::nccl;
using Clock = std::chrono::steady_clock;

#define OK(...) CHECK((__VA_ARGS__) == cudaSuccess)
#define DONE(...) CHECK((__VA_ARGS__) == Result::success)

inline const Api& api() {
  static const Library& library = find_library({NCCL_STAND_IN, {}});
  return library.api;
}
inline const stand_in_nccl::Control& control() {
  static const auto only = (api(), stand_in_nccl::control_of(NCCL_STAND_IN));
  return only;
}
inline int64_t counted(const char* counter, int rank = -1) { return control().count(counter, rank); }

// False: it has not come true in time.
inline bool eventually(const std::function<bool()>& holds) {
  for (const auto end = Clock::now() + std::chrono::seconds(30); Clock::now() < end;) {
    if (holds()) return true;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return false;
}
// For what must not happen: long enough that it would.
inline void a_while() { std::this_thread::sleep_for(std::chrono::milliseconds(30)); }

// ---- ranks -------------------------------------------------------------------------------------------------------

struct Rank {
  int rank, ranks;
  Comm comm = nullptr;
  cudaStream_t stream = nullptr;
  std::barrier<>& all;

  int at(int distance) const { return (rank + distance + ranks) % ranks; }
  Result state() const {
    Result error{};
    DONE(api().CommGetAsyncError(comm, &error));
    return error;
  }
  // Waits while it is in progress.
  Result settled(Result result) const {
    if (result != Result::in_progress) return result;
    CHECK(eventually([&] { return state() != Result::in_progress; }));
    return state();
  }
  bool idle() const { return cudaStreamQuery(stream) == cudaSuccess; }
  void end_group() const { DONE(settled(api().GroupEnd())); }
  void sync() const { OK(cudaStreamSynchronize(stream)); }
  void abort() {
    DONE(api().CommAbort(comm));
    comm = nullptr;
  }
};

inline UniqueId new_id() {
  UniqueId id;
  DONE(api().GetUniqueId(&id));
  return id;
}

inline Result init(Rank& r, const UniqueId& id, bool blocking) {
  Config config;
  config.blocking = blocking;
  return api().CommInitRankConfig(&r.comm, r.ranks, id, r.rank, &config);
}

// Each rank in a thread, on one of two devices. Communicators that the body has left are destroyed.
inline void with_ranks(int ranks, bool blocking, const std::function<void(Rank&)>& body) {
  const UniqueId id = new_id();
  std::barrier<> all(ranks);
  std::vector<std::thread> threads;
  for (int i = 0; i < ranks; ++i)
    threads.emplace_back([&, i] {
      Rank r{i, ranks, nullptr, nullptr, all};
      OK(cudaSetDevice(i % 2));
      OK(cudaStreamCreateWithFlags(&r.stream, cudaStreamNonBlocking));
      DONE(r.settled(init(r, id, blocking)));
      body(r);
      r.sync();
      all.arrive_and_wait();
      if (r.comm) DONE(api().CommDestroy(r.comm));
      OK(cudaStreamDestroy(r.stream));
    });
  for (auto& thread : threads) thread.join();
  CHECK(counted("comms") == 0);
}

// Device memory, which is host memory here.
template <class T>
class Memory {
 public:
  Memory(size_t count, T value = T{}) : count_(count) {
    void* p = nullptr;
    OK(cudaMalloc(&p, count * sizeof(T) + 1));
    data_ = static_cast<T*>(p);
    for (size_t i = 0; i < count; ++i) data_[i] = value;
  }
  Memory(const Memory&) = delete;
  ~Memory() { OK(cudaFree(data_)); }
  operator T*() const { return data_; }
  bool all(T value) const {
    for (size_t i = 0; i < count_; ++i)
      if (std::memcmp(&data_[i], &value, sizeof value) != 0) return false;
    return true;
  }

 private:
  size_t count_;
  T* data_;
};

struct Graph {
  Graph(const Rank& r, const std::function<void()>& body) {
    OK(cudaStreamBeginCapture(r.stream, cudaStreamCaptureModeThreadLocal));
    body();
    cudaGraph_t graph = nullptr;
    OK(cudaStreamEndCapture(r.stream, &graph));
    OK(cudaGraphInstantiate(&exec, graph, 0));
    OK(cudaGraphDestroy(graph));
  }
  void destroy() {
    if (exec) OK(cudaGraphExecDestroy(exec));
    exec = nullptr;
  }
  ~Graph() { destroy(); }
  cudaGraphExec_t exec = nullptr;
};

// stand_in_nccl_ends.cpp
void test_communicators();
void test_errors_and_aborts();
void test_what_ends_the_process();
int play_scene(const std::string& scene);  // in a child

}  // namespace nccl_tests
