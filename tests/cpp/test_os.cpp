// What the shm engine asks of the operating system: arenas, rendezvous, watchdog, fork guard. Ranks are threads where
// they can be, processes where death or fork is the point. A machine-made stop after 120 s ends whatever hangs.
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <future>
#include <memory>
#include <random>
#include <thread>

#include "../../csrc/error.h"
#include "../../csrc/host/arena.h"
#include "../../csrc/host/rendezvous.h"
#include "../../csrc/host/watchdog.h"
#include "check.h"
#include "descriptors.h"

#if defined(__SANITIZE_THREAD__)
extern "C" const char* __tsan_default_options() { return "die_after_fork=0"; }  // children here start threads
#endif

using namespace dpcomm;
using namespace std::chrono_literals;

namespace {

constexpr size_t kMiB = 1 << 20;
constexpr double kTimeout = 30;  // s, for what should take milliseconds

// The Error that f throws; a failed check and an empty one if it throws none.
Error error_of(const std::function<void()>& f) {
  try {
    f();
  } catch (const Error& error) {
    return error;
  }
  CHECK(!"an Error is thrown");
  return Error(Code::cuda, "nothing was thrown");
}

bool says(const Error& error, const std::string& text) {
  if (std::string(error.what()).find(text) != std::string::npos) return true;
  std::fprintf(stderr, "'%s' does not contain '%s'\n", error.what(), text.c_str());
  return false;
}

// Runs f in a forked child. The status is 0 if all its checks held.
pid_t fork_child(const std::function<void()>& f) {
  std::fflush(nullptr);
  const pid_t pid = ::fork();
  if (pid != 0) return pid;
  ::alarm(60);
  Checks::failed = 0;
  try {
    f();
  } catch (const std::exception& error) {
    CHECK(!error.what());
    std::fprintf(stderr, "child: %s\n", error.what());
  }
  ::_exit(Checks::failed == 0 ? 0 : 1);
}

int wait_for(pid_t pid) {
  int status = -1;
  while (::waitpid(pid, &status, 0) < 0 && errno == EINTR) continue;
  return status;
}

int status_of_child(const std::function<void()>& f) { return wait_for(fork_child(f)); }

// ---- fork guard -----------------------------------------------------------------------------------------------------

void test_fork_closes_owned_descriptors_only() {
  UniqueFd owned(::open("/dev/null", O_RDONLY | O_CLOEXEC));
  const int foreign = ::open("/dev/null", O_RDONLY | O_CLOEXEC);
  const uint64_t generation = fork_generation();
  const int number = owned.get();
  CHECK(status_of_child([&] {
          CHECK(fork_generation() != generation);
          CHECK(::fcntl(number, F_GETFD) == -1 && !owned && owned.get() == -1);
          CHECK(::fcntl(foreign, F_GETFD) != -1);
          CHECK(::dup2(foreign, number) == number);  // the number means something else now,
          owned.reset();                             // which its old owner must leave alone
          CHECK(::fcntl(number, F_GETFD) != -1);
        }) == 0);
  CHECK(fork_generation() == generation && ::fcntl(number, F_GETFD) != -1);
  const int released = owned.release();
  CHECK(released == number && !owned);
  CHECK(status_of_child([&] { CHECK(::fcntl(released, F_GETFD) != -1); }) == 0);
  ::close(released);
  ::close(foreign);
}

// Between a descriptor's making and the note of it, and between its closing and that note, no child may slip through.
void test_no_fork_comes_between() {
  const auto count = [] {  // no malloc: a sanitizer's may be locked in a child of several threads
    int n = 0;
    for (int fd = 0; fd < 256; ++fd) n += ::fcntl(fd, F_GETFD) != -1;
    return n;
  };
  const int before = count();
  std::atomic<bool> stop{false};
  std::thread busy([&] {
    while (!stop) Rendezvous(0, 2);
  });
  for (int i = 0; i < 200; ++i) {
    const pid_t child = ::fork();
    if (child == 0) ::_exit(count() == before ? 0 : 1);
    CHECK(wait_for(child) == 0);
  }
  stop = true;
  busy.join();
}

// ---- arena ----------------------------------------------------------------------------------------------------------

void test_arena_is_sealed_zeroed_and_shared() {
  Arena mine = Arena::create(3 * kMiB + 4096);
  CHECK(::ftruncate(mine.fd(), 0) == -1 && errno == EPERM);
  CHECK(::ftruncate(mine.fd(), 64 * kMiB) == -1 && errno == EPERM);
  CHECK(::fcntl(mine.fd(), F_ADD_SEALS, F_SEAL_WRITE) == -1 && errno == EPERM);
  CHECK(::fcntl(mine.fd(), F_GETFD) == FD_CLOEXEC);
  CHECK(mine.data()[0] == 0 && mine.data()[mine.bytes() - 1] == 0);
  struct stat status{};
  CHECK(::fstat(mine.fd(), &status) == 0 && size_t(status.st_blocks) * 512 >= mine.bytes());  // for real
  Arena theirs = Arena::adopt(UniqueFd(::dup(mine.fd())), mine.bytes());
  mine.forget_fd();
  CHECK(mine.fd() == -1);
  mine.data()[mine.bytes() - 1] = 42;
  CHECK(theirs.data()[mine.bytes() - 1] == 42 && theirs.data() != mine.data());
  Arena moved = std::move(theirs);
  CHECK(moved.data()[mine.bytes() - 1] == 42 && theirs.data() == nullptr);
}

void test_forked_child_has_no_mapping() {
  auto arena = std::make_unique<Arena>(Arena::create(kMiB));
  auto anonymous = std::make_unique<Arena>(Arena::anonymous(kMiB));
  CHECK(status_of_child([&] {
          unsigned char resident[kMiB / 4096];
          for (auto* a : {&arena, &anonymous}) {
            char* const at = (*a)->data();
            CHECK(::mincore(at, kMiB, resident) == -1 && errno == ENOMEM);
            CHECK(::mmap(at, kMiB, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0) ==
                  at);
            a->reset();  // must not unmap what lies there now
            CHECK(::mincore(at, kMiB, resident) == 0);
          }
        }) == 0);
}

void test_adopt_refuses_what_could_be_pulled_away() {
  const auto refused = [](int fd, const char* why) {
    const Error error = error_of([&] { Arena::adopt(UniqueFd(fd), kMiB); });
    CHECK(error.code == Code::internal && says(error, why));
  };
  const int unsealed = ::memfd_create("test", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  CHECK(::ftruncate(unsealed, kMiB) == 0 && ::fcntl(unsealed, F_ADD_SEALS, F_SEAL_GROW | F_SEAL_SEAL) == 0);
  refused(unsealed, "not a sealed memfd");
  refused(::open("/dev/zero", O_RDWR | O_CLOEXEC), "not a sealed memfd");
  refused(::dup(Arena::create(kMiB - 4096).fd()), "1044480 bytes instead of");
  refused(::dup(Arena::create(2 * kMiB).fd()), "2097152 bytes instead of");
}

void test_file_size_limit_is_an_error_not_a_signal() {
  const auto limited = [](const std::function<void()>& f) {
    return status_of_child([&] {
      const rlimit limit = {kMiB, kMiB};
      CHECK(::setrlimit(RLIMIT_FSIZE, &limit) == 0);
      f();
    });
  };
  CHECK(limited([] {
          const Error error = error_of([] { Arena::create(4 * kMiB); });
          CHECK(error.code == Code::resource && error.errnum == EFBIG);
          CHECK(says(error, "4.0 MiB") && says(error, "RLIMIT_FSIZE allows 1.0 MiB") && says(error, "DPCOMM_ARENA_MB"));
          CHECK(Arena::create(kMiB).bytes() == kMiB);
        }) == 0);
  const int control = limited([] {
    const int fd = ::memfd_create("control", MFD_CLOEXEC);
    CHECK(::ftruncate(fd, 4 * kMiB) != 0);
  });
  CHECK(WIFSIGNALED(control) && WTERMSIG(control) == SIGXFSZ);  // what would happen without the check
}

void test_no_descriptor_left_names_the_call() {
  CHECK(status_of_child([] {
          const rlimit limit = {0, 0};
          CHECK(::setrlimit(RLIMIT_NOFILE, &limit) == 0);
          const Error arena = error_of([] { Arena::create(kMiB); });
          CHECK(arena.code == Code::resource && arena.errnum == EMFILE && says(arena, "memfd_create: "));
          const Error rendezvous = error_of([] { Rendezvous(0, 2); });
          CHECK(rendezvous.errnum == EMFILE && says(rendezvous, "socket"));
        }) == 0);
}

// A machine made of files below a temporary folder.
struct FakeSystem {
  std::filesystem::path root;
  FakeSystem() {
    char name[] = "/tmp/dpcomm-test-XXXXXX";
    root = ::mkdtemp(name);
  }
  ~FakeSystem() { std::filesystem::remove_all(root); }
  void file(const std::string& path, const std::string& text) const {
    const auto at = root / path.substr(1);
    std::filesystem::create_directories(at.parent_path());
    std::ofstream(at) << text;
  }
};

void test_full_cgroup_v2_is_an_error() {
  const FakeSystem fake;
  CHECK(memory_room(fake.root).bytes == UINT64_MAX);
  fake.file("/proc/self/cgroup", "0::/pod/box/inner\n");
  fake.file("/proc/self/mountinfo", "30 25 0:26 /pod /sys/fs/cgroup ro - cgroup2 cgroup rw\n");  // a container's view
  fake.file("/sys/fs/cgroup/box/inner/memory.max", "max\n");
  fake.file("/sys/fs/cgroup/box/inner/memory.current", "1000\n");
  CHECK(memory_room(fake.root).bytes == UINT64_MAX);
  fake.file("/sys/fs/cgroup/box/memory.max", std::to_string(100 * kMiB));
  fake.file("/sys/fs/cgroup/box/memory.current", std::to_string(98 * kMiB));
  CHECK(memory_room(fake.root).bytes == 2 * kMiB);
  const Error error = error_of([&] { Arena::create(4 * kMiB, fake.root); });
  CHECK(error.code == Code::resource && error.errnum == ENOMEM);
  CHECK(says(error, "4.0 MiB") && says(error, "2.0 MiB left") && says(error, "/box/memory.max"));
  CHECK(says(error, "DPCOMM_ARENA_MB"));
  CHECK(error_of([&] { Arena::anonymous(4 * kMiB, fake.root); }).errnum == ENOMEM);
  CHECK(Arena::create(2 * kMiB, fake.root).bytes() == 2 * kMiB);
  fake.file("/sys/fs/cgroup/box/memory.stat", "anon 5\ninactive_file 3145728\nactive_file 1048576\n");  // page cache
  CHECK(Arena::create(4 * kMiB, fake.root).bytes() == 4 * kMiB);
}

void test_full_cgroup_v1_or_machine_is_an_error() {
  const FakeSystem fake;
  fake.file("/proc/self/cgroup", "9:name=systemd:/\n4:cpu,memory:/job/step\n0::/\n");
  fake.file("/proc/self/mountinfo",
            "30 25 0:26 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
            "31 25 0:27 / /sys/fs/cgroup/memory rw shared:9 - cgroup cgroup rw,cpu,memory\n");
  fake.file("/sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n");
  fake.file("/sys/fs/cgroup/memory/memory.usage_in_bytes", "1000\n");
  fake.file("/sys/fs/cgroup/memory/job/memory.limit_in_bytes", std::to_string(100 * kMiB));
  fake.file("/sys/fs/cgroup/memory/job/memory.usage_in_bytes", std::to_string(101 * kMiB));
  CHECK(memory_room(fake.root).bytes == 0);
  fake.file("/sys/fs/cgroup/memory/job/memory.stat", "inactive_file 99\ntotal_inactive_file 4194304\n");
  CHECK(memory_room(fake.root).bytes == 3 * kMiB);
  fake.file("/proc/meminfo", "MemTotal: 9999 kB\nMemAvailable: 1024 kB\nSwapFree: 1024 kB\n");
  CHECK(memory_room(fake.root).bytes == 2 * kMiB && memory_room(fake.root).limit.ends_with("/proc/meminfo"));
}

// ---- rendezvous -----------------------------------------------------------------------------------------------------

const Secret kSecret = [] {
  Secret secret;
  for (size_t i = 0; i < secret.size(); ++i) secret[i] = uint8_t(7 * i + 1);
  return secret;
}();

std::vector<Endpoint> endpoints_of(const std::vector<std::unique_ptr<Rendezvous>>& ranks) {
  std::vector<Endpoint> endpoints;
  for (const auto& r : ranks) endpoints.push_back(r->endpoint());
  return endpoints;
}

std::vector<std::unique_ptr<Rendezvous>> make_ranks(int nranks) {
  std::vector<std::unique_ptr<Rendezvous>> ranks;
  for (int r = 0; r < nranks; ++r) ranks.push_back(std::make_unique<Rendezvous>(r, nranks));
  return ranks;
}

// One rank's whole part: its arena's first byte tells who it is. True if it met all others.
bool meet(Rendezvous& rendezvous, int rank, const std::vector<Endpoint>& endpoints, std::vector<Link>* keep = nullptr) {
  Arena mine = Arena::create(kMiB);
  mine.data()[0] = char(rank + 1);
  for (const bool answered : rendezvous.probe(endpoints)) CHECK(answered);
  std::vector<Link> links = rendezvous.bind(kSecret, mine.fd(), mine.bytes(), kTimeout);
  bool all = links.size() == endpoints.size() && !links[size_t(rank)].socket && !links[size_t(rank)].memory;
  for (int r = 0; r < int(links.size()); ++r) {
    if (r == rank) continue;
    const Arena theirs = Arena::adopt(std::move(links[size_t(r)].memory), kMiB);
    all = CHECK(theirs.data()[0] == char(r + 1)) && CHECK(links[size_t(r)].pid > 0) && links[size_t(r)].socket && all;
  }
  if (keep) *keep = std::move(links);
  return all;
}

// All ranks as threads, while `meanwhile` (a stranger) does its worst.
void meet_as_threads(const std::vector<std::unique_ptr<Rendezvous>>& ranks,
                     const std::function<void()>& meanwhile = nullptr) {
  const auto endpoints = endpoints_of(ranks);
  std::vector<std::future<bool>> met;
  for (size_t r = 0; r < ranks.size(); ++r) {
    if (r == 1 && meanwhile) meanwhile();  // rank 0 is in bind and must go on waiting for rank 1
    met.push_back(std::async(std::launch::async, [&, r] {
      try {
        return meet(*ranks[r], int(r), endpoints);
      } catch (const Error& error) {
        std::fprintf(stderr, "rank %zu: %s\n", r, error.what());
        return false;
      }
    }));
  }
  for (auto& m : met) CHECK(m.get());
}

void test_ranks_meet() {
  for (const int nranks : {1, 2, 4}) meet_as_threads(make_ranks(nranks));
}

void test_processes_meet() {
  const int nranks = 4;
  auto mine = std::make_unique<Rendezvous>(0, nranks);
  std::vector<pid_t> children;
  std::vector<UniqueFd> up, down;  // pipes: an endpoint from each child, all endpoints to each
  std::vector<Endpoint> endpoints = {mine->endpoint()};
  for (int r = 1; r < nranks; ++r) {
    int to_parent[2], to_child[2];
    CHECK(::pipe(to_parent) == 0 && ::pipe(to_child) == 0);
    children.push_back(fork_child([&] {
      Rendezvous rendezvous(r, nranks);
      std::vector<Endpoint> all(nranks);
      CHECK(::write(to_parent[1], rendezvous.endpoint().data(), 32) == 32);
      CHECK(::read(to_child[0], all.data(), 32 * nranks) == 32 * nranks);
      CHECK(meet(rendezvous, r, all));
    }));
    ::close(to_parent[1]);
    ::close(to_child[0]);
    up.emplace_back(to_parent[0]);
    down.emplace_back(to_child[1]);
    CHECK(::read(up.back().get(), endpoints.emplace_back().data(), 32) == 32);
  }
  for (const auto& pipe : down) CHECK(::write(pipe.get(), endpoints.data(), 32 * nranks) == 32 * nranks);
  std::vector<Link> links;
  CHECK(meet(*mine, 0, endpoints, &links));
  for (int r = 1; r < nranks; ++r) CHECK(links[size_t(r)].pid == children[size_t(r - 1)]);
  for (const pid_t child : children) CHECK(wait_for(child) == 0);
}

void test_probe_is_false_where_nobody_listens() {
  Endpoint unused;
  unused.fill(0xee);
  Rendezvous last(2, 3), first(0, 3);
  CHECK((last.probe({first.endpoint(), unused, unused}) == std::vector<bool>{true, false, true}));
  CHECK(error_of([&] { last.bind(kSecret, 0, kMiB, 1); }).code == Code::internal);
  CHECK((last.probe({unused, unused, unused}) == std::vector<bool>{false, false, true}));
  CHECK(error_of([&] { Rendezvous(3, 3); }).code == Code::argument);
}

void test_bind_ends_with_a_timeout_that_names_the_missing() {
  auto ranks = make_ranks(4);
  const auto endpoints = endpoints_of(ranks);
  const Arena arena = Arena::create(kMiB);
  ranks[1]->probe(endpoints);
  const auto begin = std::chrono::steady_clock::now();
  const Error error = error_of([&] { ranks[1]->bind(kSecret, arena.fd(), kMiB, 0.2); });
  CHECK(error.code == Code::timeout && (error.waiting_for == std::vector<int>{0, 2, 3}));
  CHECK(says(error, "ranks [0, 2, 3]") && says(error, "0.2 s"));
  CHECK(std::chrono::steady_clock::now() - begin < 5s);
  ranks[2]->probe({endpoints[0], endpoints[0], endpoints[2], endpoints[3]});
  CHECK((ranks[3]->probe(endpoints) == std::vector<bool>{true, false, true, true}));  // its listener is closed
}

void test_a_rank_that_gives_up_is_noticed() {
  auto ranks = make_ranks(2);
  ranks[1]->probe(endpoints_of(ranks));
  const Arena arena = Arena::create(kMiB);
  auto waiting = std::async(std::launch::async,
                            [&] { return error_of([&] { ranks[1]->bind(kSecret, arena.fd(), kMiB, kTimeout); }); });
  ranks[0]->probe({ranks[0]->endpoint(), ranks[1]->endpoint()});
  ranks[0].reset();
  const Error error = waiting.get();
  CHECK(error.code == Code::peer_lost && error.rank == 0);
}

// ---- strangers ------------------------------------------------------------------------------------------------------

UniqueFd connect_to(const Endpoint& endpoint) {
  UniqueFd fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  const std::string text = abstract_name(endpoint);
  sockaddr_un name{};
  name.sun_family = AF_UNIX;
  std::memcpy(name.sun_path + 1, text.data(), text.size());
  const auto length = socklen_t(offsetof(sockaddr_un, sun_path) + 1 + text.size());
  if (::connect(fd.get(), reinterpret_cast<sockaddr*>(&name), length) != 0) throw resource_error("connect", errno);
  return fd;  // a blocking connect waits for room in the backlog
}

// Bytes, with `copies` descriptors of /dev/null beside them.
void say(int socket, const void* bytes, size_t length, int copies) {
  const UniqueFd null(::open("/dev/null", O_RDONLY | O_CLOEXEC));
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int) * 16)] = {};
  iovec data{const_cast<void*>(bytes), length};
  msghdr message{};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  if (copies > 0) {
    message.msg_control = control;
    message.msg_controllen = CMSG_SPACE(sizeof(int) * size_t(copies));
    cmsghdr* const rights = CMSG_FIRSTHDR(&message);
    rights->cmsg_level = SOL_SOCKET;
    rights->cmsg_type = SCM_RIGHTS;
    rights->cmsg_len = CMSG_LEN(sizeof(int) * size_t(copies));
    for (int i = 0; i < copies; ++i) {
      const int fd = null.get();
      std::memcpy(CMSG_DATA(rights) + sizeof fd * size_t(i), &fd, sizeof fd);
    }
  }
  ::sendmsg(socket, &message, MSG_NOSIGNAL);  // the other side may have hung up on us already: fine
}

