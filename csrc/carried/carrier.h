// What carries messages where ranks share no memory: somebody else's library. Knows bytes and ranks; no codec, no
// schedule.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "../core/types.h"

namespace dpcomm {

struct Transfer {
  int peer;
  char* data;
  int64_t bytes;  // more than 0
};

// How an exchange ended.
struct Arrival {
  enum class Kind : uint8_t { here, late, broken };
  Kind kind = Kind::here;
  int peer = -1;     // late: who has not sent; broken: whose connection, -1 where it is not known
  std::string text;  // broken: in the library's words
};

// What a rank sends to a peer, exchange after exchange, is what the peer receives from it, in the same order and sizes;
// in one exchange at most one message each way. Two ranks need not make the same exchanges: a message may go to a rank
// that receives it together with others. One thread calls exchange() and wait().
//
// The three patterns that algorithms use are exchanges:
//   all-to-all   a send to and a receive from every peer, each of its own bytes
//   all-gather   the same where all sends have the same bytes
//   send/recv    a send to the next rank and a receive from the previous one
class Carrier {
 public:
  virtual ~Carrier() = default;

  // Starts an exchange and returns its ticket: 0, 1, 2, ... The memory belongs to the carrier until wait() says `here`,
  // or abort() has returned. What cannot be started is broken when it is waited for.
  virtual int64_t exchange(const std::vector<Transfer>& sends, const std::vector<Transfer>& receives) = 0;

  // Whether it has an all-reduce of its own that adds up these elements.
  virtual bool adds(Dtype) const { return false; }
  // Starts that, in place, for each range of memory (`peer` says nothing), and returns a ticket as exchange() does.
  // Asked of carriers that have one only.
  virtual int64_t add(const std::vector<Transfer>&, Dtype) { return -1; }

  // Waits until all of an exchange is here and sent; tickets are waited for once each. Late: a message did not move for
  // timeout_s.
  virtual Arrival wait(int64_t ticket, double timeout_s) = 0;

  // Ends everything in flight; when it returns, the carrier no longer touches the memory of any exchange. Any thread.
  virtual void abort() = 0;

  virtual void close() = 0;  // nothing is in flight, or it has been aborted
};

}  // namespace dpcomm
