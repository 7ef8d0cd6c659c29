// What an engine promises. Read this first.
//
// An engine moves bytes between the ranks of one communicator; the core decides which bytes are right. The queue
// (queue.h) calls one engine from one thread at a time, in the order of submission. Engines of the CPU end a call
// before they return (allreduce); engines of a device put it on the device's streams (enqueue). Every rank makes the
// same calls in the same order; an engine notices when they do not, before it writes user memory.
#pragma once
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "core/types.h"
#include "error.h"

namespace dpcomm {

// One all-reduce, in place. Addresses are aligned to the element; the caller keeps the memory alive until it is done.
struct Call {
  std::vector<char*> addresses;
  std::vector<int64_t> counts;  // elements, same length
  Dtype dtype = Dtype::float32;
  Op op = Op::sum;
  CodecKind codec = CodecKind::none;
  Algorithm algorithm = Algorithm::automatic;
  int bucket = -1;  // DDP's bucket index, compared between ranks
  // Asked at least every 100 ms while the call waits; true ends it (Ctrl-C). Empty for asynchronous calls.
  std::function<bool()> interrupted;

  std::string text() const;  // "allreduce(mean, float32, 1048576)"
};

struct Stats {
  int64_t calls = 0, input_bytes = 0;
  int64_t wire_bytes = 0;  // encoded bytes this rank handed to its transport
  double put_s = 0, reduce_s = 0, get_s = 0, wait_s = 0;
  int64_t nonfinite_groups = 0;  // encoded by this rank (its contributions and the results it owns) with a NaN or Inf
};

struct Description {
  std::string engine, simd, store;
  std::string name;  // of the communicator, as messages have it
  int64_t arena_bytes = 0, slot_bytes = 0;
  int slots = 0, channels = 1, rejected_connections = 0;
  int64_t aside_bytes = 0;  // from which size on a carrier's own all-reduce takes what no codec encodes; 0: never
  uint64_t sequence = 0;
  std::vector<int> pids;
  std::vector<std::vector<int>> hosts;  // of algorithm two_level: their ranks
  std::string intra_codec;              // inside them
  // Of a device:
  int device = -1, max_ctas = 0;
  std::string device_name, arena;  // arena: "device" or "pinned"
  std::vector<std::string> peers;  // how each rank's memory is reached
  std::string carrier;             // the library that moves messages, with its version and path
};

// A call on a device's streams. Valid as long as its engine is.
class Pending {
 public:
  virtual ~Pending() = default;
  // Makes the stream wait for the call's end. The host waits only until all ranks of this process that share the device
  // have entered the call, at most timeout_s; `interrupted` as in Call.
  virtual void join(uintptr_t stream, double timeout_s, const std::function<bool()>& interrupted) = 0;
  // The host waits for the call's end on the device; false when the time ran out first. Does not throw the call's
  // error.
  virtual bool synchronize(double timeout_s, const std::function<bool()>& interrupted) = 0;
  virtual bool done() = 0;
  virtual std::exception_ptr error() = 0;  // null while it runs
};

class Engine {
 public:
  virtual ~Engine() = default;
  virtual int rank() const = 0;
  virtual int nranks() const = 0;
  virtual bool in_forked_child() const = 0;  // then nothing but throwing ForkError is allowed

  // Calls run on a thread that serves the queue from outside (Queue::serve) and nowhere else: they may take locks that
  // the caller's thread must not wait for, such as Python's.
  virtual bool served_from_outside() const { return false; }

  // Returns with the same bytes on every rank, or throws; after a throw the communicator is poisoned on all ranks (but
  // for errors of a wrong argument) and user memory is not touched again. Never waits without a deadline.
  virtual void allreduce(const Call& call) = 0;
  // The same on a device, behind the earlier work of the caller's stream; returns without waiting for the device. What
  // fails there is thrown by a later call or by check().
  virtual std::shared_ptr<Pending> enqueue(const Call& call, uintptr_t stream);
  virtual int device() const { return -1; }       // -1: the CPU
  virtual uintptr_t stream() const { return 0; }  // that calls run on

  // Poisons the communicator on all ranks; ends a call in flight within 100 ms. Any thread.
  virtual void abort(const std::string& reason) = 0;
  // Throws the first cause, if the communicator is poisoned. Any thread.
  virtual void check() = 0;
  // Says goodbye to the peers. No call is in flight. Local and idempotent.
  virtual void close() = 0;

  virtual Stats stats(bool reset) = 0;
  virtual Description describe() = 0;
};

const char* name_of(Op);
const char* name_of(Dtype);
const char* name_of(CodecKind);
const char* name_of(Algorithm);

}  // namespace dpcomm