void test_strangers_do_not_disturb() {
  auto ranks = make_ranks(2);
  std::mt19937 random(20240229);
  std::vector<UniqueFd> silent;
  const int fuzz = 2000, quiet = 20;
  meet_as_threads(ranks, [&] {
    for (int i = 0; i < quiet; ++i) silent.push_back(connect_to(ranks[0]->endpoint()));
    for (int i = 0; i < fuzz; ++i) {
      uint8_t bytes[300];
      for (auto& byte : bytes) byte = uint8_t(random());
      if (i % 3 == 0) std::memcpy(bytes, kSecret.data(), 31);  // nearly right:
      bytes[31] = uint8_t(~kSecret[31]);                       // never quite
      const size_t length = i % 2 ? sizeof(Handshake) : random() % sizeof bytes;
      const UniqueFd socket = connect_to(ranks[0]->endpoint());
      say(socket.get(), bytes, length, int(random() % 8));
    }
    // All of them are heard before rank 1 comes, so the count is exact. Half a handshake has 2 s to go on.
    const UniqueFd slow = connect_to(ranks[0]->endpoint());
    say(slow.get(), "half", 4, 0);
    pollfd hung_up{slow.get(), POLLIN, 0};
    CHECK(::poll(&hung_up, 1, 20000) == 1);
  });
  CHECK(ranks[0]->rejected() == fuzz + quiet + 1);
  CHECK(ranks[0]->warnings().size() == 8 && ranks[0]->warnings()[0].find("uid") != std::string::npos);
  CHECK(ranks[1]->rejected() == 0);
}

