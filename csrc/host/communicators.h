// The communicators of this process, for one question: a peer that does not come to a call of one of them, has it begun
// a call of another that this rank has not made? Then the two make calls in different orders, and wait for each other.
#pragma once
#include <cstdint>
#include <functional>
#include <string>

#include "failure_text.h"

namespace dpcomm {

// One of them, as long as it lives.
class KnownCommunicator {
 public:
  // text: what its engine knows; may be called from any thread until this is destroyed.
  explicit KnownCommunicator(std::function<FailureText()> text);
  ~KnownCommunicator();
  KnownCommunicator(const KnownCommunicator&) = delete;

 private:
  const uint64_t generation_;  // of the process; a forked child leaves the list alone
  uint64_t number_;
};

// "it has begun call 3 of communicator ab12, which ..."; empty where no other communicator knows of such a call.
// `asking`: the one whose call waits. pid, host: of the peer, as FailureText has them.
std::string call_elsewhere(const FailureText& asking, int pid, const std::string& host);

}  // namespace dpcomm
