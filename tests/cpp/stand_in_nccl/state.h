// What the parts of the library share. One mutex guards everything, the bytes that move included. It may be held while
// the CUDA runtime is called; the runtime calls the library without its own.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <type_traits>
#include <vector>

#include "nccl/api.h"
#include "runtime.h"

namespace stand_in_nccl {

using dpcomm::nccl::Config;
using dpcomm::nccl::DataType;
using dpcomm::nccl::RedOp;
using dpcomm::nccl::Result;
using dpcomm::nccl::Stream;
using dpcomm::nccl::UniqueId;
using Handle = dpcomm::nccl::Comm;
using Lock = std::unique_lock<std::mutex>;

// Prints and aborts.
[[noreturn, gnu::format(printf, 1, 2)]] void die(const char* format, ...);

struct Clique;

struct Communicator {
  Handle handle = nullptr;
  std::shared_ptr<Clique> clique;
  int rank = 0, ranks = 0, device = 0;
  bool blocking = true;
  bool pending = false;    // a thread sets it up, connects peers, or finalizes it
  bool finalized = false;  // takes no more operations
  bool aborted = false, destroyed = false;
  Result error = Result::success;           // is kept
  uint64_t enqueued = 0, finished = 0;      // operations, without those of graphs
  int running = 0;                          // operations
  uint64_t reductions = 0;                  // all-reduces that have begun
  std::set<std::pair<int, int>> connected;  // from, to; {-1, -1}: all, for all-reduces
  std::atomic<int> captured{0};             // operations that graphs hold
};
using Shared = std::shared_ptr<Communicator>;

// One side of a message of an operation that runs.
struct Posting {
  Communicator* comm;
  void* address;
  size_t bytes;
  bool done = false;
};

// From one rank to another.
struct Channel {
  bool broken = false;  // a message was lost
  std::deque<Posting*> sends, receives;
};

// A rank's part of an all-reduce that runs.
struct Part {
  Communicator* comm;
  const void* from;
  void* to;
  size_t count;
  DataType type;
  RedOp op;
  bool done = false;
};

// The communicators that have the same id.
struct Clique {
  int ranks = 0;
  std::map<int, int> joined;                            // rank: its device. Those that have gone stay
  std::set<std::pair<std::pair<int, int>, int>> asked;  // connections, by whom
  std::map<std::pair<int, int>, Channel> channels;
  std::map<uint64_t, std::vector<Part*>> rounds;  // by number: the parts of all ranks, null: not there yet
};

enum class Kind { send, receive, all_reduce };

struct Call {
  Kind kind;
  Shared comm;
  const void* from;
  void* to;
  size_t count;
  DataType type;
  int peer;
  RedOp op;
  Stream stream;
};

// A group in its stream, or in a graph, which may run it again and again.
struct Work {
  Shared comm;
  std::vector<Call> calls;
  uint64_t ticket = 0;  // its number among those of the communicator; 0: of a graph
  bool captured = false;
  ~Work() {
    if (captured) --comm->captured;
  }
};

struct State {
  std::mutex mutex;
  std::condition_variable changed;
  bool stopping = false;  // the process exits
  uint64_t next_handle = 0, next_id = 0;
  std::map<Handle, Shared> comms;
  std::map<uint64_t, std::shared_ptr<Clique>> cliques;  // by number of the id
  std::set<std::string> texts;                          // whose addresses were given out
  const std::string* last_error = nullptr;
};
State& state();  // never destroyed

// What the CUDA runtime says of a call that touches the device.
cudaError_t begin(const char* call);

// Under the mutex. Ends the process when it lasts too long; `what` says who waits for what.
void wait(Lock& lock, const std::string& what, const std::function<bool()>& holds);
// Runs it in a thread of its own, on a device.
void in_background(int device, std::function<void()> body);

// ---- knobs and counters (under the mutex) ------------------------------------------------------------------------

int64_t& knob(const char* name, int rank = -1);
void count(const char* counter, int rank, int64_t more = 1);

// ---- communicators -----------------------------------------------------------------------------------------------

const char* name_of(Result result);
size_t size_of(DataType type);
// Under the mutex. Ends the process where it is none, or none any more, or not ready for `call`.
Shared find(const char* call, Handle handle, bool may_be_pending = false);
void set_error(Communicator& comm, Result error, const std::string& text);

// ---- operations --------------------------------------------------------------------------------------------------

// What a stream does.
void run(const Work& work);
// Under the mutex: takes back what operations of the communicator have posted.
void withdraw(Communicator& comm);
// All parts are there and agree: computes what each of them gets.
void reduce(const std::vector<Part*>& parts);

}  // namespace stand_in_nccl

#define STAND_IN_EXPORT extern "C" [[gnu::visibility("default")]]
// The library's function has the type that users of it declare.
#define AS_DECLARED(name) static_assert(std::is_same_v<decltype(&nccl##name), decltype(dpcomm::nccl::Api::name)>)