void test_other_users_are_dropped() {
  if (::geteuid() != 0) {
    std::printf("SKIPPED test_other_users_are_dropped: becoming another user needs root\n");
    return;
  }
  auto ranks = make_ranks(2);
  const Handshake right = {kSecret, Handshake::kMagic, Handshake::kVersion, 1, 2, kMiB, 0};
  meet_as_threads(ranks, [&] {
    const Endpoint endpoint = ranks[0]->endpoint();
    CHECK(status_of_child([&] {
            CHECK(::setgid(65534) == 0 && ::setuid(65534) == 0);
            const UniqueFd socket = connect_to(endpoint);
            say(socket.get(), &right, sizeof right, 1);
            char byte;
            CHECK(::recv(socket.get(), &byte, 1, 0) <= 0);  // no answer, hung up
          }) == 0);
  });
  CHECK(ranks[0]->rejected() == 1 && ranks[0]->warnings().at(0).find("(uid 65534)") != std::string::npos);
  // A lower rank of another user is told nothing either.
  CHECK(status_of_child([&] {
          Rendezvous first(0, 2);
          CHECK(status_of_child([&] {
                  CHECK(::setgid(65534) == 0 && ::setuid(65534) == 0);
                  Rendezvous second(1, 2);
                  const Error error = error_of([&] { second.probe({first.endpoint(), second.endpoint()}); });
                  CHECK(error.code == Code::resource && error.errnum == EPERM);
                }) == 0);
        }) == 0);
}

