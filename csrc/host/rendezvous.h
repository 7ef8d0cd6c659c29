// How the ranks of one host find each other: abstract Unix sockets (they do not reach across network namespaces), a
// session secret, and a handshake that passes each rank's memory. Knows nothing of what the memory holds.
//
//   rank 1, 2, ...        rank 0
//   probe: connect   -->  (listens since it was constructed)
//   bind:  Handshake -->  accepts, checks            every rank does both at once, in one poll loop:
//          checks    <--  Handshake                  no rank waits for another one's turn
#pragma once
#include <sys/types.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "handshake.h"

namespace dpcomm {

using Endpoint = std::array<uint8_t, 32>;

// What a rank has of a peer afterwards.
struct Link {
  UniqueFd socket;  // non-blocking
  UniqueFd memory;
  pid_t pid = -1;  // as the kernel names it here; 0: the peer is in another PID namespace
};

class Rendezvous {
 public:
  // Listens at a name of 32 random bytes.
  Rendezvous(int rank, int nranks);

  const Endpoint& endpoint() const { return endpoint_; }

  // Connects to every lower rank: false for those that nobody listens for. Self and higher ranks count as true. Throws
  // Error(resource) for anything else that goes wrong, a rank that runs as another user included.
  std::vector<bool> probe(const std::vector<Endpoint>& endpoints);

  // Proves and passes, once, after probe: one Link per rank, [own rank] empty. Closes the listener however it ends.
  // Strangers (another user's, silent, without the secret) are dropped and counted.
  // Raises: Error(timeout) with waiting_for; Error(peer_lost) when a lower rank closes; Error(internal) when a rank
  // that has the secret contradicts what this rank knows; Error(resource).
  std::vector<Link> bind(const Secret& secret, int memory_fd, uint64_t memory_bytes, double timeout_s);

  int rejected() const { return rejected_; }                              // connections of strangers dropped
  const std::vector<std::string>& warnings() const { return warnings_; }  // about the first few of them

 private:
  class Exchange;

  int rank_, nranks_;
  Endpoint endpoint_;
  UniqueFd listener_;
  std::vector<UniqueFd> calls_;  // to each lower rank; empty where nobody answered
  int rejected_ = 0;
  std::vector<std::string> warnings_;
};

// The abstract name behind an endpoint, without its leading zero byte.
std::string abstract_name(const Endpoint& endpoint);

}  // namespace dpcomm
