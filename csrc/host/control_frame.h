// What ranks of several hosts tell each other on their control sockets, and how it is put together from the pieces in
// which a stream delivers it. Knows nothing of who decides (control_plane.h).
#pragma once
#include <sys/socket.h>

#include <cerrno>
#include <cstring>

#include "control.h"
#include "unique_fd.h"

namespace dpcomm {

struct ControlFrame {
  static constexpr uint32_t kMagic = 0x63637064;  // "dpcc"
  enum class Kind : uint32_t {
    propose = 1,  // to one rank: please decide on this cause
    decided,      // to all: this is the first cause
    goodbye       // to all: I leave
  };

  uint32_t magic;
  Kind kind;
  uint64_t failure;           // header.h, packed; a goodbye has none
  uint64_t blamed;            // a bit for each rank that the cause is about; time-out: whom it waited for
  uint64_t closed;            // 1 + the last call: of the sender of a goodbye, of the rank that closed (peer_closed)
  char reason[kReasonBytes];  // aborted: why, zero-terminated
};
static_assert(sizeof(ControlFrame) == 128);

// False for what no rank sends.
inline bool well_formed(const ControlFrame& frame, int nranks) {
  using Kind = ControlFrame::Kind;
  if (frame.magic != ControlFrame::kMagic || frame.reason[kReasonBytes - 1] != '\0') return false;
  if (nranks < 64 && frame.blamed >> nranks != 0) return false;
  if (frame.kind == Kind::goodbye) return frame.failure == 0 && frame.closed != 0;
  if (frame.kind != Kind::propose && frame.kind != Kind::decided) return false;
  const Failure f = unpack(frame.failure);
  if (f.cause == Cause::none || f.cause > Cause::internal || f.field > Field::layout) return false;
  return f.rank < nranks && f.other < nranks && (f.cause != Cause::peer_closed || frame.closed != 0);
}

enum class Piece { whole, none_yet, hung_up };

// Reads on to `bytes` of a message whose first `received` are there; never beyond it, and never waits.
inline Piece receive_rest(int socket, void* message, size_t bytes, size_t& received) {
  while (received < bytes) {
    const ssize_t n = ::recv(socket, static_cast<char*>(message) + received, bytes - received, MSG_DONTWAIT);
    if (n > 0)
      received += size_t(n);
    else if (n == 0 || (errno != EAGAIN && errno != EINTR))
      return Piece::hung_up;
    else if (errno == EAGAIN)
      return Piece::none_yet;
  }
  return Piece::whole;
}

// False where the socket has not taken it all at once. Never waits: so few bytes are ever unread by the other end that
// they find room, unless there is nobody.
inline bool send_whole(int socket, const void* message, size_t bytes) {
  ssize_t n;
  do n = ::send(socket, message, bytes, MSG_NOSIGNAL | MSG_DONTWAIT);
  while (n < 0 && errno == EINTR);
  return n == ssize_t(bytes);
}

// What the other end has sent, unread, would turn the end of a TCP connection into a reset, which may overtake a
// goodbye.
inline void hang_up(UniqueFd& socket) {
  char dropped[1024];
  ::shutdown(socket.get(), SHUT_WR);
  while (::recv(socket.get(), dropped, sizeof dropped, MSG_DONTWAIT) > 0) continue;
  socket.reset();
}

}  // namespace dpcomm
