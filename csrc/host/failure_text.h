// The failure word of a communicator in words: what happened, on which rank, and what to do.
#pragma once
#include <functional>
#include <string>
#include <vector>

#include "../engine.h"
#include "control.h"

namespace dpcomm {

// What an engine knows when it must explain a failure.
struct FailureText {
  int rank, nranks;
  std::string name;  // of the communicator
  double timeout_s;
  const ControlPage* control;
  std::vector<int> pids;           // by rank
  std::vector<std::string> hosts;  // by rank; empty: this host. None at all: all are on this host
  uint64_t sequence;               // calls that this rank has begun
  uint64_t uncounted;              // of them, those that users never hear of
  // What a rank announced for a call; false where it cannot be known any more.
  std::function<bool(int rank, uint32_t sequence, Header* header)> header;
  std::function<uint64_t(int rank)> last_sequence;

  // "[dpcomm:TIMEOUT] rank 0/2 comm=ab12 seq=17 allreduce(sum, float32, 4): "
  std::string prefix(Code code, const Call* call) const;
  // Where the algorithm or the codec does not serve the call.
  Error unserved(const Call& call) const;
  // `here`: the caller is told the cause itself, if it is a fact about the group; else that it was aborted, and why.
  Error explain(const Failure& failure, const Call* call, bool here) const;
  // The same for a caller that met the cause. `first`: nobody on this rank has been told it; every later call is told
  // that the communicator has been aborted. So is, of a time-out, a caller to whom it did not happen: `waited` is
  // false.
  Error met(const Failure& failure, const Call* call, bool first, bool waited) const;
  // For a time-out: whoever noticed it waited for this rank, too.
  bool was_late(const Failure& failure) const;

 private:
  uint64_t shown(uint64_t number) const { return number - uncounted; }
  std::string field_values(const Failure& failure) const;
  std::string process(int rank) const;  // "pid 4711", "pid 4711 on node3"
  std::string waiting_text(const Failure& failure, std::vector<int>* ranks) const;
};

// Sets the first cause to "rank gave up: reason", unless there is one. True if it was this one.
bool give_up_for(ControlPage& control, int rank, uint64_t sequence, const std::string& reason);

}  // namespace dpcomm
