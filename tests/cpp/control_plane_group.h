// Ranks of a control plane for its tests: objects in one process over socket pairs or TCP on loopback, and puppets,
// whose ends of the sockets the test holds itself.
#pragma once
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstring>
#include <utility>

#include "../../csrc/host/control_plane.h"
#include "descriptors.h"
#include "thread_ranks.h"

namespace planes {

using namespace thread_ranks;
using Kind = ControlFrame::Kind;

inline std::pair<int, int> tcp_pair() {
  const int listener = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in at{};
  at.sin_family = AF_INET;
  at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof at;
  auto* const address = reinterpret_cast<sockaddr*>(&at);
  CHECK(::bind(listener, address, size) == 0 && ::listen(listener, 1) == 0);
  CHECK(::getsockname(listener, address, &size) == 0);
  const int mine = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  CHECK(::connect(mine, address, size) == 0);
  const int theirs = ::accept4(listener, nullptr, nullptr, SOCK_CLOEXEC);
  ::close(listener);
  const int on = 1;
  for (const int fd : {mine, theirs}) CHECK(::setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on) == 0);
  return {mine, theirs};
}

inline std::pair<int, int> unix_pair() {
  int fds[2];
  CHECK(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds) == 0);
  return {fds[0], fds[1]};
}

using Mesh = std::vector<std::vector<PeerSockets>>;  // [rank][peer]

inline Mesh mesh_of(int nranks, bool tcp = false) {
  Mesh mesh(static_cast<size_t>(nranks));
  for (auto& row : mesh) row.resize(size_t(nranks));
  for (size_t a = 0; a < size_t(nranks); ++a)
    for (size_t b = a + 1; b < size_t(nranks); ++b)
      for (UniqueFd PeerSockets::* const which : {&PeerSockets::control, &PeerSockets::headers}) {
        const auto [mine, theirs] = tcp ? tcp_pair() : unix_pair();
        mesh[a][b].*which = UniqueFd(mine);
        mesh[b][a].*which = UniqueFd(theirs);
      }
  return mesh;
}

struct Group {
  Mesh mesh;
  std::vector<std::unique_ptr<ControlPlane>> ranks;  // empty: a puppet, whose sockets are mesh[rank]

  explicit Group(int nranks, uint64_t puppets = 0, bool tcp = false)
      : mesh(mesh_of(nranks, tcp)), ranks(static_cast<size_t>(nranks)) {
    for (int r = 0; r < nranks; ++r)
      if ((puppets >> r & 1) == 0) wake(r);
  }
  void wake(int r) { ranks[size_t(r)] = std::make_unique<ControlPlane>(r, std::move(mesh[size_t(r)])); }
  ControlPlane& operator[](int r) { return *ranks[size_t(r)]; }
  int size() const { return int(ranks.size()); }
  int control(int puppet, int peer) { return mesh[size_t(puppet)][size_t(peer)].control.get(); }
  int headers(int puppet, int peer) { return mesh[size_t(puppet)][size_t(peer)].headers.get(); }
  void kill(int puppet) { mesh[size_t(puppet)].clear(); }

  // On a thread for each rank that is no puppet and not in `but`. Returns the seconds that took.
  double all(const std::function<void(int, ControlPlane&)>& body, uint64_t but = 0) {
    const auto start = Clock::now();
    in_threads(size(), [&](int r) {
      if (ranks[size_t(r)] && (but >> r & 1) == 0) body(r, *ranks[size_t(r)]);
    });
    return seconds_since(start);
  }

  // Waits for the cause on all ranks and checks that it is one. All zero if there is none.
  Failure cause() {
    uint64_t word = 0;
    for (auto& rank : ranks) {
      if (!rank || !CHECK(rank->wait_failed(patience_s))) continue;
      if (word == 0) word = rank->failure();
      const Failure first = unpack(word), here = unpack(rank->failure());
      if (!CHECK(rank->failure() == word))
        std::fprintf(stderr, "cause %d of rank %d, and %d of rank %d\n", int(first.cause), first.rank, int(here.cause),
                     here.rank);
    }
    return unpack(word);
  }
};

inline Header header_of_call(uint64_t sequence) {
  Header h{};
  h.sequence = sequence;
  h.numel = 1000;
  h.bucket = -1;
  h.tensors = 1;
  return h;
}

inline bool say(int socket, const void* bytes, size_t n) {
  return ::send(socket, bytes, n, MSG_NOSIGNAL) == ssize_t(n);
}

inline ControlFrame frame_of(Kind kind, const Failure& failure, uint64_t blamed = 0, uint64_t closed = 0) {
  return {ControlFrame::kMagic, kind, failure.cause == Cause::none ? 0 : pack(failure), blamed, closed, {}};
}

}  // namespace planes
