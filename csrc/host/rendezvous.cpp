#include "rendezvous.h"

#include <poll.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <limits>
#include <sstream>

#include "../error.h"

namespace dpcomm {
namespace {

constexpr size_t kMaxWarnings = 8;

struct Address {
  sockaddr_un name{};
  socklen_t length;

  explicit Address(const Endpoint& endpoint) {
    const std::string text = abstract_name(endpoint);
    name.sun_family = AF_UNIX;
    std::memcpy(name.sun_path + 1, text.data(), text.size());  // a leading zero byte: no file
    length = socklen_t(offsetof(sockaddr_un, sun_path) + 1 + text.size());
  }
  const sockaddr* get() const { return reinterpret_cast<const sockaddr*>(&name); }
};

UniqueFd unix_socket() {
  auto fd = UniqueFd::opened_by([] { return ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0); });
  if (!fd) throw resource_error("socket(AF_UNIX)", errno);
  return fd;
}

ucred peer_of(int socket) {
  ucred peer{};
  socklen_t length = sizeof peer;
  if (::getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &peer, &length) != 0) throw resource_error("SO_PEERCRED", errno);
  return peer;
}

}  // namespace

// One call of bind.
class Rendezvous::Exchange {
 public:
  Exchange(Rendezvous& owner, const Handshake& own, int memory_fd, double timeout_s)
      : owner_(owner), own_(own), memory_fd_(memory_fd), timeout_s_(timeout_s), links_(size_t(own.nranks)) {
    const double seconds = std::min(std::max(timeout_s, 0.0), 1e8);  // three years
    deadline_ = Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
    listener_ = std::move(owner.listener_);
    for (int r = 0; r < own.rank; ++r) call(r, std::move(owner.calls_[size_t(r)]));
  }

  std::vector<Link> run() {
    while (!missing().empty()) {
      wait();
      for (size_t r = 0; r < calls_.size(); ++r) {
        if (calls_[r].socket) hear_answer(int(r));
      }
      accept_some();
      for (auto& visitor : visitors_) hear_visitor(visitor);
      std::erase_if(visitors_, [](const Incoming& v) { return !v.socket; });
    }
    for (const auto& visitor : visitors_) reject(visitor.who, "no handshake by the time all ranks were there");
    return std::move(links_);
  }

 private:
  void call(int r, UniqueFd socket) {
    if (!socket)
      throw Error(Code::internal, "bind without a connection to rank " + std::to_string(r) + ": probe first");
    send_handshake(socket.get(), own_, memory_fd_, r);
    Incoming& answer = calls_.emplace_back();
    answer.pid = peer_of(socket.get()).pid;
    answer.socket = std::move(socket);
  }

  std::vector<int> missing() const {
    std::vector<int> ranks;
    for (int r = 0; r < own_.nranks; ++r) {
      if (r != own_.rank && !links_[size_t(r)].socket) ranks.push_back(r);
    }
    return ranks;
  }

  // Until something can be read, or somebody's time is over.
  void wait() {
    std::vector<pollfd> polled = {{listener_.get(), POLLIN, 0}};
    Clock::time_point until = deadline_;
    for (const auto& answer : calls_) {
      if (answer.socket) polled.push_back({answer.socket.get(), POLLIN, 0});
    }
    for (const auto& visitor : visitors_) {
      polled.push_back({visitor.socket.get(), POLLIN, 0});
      until = std::min(until, visitor.deadline);
    }
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(until - Clock::now()).count();
    const int ms = int(std::clamp<int64_t>(left, 0, std::numeric_limits<int>::max()));
    if (::poll(polled.data(), polled.size(), ms) < 0 && errno != EINTR) throw resource_error("poll", errno);
    if (Clock::now() < deadline_) return;
    std::ostringstream text;
    for (const int r : missing()) text << (text.tellp() > 0 ? ", " : "ranks [") << r;
    text << "] did not complete the handshake in " << timeout_s_ << " s. Look whether they run, or raise timeout_s";
    Error error(Code::timeout, text.str());
    error.waiting_for = missing();
    throw error;
  }