void test_a_colleague_who_contradicts_is_an_error() {
  const auto refused = [](const char* why, const std::function<void(Handshake&)>& spoil, size_t length = 64,
                          int descriptors = 1) {
    auto ranks = make_ranks(3);
    const Arena arena = Arena::create(kMiB);
    ranks[0]->probe(endpoints_of(ranks));
    Handshake handshakes[2] = {{kSecret, Handshake::kMagic, Handshake::kVersion, 2, 3, kMiB, 0}, {}};
    spoil(handshakes[0]);
    const UniqueFd socket = connect_to(ranks[0]->endpoint()), again = connect_to(ranks[0]->endpoint());
    say(socket.get(), handshakes, length, descriptors);
    if (std::string(why) == "a second one") say(again.get(), handshakes, length, descriptors);
    if (length < 64) ::shutdown(socket.get(), SHUT_WR);
    const Error error = error_of([&] { ranks[0]->bind(kSecret, arena.fd(), kMiB, kTimeout); });
    CHECK(error.code == Code::internal && says(error, "handshake from ") && says(error, why));
  };
  const auto right = [](Handshake&) {};
  refused("rank 2: bad magic", [](Handshake& h) { h.magic = 0; });
  refused("rank 2: version 99", [](Handshake& h) { h.version = 99; });
  refused("rank 3: expected a rank in [1, 3)", [](Handshake& h) { h.rank = 3; });
  refused("rank 0: expected", [](Handshake& h) { h.rank = 0; });
  refused("rank -5: expected", [](Handshake& h) { h.rank = -5; });
  refused("rank 2: nranks 4 where", [](Handshake& h) { h.nranks = 4; });
  refused("rank 2: memory_bytes 4096 where", [](Handshake& h) { h.memory_bytes = 4096; });
  refused("a second one", right);
  refused("longer than 64 bytes", right, 65);
  refused("ends after 40 of 64 bytes", right, 40);
  refused("rank 2: 0 descriptors", right, 64, 0);
  refused("rank 2: 2 descriptors", right, 64, 2);
  refused("descriptors instead of one", right, 64, 9);  // more than there is room for
}

