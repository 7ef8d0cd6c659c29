// ./test_p2p_processes   Engine p2p between two processes, on the stand-in CUDA runtime: what they free, and in which
// order; machines on which data does not arrive. Each rank is this program again: with the name of a scene, its
// number, and a socket to the other one. A stop after 60 s ends whatever hangs.
#include <fcntl.h>
#include <spawn.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>

#include "p2p_ranks.h"

using namespace p2p;
using stand_in::counters;
using stand_in::machine;

namespace {

// Sends mine, returns the other's.
template <class T>
T exchange(int fd, const T& mine) {
  T theirs{};
  CHECK(write(fd, &mine, sizeof mine) == ssize_t(sizeof mine));
  CHECK(recv(fd, &theirs, sizeof theirs, MSG_WAITALL) == ssize_t(sizeof theirs));
  return theirs;
}

struct Meeting {
  int rank, fd;
  std::unique_ptr<P2pBuilder> builder;

  void allocate(bool pinned) {
    const P2pWish w = wish(2, pinned);
    builder = std::make_unique<P2pBuilder>(rank, 2, 0, w, p2p_channels(0, 1, w));
    std::vector<Endpoint> endpoints(2);
    endpoints[size_t(rank)] = builder->endpoint();
    endpoints[size_t(1 - rank)] = exchange(fd, builder->endpoint());
    CHECK(builder->probe(endpoints) == std::vector<bool>(2, true));
  }
  std::unique_ptr<Queue> finish() const {
    builder->bind(Secret{}, kLongS);
    exchange(fd, 'b');
    return std::make_unique<Queue>(builder->finish(kLongS, "abcd"));
  }
};

bool adds_up(Queue& queue, int rank) {
  Data<> d(7001, rank);
  const auto pending = queue.enqueue(d.call, queue.engine().stream());
  return pending->synchronize(kLongS, {}) && !pending->error() && d.all(3);
}

int position(const std::vector<std::string>& log, const std::string& name) {
  const auto at = std::find(log.begin(), log.end(), name);
  return CHECK(at != log.end()) ? int(at - log.begin()) : -1;
}

void scene_close(Meeting& m, bool pinned) {
  m.allocate(pinned);
  auto queue = m.finish();
  CHECK(adds_up(*queue, m.rank));
  CHECK(queue->engine().describe().peers[size_t(1 - m.rank)] == (pinned ? "pinned host memory" : "ipc"));
  CHECK(counters().imports == (pinned ? 0 : 1));
  exchange(m.fd, 'c');
  stand_in::clear_log();
  machine().log = true;
  queue->close(1);
  machine().log = false;
  const auto log = stand_in::log();
  if (!pinned) CHECK(position(log, "cudaIpcCloseMemHandle") < position(log, "cudaFree"));
  queue.reset();
  m.builder.reset();
  check_nothing_is_left();
}

// Rank 1 is gone without a word after the other has reached its memory: what it may be mapped to is not freed.
void scene_crash(Meeting& m) {
  m.allocate(false);
  auto queue = m.finish();
  CHECK(adds_up(*queue, m.rank));
  exchange(m.fd, 'c');  // both have the first call's result: a rank that goes earlier ends that call, too
  if (m.rank == 1) _exit(0);
  Data<> d(7001, 0);
  Error error = error_of([&] {
    const auto pending = queue->enqueue(d.call, queue->engine().stream());
    CHECK(pending->synchronize(kLongS, {}));
    if (const auto e = pending->error()) std::rethrow_exception(e);
  });
  CHECK(says(error, Code::peer_lost, {"rank 1 (pid", "disappeared"}) && error.rank == 1);
  const auto start = Clock::now();
  queue.reset();
  m.builder.reset();
  CHECK(seconds_since(start) < 3 && counters().allocations == 1 && counters().imports == 0);
  CHECK(counters().freed_while_imported == 0);
}

// The driver says that all is well, and nothing arrives.
void scene_drop(Meeting& m) {
  m.allocate(false);
  m.builder->bind(Secret{}, kLongS);
  exchange(m.fd, 'b');
  const auto start = Clock::now();
  const Error error = error_of([&] { m.builder->finish(0.5, "abcd"); });
  CHECK(says(error, Code::p2p, {"memory of GPUs does not carry data", "no answer", "ACS"}) && seconds_since(start) < 5);
  exchange(m.fd, 'd');
  m.builder.reset();
  m.allocate(true);  // what the host's memory can do, it still can
  CHECK(adds_up(*m.finish(), m.rank));
  m.builder.reset();
}

void scene_no_ipc(Meeting& m) {
  const Error error = error_of([&] { m.allocate(false); });
  CHECK(says(error, Code::p2p, {"cudaIpcGetMemHandle", "WSL, MIG or vGPU"}));
  m.builder.reset();
  m.allocate(true);
  auto queue = m.finish();
  CHECK(adds_up(*queue, m.rank));
  queue.reset();
  m.builder.reset();
  check_nothing_is_left();
}

// Device 0 of one is device 1 of the other.
void scene_other_order(Meeting& m) {
  m.allocate(false);
  auto queue = m.finish();
  CHECK(adds_up(*queue, m.rank));
  std::string pattern = cuda_devices()[0].uuid;
  CHECK(pattern.back() == (m.rank ? '1' : '0'));
}

void scene_no_peers(Meeting& m) {
  m.allocate(false);
  const Error error = error_of([&] { m.builder->bind(Secret{}, kLongS); });
  CHECK(says(error, Code::p2p, {"no peer access", m.rank ? "rank 0" : "rank 1"}));
  exchange(m.fd, 'n');
}

int play_scene(const std::string& scene, int rank, int fd) {
  Meeting m{rank, fd, nullptr};
  if (scene == "close") scene_close(m, false);
  if (scene == "close-pinned") scene_close(m, true);
  if (scene == "crash") scene_crash(m);
  if (scene == "drop") scene_drop(m);
  if (scene == "no-ipc") scene_no_ipc(m);
  if (scene == "other-order") scene_other_order(m);
  if (scene == "no-peers") scene_no_peers(m);
  return finish();
}

pid_t spawn(const std::string& scene, int rank, int fd, const std::string& described) {
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, fd, fd == 9 ? 8 : 9);
  std::string number = std::to_string(rank), variable = "STAND_IN_MACHINE=" + described;
  std::string socket = fd == 9 ? "8" : "9";
  char* argv[] = {const_cast<char*>("test_p2p_processes"), const_cast<char*>(scene.c_str()), number.data(),
                  socket.data(), nullptr};
  std::vector<char*> environment{variable.data()};
  for (char** one = environ; *one; ++one)
    if (std::strncmp(*one, "STAND_IN_MACHINE=", 17) != 0) environment.push_back(*one);
  environment.push_back(nullptr);
  pid_t pid = -1;
  CHECK(posix_spawn(&pid, "/proc/self/exe", &actions, nullptr, argv, environment.data()) == 0);
  posix_spawn_file_actions_destroy(&actions);
  return pid;
}

// Both ranks must end well.
void play(const std::string& scene, const std::string& first, const std::string& second) {
  int ends[2];
  if (!CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0)) return;
  const pid_t pids[] = {spawn(scene, 0, ends[0], first), spawn(scene, 1, ends[1], second)};
  close(ends[0]);
  close(ends[1]);
  for (int r = 0; r < 2; ++r) {
    int status = -1;
    CHECK(waitpid(pids[r], &status, 0) == pids[r]);
    if (!CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0))
      std::fprintf(stderr, "  %s: rank %d ended with status %#x\n", scene.c_str(), r, unsigned(status));
  }
}

}  // namespace

int main(int argc, char** argv) {
  ::alarm(60);
  if (argc > 3) return play_scene(argv[1], std::atoi(argv[2]), std::atoi(argv[3]));
  play("close", "", "");
  play("close", "visible=0:1", "visible=1:0");
  play("close-pinned", "", "");
  play("crash", "", "");
  play("drop", "visible=0,peers=drop", "visible=1,peers=drop");
  play("no-ipc", "ipc=fail", "ipc=fail");
  play("other-order", "visible=0:1", "visible=1:0");
  play("no-peers", "visible=0:1,peers=none", "visible=1:0,peers=none");
  return finish();
}
