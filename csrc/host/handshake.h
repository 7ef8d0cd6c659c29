// The handshake of two ranks: its bytes, and how they are sent and received together with a descriptor. Knows nothing
// of who is asked and when (rendezvous.h).
#pragma once
#include <sys/types.h>

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "../error.h"
#include "unique_fd.h"

namespace dpcomm {

using Secret = std::array<uint8_t, 32>;

// What travels with each rank's memory descriptor (SCM_RIGHTS). The secret lies in [0, 32) in every version: it decides
// whether the rest is a colleague's mistake or a stranger's noise.
struct Handshake {
  static constexpr uint32_t kMagic = 0x6d637064;  // "dpcm"
  static constexpr uint32_t kVersion = 1;

  Secret secret;
  uint32_t magic;
  uint32_t version;
  int32_t rank;
  int32_t nranks;
  uint64_t memory_bytes;
  uint64_t reserved;  // zero
};
static_assert(sizeof(Handshake) == 64);

// A fresh socket's buffer takes the few bytes whole: it never blocks.
void send_handshake(int socket, const Handshake& handshake, int memory_fd, int to_rank);

Error lost(int rank, const std::string& what);  // Error(peer_lost) "rank 3 ..."

using Clock = std::chrono::steady_clock;

// One handshake as it arrives: in any portions, with any descriptors.
struct Incoming {
  UniqueFd socket;
  pid_t pid = -1;
  std::string who;                                        // for messages
  Clock::time_point deadline = Clock::time_point::max();  // for the rest, once it has begun
  std::array<uint8_t, sizeof(Handshake) + 1> bytes{};     // one more: to notice a longer one
  size_t received = 0;
  std::vector<UniqueFd> descriptors;
  bool closed = false;

  bool complete() const { return received >= sizeof(Handshake); }
  bool carries(const Secret& secret) const;
  Handshake handshake() const;
  // Reads until `wanted` bytes are there, the socket is empty, or it is closed.
  void read(size_t wanted);

 private:
  ssize_t read_once(size_t wanted);
};

}  // namespace dpcomm