// ---- watchdog -------------------------------------------------------------------------------------------------------

struct Pair {
  UniqueFd mine, theirs;
  Pair() {
    int fds[2];
    CHECK(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds) == 0);
    mine = UniqueFd(fds[0]);
    theirs = UniqueFd(fds[1]);
  }
};

// For what takes milliseconds, on a machine that is busy with other things.
constexpr auto kSoon = 10s;

// A watch that tells whether it has barked within a time.
struct Bark {
  std::promise<void> promise;
  std::future<void> future = promise.get_future();
  uint64_t id = 0;
  explicit Bark(int fd) {
    id = Watchdog::instance().watch(fd, [this] { promise.set_value(); });
  }
  ~Bark() { Watchdog::instance().forget(id); }
  bool within(std::chrono::milliseconds time) { return future.wait_for(time) == std::future_status::ready; }
};

void test_clean_close_shows_and_bytes_do_not() {
  Pair a, b;
  Bark on_a(a.mine.get()), on_b(b.mine.get());
  const std::string noise(100000, 'x');
  CHECK(::send(a.theirs.get(), noise.data(), noise.size(), 0) == ssize_t(noise.size()));  // more than a buffer: drained
  CHECK(!on_a.within(50ms));
  a.theirs.reset();
  CHECK(on_a.within(kSoon) && !on_b.within(0ms));
  ::shutdown(b.theirs.get(), SHUT_WR);
  CHECK(on_b.within(kSoon));
}