  // A few at a time: whoever connects faster than this loop turns must not keep it from the others.
  void accept_some() {
    for (int i = 0; i < 64; ++i) {
      auto socket = UniqueFd::opened_by(
          [&] { return ::accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK); });
      if (!socket && (errno == EINTR || errno == ECONNABORTED)) continue;
      if (!socket && errno == EAGAIN) return;
      if (!socket) throw resource_error("accept", errno);
      const ucred peer = peer_of(socket.get());
      std::string who = "pid " + std::to_string(peer.pid) + " (uid " + std::to_string(peer.uid) + ")";
      if (peer.uid != ::geteuid()) {
        reject(who, "only uid " + std::to_string(::geteuid()) + " may connect");
        continue;
      }
      Incoming& visitor = visitors_.emplace_back();
      visitor.socket = std::move(socket);
      visitor.pid = peer.pid;
      visitor.who = std::move(who);
    }
  }

  void hear_answer(int r) {
    Incoming& answer = calls_[size_t(r)];
    answer.read(sizeof(Handshake));  // what follows is the engine's
    if (answer.complete()) {
      if (!answer.carries(own_.secret)) {
        throw Error(Code::internal, "rank " + std::to_string(r) + " answered without this session's secret");
      }
      check(answer, r, r + 1);
      adopt(answer, r);
    } else if (answer.closed) {
      throw lost(r, "closed its connection during the handshake");
    }
  }

  void hear_visitor(Incoming& visitor) {
    visitor.read(visitor.bytes.size());
    if (!visitor.complete() && !visitor.closed && Clock::now() < visitor.deadline) return;
    if (!visitor.carries(own_.secret)) {
      reject(visitor.who,
             visitor.received == 0 ? "it closed without a word" : "it does not know this session's secret");
      visitor.socket.reset();
      return;
    }
    check(visitor, own_.rank + 1, own_.nranks);
    const int rank = visitor.handshake().rank;
    send_handshake(visitor.socket.get(), own_, memory_fd_, rank);
    adopt(visitor, rank);
  }

  // A handshake that carries the secret must agree with ours and come from a rank in [first, last) not seen yet.
  void check(const Incoming& in, int first, int last) const {
    const Handshake h = in.handshake();
    const std::string from = in.complete() ? "rank " + std::to_string(h.rank) : in.who;
    const auto need = [&](bool holds, const std::string& otherwise) {
      if (!holds) throw Error(Code::internal, "handshake from " + from + ": " + otherwise);
    };
    const auto agree = [&](const std::string& what, auto theirs, auto ours) {
      need(theirs == ours, what + " " + std::to_string(theirs) + " where this rank has " + std::to_string(ours));
    };
    need(in.complete(), "it ends after " + std::to_string(in.received) + " of 64 bytes");
    need(h.magic == Handshake::kMagic, "bad magic");
    agree("version", h.version, +Handshake::kVersion);
    need(in.received == sizeof h, "it is longer than 64 bytes");
    agree("nranks", h.nranks, own_.nranks);
    need(first <= h.rank && h.rank < last,
         "expected a rank in [" + std::to_string(first) + ", " + std::to_string(last) + ")");
    need(!links_[size_t(h.rank)].socket, "a second one from this rank");
    agree("memory_bytes", h.memory_bytes, own_.memory_bytes);
    need(in.descriptors.size() == 1, std::to_string(in.descriptors.size()) +
                                         " descriptors instead of one (if none: look at ulimit -n of this process)");
  }

  void adopt(Incoming& in, int rank) {
    Link& link = links_[size_t(rank)];
    link.socket = std::move(in.socket);
    link.memory = std::move(in.descriptors.front());
    link.pid = in.pid;
  }

  void reject(const std::string& who, const std::string& why) {
    ++owner_.rejected_;
    if (owner_.warnings_.size() < kMaxWarnings)
      owner_.warnings_.push_back("dropped a connection of " + who + ": " + why);
  }

  Rendezvous& owner_;
  const Handshake own_;
  const int memory_fd_;
  const double timeout_s_;
  Clock::time_point deadline_;
  UniqueFd listener_;               // closes with this object
  std::vector<Incoming> calls_;     // answers of lower ranks, by rank
  std::vector<Incoming> visitors_;  // accepted, not yet known
  std::vector<Link> links_;
};

std::string abstract_name(const Endpoint& endpoint) {
  std::string name = "dpcomm-";
  for (const uint8_t byte : endpoint) {
    name += "0123456789abcdef"[byte >> 4];
    name += "0123456789abcdef"[byte & 15];
  }
  return name;
}

Rendezvous::Rendezvous(int rank, int nranks) : rank_(rank), nranks_(nranks), endpoint_{} {
  if (rank < 0 || rank >= nranks)
    throw Error(Code::argument, "rank " + std::to_string(rank) + " of " + std::to_string(nranks));
  while (::getrandom(endpoint_.data(), endpoint_.size(), 0) != ssize_t(endpoint_.size())) {
    if (errno != EINTR) throw resource_error("getrandom", errno);
  }
  listener_ = unix_socket();
  const Address address(endpoint_);
  if (::bind(listener_.get(), address.get(), address.length) != 0)
    throw resource_error("bind of an abstract socket", errno);
  if (::listen(listener_.get(), SOMAXCONN) != 0) throw resource_error("listen", errno);
}

std::vector<bool> Rendezvous::probe(const std::vector<Endpoint>& endpoints) {
  if (endpoints.size() != size_t(nranks_)) throw Error(Code::internal, "probe wants the endpoints of all ranks");
  std::vector<bool> answered(endpoints.size(), true);
  calls_.clear();
  calls_.resize(size_t(rank_));
  for (size_t r = 0; r < calls_.size(); ++r) {
    UniqueFd socket = unix_socket();
    const Address address(endpoints[r]);
    int failed;
    do failed = ::connect(socket.get(), address.get(), address.length) == 0 ? 0 : errno;
    while (failed == EINTR);
    answered[r] = failed != ECONNREFUSED;
    if (!answered[r]) continue;
    if (failed != 0) throw resource_error("connecting to rank " + std::to_string(r), failed);
    const uid_t uid = peer_of(socket.get()).uid;
    if (uid != ::geteuid()) {  // before anything is said to it
      throw resource_error("rank " + std::to_string(r) + " runs as uid " + std::to_string(uid) + ", this rank as uid " +
                               std::to_string(::geteuid()) + ": start all ranks as one user",
                           EPERM);
    }
    calls_[r] = std::move(socket);
  }
  return answered;
}

std::vector<Link> Rendezvous::bind(const Secret& secret, int memory_fd, uint64_t memory_bytes, double timeout_s) {
  if (!listener_ || calls_.size() != size_t(rank_)) throw Error(Code::internal, "bind once, after probe");
  const Handshake own = {secret, Handshake::kMagic, Handshake::kVersion, rank_, nranks_, memory_bytes, 0};
  return Exchange(*this, own, memory_fd, timeout_s).run();
}

}  // namespace dpcomm
