#include "handshake.h"

#include <sys/socket.h>

#include <cerrno>
#include <cstring>

namespace dpcomm {
namespace {

// A rank's handshake arrives in one piece; whoever has said half of one has this long for the rest. There is no such
// limit before the first byte: a rank that is late between probe and bind is as silent as a stranger.
constexpr auto kHalfSaid = std::chrono::seconds(2);
constexpr int kMaxDescriptors = 4;  // room to receive: one is right, more are closed

// Takes as long whatever the bytes are.
bool same_secret(const uint8_t* a, const uint8_t* b) {
  unsigned differ = 0;
  for (size_t i = 0; i < sizeof(Secret); ++i) differ |= unsigned(a[i] ^ b[i]);
  return differ == 0;
}

}  // namespace

Error lost(int rank, const std::string& what) {
  Error error(Code::peer_lost, "rank " + std::to_string(rank) + " " + what);
  error.rank = rank;
  return error;
}

void send_handshake(int socket, const Handshake& handshake, int memory_fd, int to_rank) {
  iovec bytes{const_cast<Handshake*>(&handshake), sizeof handshake};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  msghdr message{};
  message.msg_iov = &bytes;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof control;
  cmsghdr* const rights = CMSG_FIRSTHDR(&message);
  rights->cmsg_level = SOL_SOCKET;
  rights->cmsg_type = SCM_RIGHTS;
  rights->cmsg_len = CMSG_LEN(sizeof(int));
  std::memcpy(CMSG_DATA(rights), &memory_fd, sizeof memory_fd);
  ssize_t n;
  do n = ::sendmsg(socket, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
  while (n < 0 && errno == EINTR);
  if (n == ssize_t(sizeof handshake)) return;
  if (n < 0 && (errno == EPIPE || errno == ECONNRESET))
    throw lost(to_rank, "closed its connection before the handshake");
  throw resource_error("sending the handshake to rank " + std::to_string(to_rank), n < 0 ? errno : EMSGSIZE);
}

bool Incoming::carries(const Secret& secret) const {
  return received >= sizeof secret && same_secret(bytes.data(), secret.data());
}

Handshake Incoming::handshake() const {
  Handshake h;
  std::memcpy(&h, bytes.data(), sizeof h);
  return h;
}

ssize_t Incoming::read_once(size_t wanted) {
  iovec rest{bytes.data() + received, wanted - received};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int) * kMaxDescriptors)];
  msghdr message{};
  message.msg_iov = &rest;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof control;
  ForkHold hold;
  const ssize_t n = ::recvmsg(socket.get(), &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
  if (n < 0) return n;
  for (cmsghdr* c = CMSG_FIRSTHDR(&message); c != nullptr; c = CMSG_NXTHDR(&message, c)) {
    if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS) continue;
    for (size_t at = 0; at + sizeof(int) <= c->cmsg_len - CMSG_LEN(0); at += sizeof(int)) {
      int fd;
      std::memcpy(&fd, CMSG_DATA(c) + at, sizeof fd);
      descriptors.emplace_back(hold, fd);
    }
  }
  return n;
}

void Incoming::read(size_t wanted) {
  while (received < wanted) {
    const ssize_t n = read_once(wanted);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0 && errno == EAGAIN) return;
    if (n <= 0) {
      closed = true;
      return;
    }
    if (received == 0) deadline = Clock::now() + kHalfSaid;
    received += size_t(n);
  }
}

}  // namespace dpcomm