void test_forgotten_watches_stay_silent() {
  std::atomic<int> calls{0};
  for (int i = 0; i < 300; ++i) {  // the last forget ends the thread, the next watch starts one
    Pair pair;
    const uint64_t id = Watchdog::instance().watch(pair.mine.get(), [&] { ++calls; });
    std::thread closer;
    if (i % 2) closer = std::thread([&] { pair.theirs.reset(); });
    Watchdog::instance().forget(id);
    const int after = calls;
    if (closer.joinable()) closer.join();
    pair.theirs.reset();
    CHECK(calls == after);
    Watchdog::instance().forget(id);  // unknown by now
  }
}

void test_forget_inside_and_during_the_callback() {
  Pair a, b;
  std::promise<uint64_t> id_a;
  std::promise<void> done_a, in_b;
  auto id = id_a.get_future().share();
  id_a.set_value(Watchdog::instance().watch(a.mine.get(), [&] {
    Watchdog::instance().forget(id.get());
    done_a.set_value();
  }));
  a.theirs.reset();
  CHECK(done_a.get_future().wait_for(kSoon) == std::future_status::ready);
  std::atomic<bool> finished{false};
  const uint64_t id_b = Watchdog::instance().watch(b.mine.get(), [&] {
    in_b.set_value();
    std::this_thread::sleep_for(50ms);  // long enough that a forget() that does not wait is caught
    finished = true;
  });
  b.theirs.reset();
  in_b.get_future().wait();
  Watchdog::instance().forget(id_b);
  CHECK(finished);
}

void test_watch_of_a_bad_descriptor_is_an_error() {
  const Error error = error_of([] { Watchdog::instance().watch(-1, [] {}); });
  CHECK(error.code == Code::resource && error.errnum == EBADF && says(error, "epoll_ctl"));
}

void test_ticks_go_on_until_forgotten() {
  std::atomic<int> ticks{0}, others{0};
  Pair pair;  // a hang-up meanwhile is noticed at once
  const uint64_t id = Watchdog::instance().tick([&] { ++ticks; });
  const uint64_t other = Watchdog::instance().tick([&] { ++others; });
  std::promise<void> hung_up;
  const uint64_t watch = Watchdog::instance().watch(pair.mine.get(), [&] { hung_up.set_value(); });
  pair.theirs.reset();
  CHECK(hung_up.get_future().wait_for(kSoon) == std::future_status::ready);
  for (int i = 0; i < 100 && ticks < 3; ++i) std::this_thread::sleep_for(50ms);
  CHECK(ticks >= 3);
  Watchdog::instance().forget(id);
  const int last = ticks, before = others;
  for (int i = 0; i < 100 && others < before + 2; ++i) std::this_thread::sleep_for(50ms);
  CHECK(others >= before + 2 && ticks == last);
  Watchdog::instance().forget(other);
  Watchdog::instance().forget(watch);
}

void test_watchdog_works_again_in_a_forked_child() {
  Pair parents, others;
  Bark bark(parents.mine.get());
  {  // The thread has run before the fork, and only waits: AddressSanitizer's malloc has locks that no fork frees, and
     // the child's thread would wait for one that another thread had then.
    Bark first(others.mine.get());
    others.theirs.reset();
    CHECK(first.within(kSoon));
  }
  CHECK(status_of_child([&] {
          Pair pair;
          const int before = open_descriptors();
          {
            Bark again(pair.mine.get());
            CHECK(again.id > bark.id);
            Watchdog::instance().forget(bark.id);  // means nothing here
            pair.theirs.reset();
            CHECK(again.within(kSoon));
          }
          CHECK(descriptors_settle_at(before - 1));  // the thread's are closed, and `theirs`
        }) == 0);
  CHECK(!bark.within(0ms));
  parents.theirs.reset();
  CHECK(bark.within(kSoon));
}

// A peer process that meets us, forks a child that lives on, and waits to be killed. leak: it keeps a copy of its
// socket that the fork guard does not know, which the child then holds.
void kill_a_peer(bool leak) {
  Rendezvous mine(0, 2);
  int to_parent[2];
  CHECK(::pipe2(to_parent, O_CLOEXEC) == 0);
  const Endpoint endpoint = mine.endpoint();
  const pid_t peer = fork_child([&] {
    Rendezvous rendezvous(1, 2);
    std::vector<Link> links;
    CHECK(meet(rendezvous, 1, {endpoint, rendezvous.endpoint()}, &links));
    if (leak) CHECK(::dup(links[0].socket.get()) >= 0);
    const pid_t grandchild = fork_child([] { ::pause(); });
    CHECK(::write(to_parent[1], &grandchild, sizeof grandchild) == sizeof grandchild);
    ::pause();
  });
  std::vector<Link> links;
  CHECK(meet(mine, 0, {endpoint, {}}, &links));
  pid_t grandchild = 0;
  CHECK(::read(to_parent[0], &grandchild, sizeof grandchild) == sizeof grandchild);
  Bark bark(links[1].socket.get());
  CHECK(!bark.within(20ms));
  ::kill(peer, SIGKILL);
  if (leak) {
    CHECK(!bark.within(300ms));  // the negative control: so the guard is what makes the difference
  } else {
    CHECK(bark.within(kSoon));
  }
  CHECK(::kill(grandchild, SIGKILL) == 0);  // it did live
  CHECK(bark.within(kSoon));
  wait_for(peer);
  ::close(to_parent[0]);
  ::close(to_parent[1]);
}

void test_a_killed_peer_shows_within_a_second() {
  kill_a_peer(false);
  kill_a_peer(true);
}

}  // namespace

int main() {
  ::alarm(120);
  const int before = open_descriptors();
  test_watchdog_works_again_in_a_forked_child();  // first: no thread of another test may be ending, as above
  test_fork_closes_owned_descriptors_only();
  test_no_fork_comes_between();
  test_arena_is_sealed_zeroed_and_shared();
  test_forked_child_has_no_mapping();
  test_adopt_refuses_what_could_be_pulled_away();
  test_file_size_limit_is_an_error_not_a_signal();
  test_no_descriptor_left_names_the_call();
  test_full_cgroup_v2_is_an_error();
  test_full_cgroup_v1_or_machine_is_an_error();
  test_ranks_meet();
  test_processes_meet();
  test_probe_is_false_where_nobody_listens();
  test_bind_ends_with_a_timeout_that_names_the_missing();
  test_a_rank_that_gives_up_is_noticed();
  test_strangers_do_not_disturb();
  test_other_users_are_dropped();
  test_a_colleague_who_contradicts_is_an_error();
  test_clean_close_shows_and_bytes_do_not();
  test_forgotten_watches_stay_silent();
  test_forget_inside_and_during_the_callback();
  test_watch_of_a_bad_descriptor_is_an_error();
  test_ticks_go_on_until_forgotten();
  test_a_killed_peer_shows_within_a_second();
  CHECK(descriptors_settle_at(before));
  return finish();
}
