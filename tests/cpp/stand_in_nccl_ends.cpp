// How communicators begin and end: what is in progress, errors, aborts, misuse. What ends a process happens in
// children: the test program again, with the name of a scene.
#include <fcntl.h>
#include <spawn.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <map>

#include "stand_in_nccl_tests.h"

namespace nccl_tests {
namespace {

// ---- communicators that do not block -----------------------------------------------------------------------------

void test_a_communicator_is_in_progress_until_all_have_joined() {
  const UniqueId id = new_id(), other = new_id();
  CHECK(std::memcmp(&id, &other, sizeof id) != 0);
  std::barrier<> nobody(1);
  Rank zero{0, 2, nullptr, nullptr, nobody}, one{1, 2, nullptr, nullptr, nobody};
  CHECK(init(zero, id, false) == Result::in_progress && zero.comm);
  a_while();
  CHECK(zero.state() == Result::in_progress);
  CHECK(init(one, id, false) == Result::in_progress);
  DONE(zero.settled(Result::in_progress));
  DONE(one.settled(Result::in_progress));
  CHECK(counted("comms") == 2);
  for (Rank* r : {&zero, &one}) {
    DONE(r->settled(api().CommFinalize(r->comm)));
    DONE(api().CommDestroy(r->comm));
  }
}

void test_the_first_group_connects(bool always) {
  control().set("every_group_in_background", -1, always);
  with_ranks(2, false, [&](Rank& r) {
    Memory<int> x(4, r.rank);
    const auto begin_pass = [&] {
      DONE(api().GroupStart());
      DONE(r.rank == 0 ? api().Send(x, 4, DataType::int32, 1, r.comm, r.stream)
                       : api().Recv(x, 4, DataType::int32, 0, r.comm, r.stream));
      return api().GroupEnd();
    };
    if (r.rank == 1) r.all.arrive_and_wait();
    CHECK(begin_pass() == Result::in_progress);
    if (r.rank == 0) {
      a_while();
      CHECK(r.state() == Result::in_progress);
      CHECK(r.idle());  // it is not even in the stream
      r.all.arrive_and_wait();
    }
    DONE(r.settled(Result::in_progress));
    r.sync();
    CHECK(x.all(0));
    const Result second = begin_pass();
    CHECK(second == (always ? Result::in_progress : Result::success));
    DONE(r.settled(second));
    const Result first_reduce = api().AllReduce(x, x, 4, DataType::int32, RedOp::sum, r.comm, r.stream);
    CHECK(first_reduce == Result::in_progress);  // connections of its own
    DONE(r.settled(first_reduce));
    const Result second_reduce = api().AllReduce(x, x, 4, DataType::int32, RedOp::sum, r.comm, r.stream);
    CHECK(second_reduce == second);
    DONE(r.settled(second_reduce));
  });
  control().reset();
}

void test_init_that_fails() {
  control().set("fail_init", 0, int(Result::system_error));
  std::barrier<> nobody(1);
  Rank r{0, 1, nullptr, nullptr, nobody};
  CHECK(init(r, new_id(), true) == Result::system_error && !r.comm);
  CHECK(r.settled(init(r, new_id(), false)) == Result::system_error);
  CHECK(std::string(api().GetLastError(r.comm)).find("planted") != std::string::npos);
  DONE(api().CommAbort(r.comm));
  control().reset();
  Config old;
  old.magic = 1;
  CHECK(api().CommInitRankConfig(&r.comm, 1, new_id(), 0, &old) == Result::invalid_argument);
  CHECK(api().CommInitRankConfig(&r.comm, 1, new_id(), 1, nullptr) == Result::invalid_argument);
}

void test_a_device_that_is_shared() {
  control().set("refuse_shared_device", -1, 1);
  const UniqueId id = new_id();
  std::vector<std::thread> threads;
  for (int i = 0; i < 2; ++i)
    threads.emplace_back([&, i] {
      std::barrier<> nobody(1);
      Rank r{i, 2, nullptr, nullptr, nobody};
      CHECK(r.settled(init(r, id, false)) == Result::invalid_usage);
      CHECK(std::string(api().GetLastError(r.comm)).find("Duplicate GPU detected") != std::string::npos);
      r.abort();
    });
  for (auto& thread : threads) thread.join();
  with_ranks(2, false, [](Rank&) {});  // on two devices
  control().reset();
}

// ---- errors and aborts -------------------------------------------------------------------------------------------

// Enqueues something that hangs on rank 0 and does not concern the others; both abort.
void hangs(bool blocking, const std::function<void(Rank&, Memory<int>&)>& body) {
  with_ranks(2, blocking, [&](Rank& r) {
    Memory<int> x(8, r.rank);
    DONE(r.settled(api().AllReduce(x, x, 8, DataType::int32, RedOp::sum, r.comm, r.stream)));
    r.sync();
    body(r, x);
    if (r.rank == 0) {
      a_while();
      CHECK(!r.idle());
      std::thread([&] { r.abort(); }).join();
      CHECK(eventually([&] { return r.idle(); }));
    }
    r.all.arrive_and_wait();
    if (r.comm) r.abort();
    r.sync();
    r.all.arrive_and_wait();
    CHECK(x.all(1));  // nothing has moved
  });
}

void test_abort_ends_what_waits() {
  const int64_t aborts = counted("aborts");
  hangs(true, [](Rank& r, Memory<int>& x) {  // one side of an all-reduce, and what waits behind it
    if (r.rank == 1) return;
    for (int i = 0; i < 2; ++i) DONE(api().AllReduce(x, x, 8, DataType::int32, RedOp::sum, r.comm, r.stream));
  });
  hangs(false, [](Rank& r, Memory<int>& x) {  // ranks that do not agree on the number of elements
    DONE(r.settled(api().AllReduce(x, x, size_t(8 - r.rank), DataType::int32, RedOp::sum, r.comm, r.stream)));
  });
  hangs(false, [](Rank& r, Memory<int>& x) {  // nor on the size of a message
    DONE(r.settled(r.rank == 0 ? api().Recv(x, 8, DataType::int32, 1, r.comm, r.stream)
                               : api().Send(x, 7, DataType::int32, 0, r.comm, r.stream)));
  });
  CHECK(counted("aborts") - aborts == 6);
}

// Who comes to where another has left waits, too, until its own abort.
void test_a_peer_that_comes_after_an_abort() {
  with_ranks(2, true, [](Rank& r) {
    Memory<int> x(8, r.rank), y(8, r.rank);
    const auto both = [&] {
      DONE(api().GroupStart());
      DONE(r.rank == 0 ? api().Recv(x, 8, DataType::int32, 1, r.comm, r.stream)
                       : api().Send(x, 8, DataType::int32, 0, r.comm, r.stream));
      DONE(api().AllReduce(y, y, 8, DataType::int32, RedOp::sum, r.comm, r.stream));
      DONE(api().GroupEnd());
    };
    both();
    r.sync();
    CHECK(x.all(1) && y.all(1));
    x[0] = r.rank;
    for (const int turn : {0, 1}) {
      if (turn == r.rank) {
        both();
        a_while();
        CHECK(!r.idle());
        r.abort();
        r.sync();
      }
      r.all.arrive_and_wait();
    }
    CHECK(x[0] == r.rank && y.all(1));
  });
}

// What moves before the abort has moved: nothing is undone, and the rest is left.
void test_abort_during_a_connection() {
  with_ranks(2, false, [](Rank& r) {
    Memory<int> x(8, r.rank);
    if (r.rank == 0) {
      CHECK(api().Send(x, 8, DataType::int32, 1, r.comm, r.stream) == Result::in_progress);
      a_while();
      CHECK(r.state() == Result::in_progress);
      r.abort();
      CHECK(r.idle());
    }
    r.all.arrive_and_wait();
    if (r.comm) r.abort();
  });
  std::barrier<> nobody(1);
  Rank alone{0, 2, nullptr, nullptr, nobody};
  CHECK(init(alone, new_id(), false) == Result::in_progress);
  alone.abort();
}

void test_a_lost_message() {
  control().set("lose_messages", 1, 1);
  const int64_t lost = counted("lost", 1);
  with_ranks(2, true, [&](Rank& r) {
    Memory<int> x(8, r.rank);
    DONE(r.rank == 0 ? api().Recv(x, 8, DataType::int32, 1, r.comm, r.stream)
                     : api().Send(x, 8, DataType::int32, 0, r.comm, r.stream));
    if (r.rank == 1) {
      r.sync();  // it does not notice
      DONE(api().Send(x, 8, DataType::int32, 0, r.comm, r.stream));
      r.sync();
    }
    r.all.arrive_and_wait();
    if (r.rank == 0) {
      a_while();
      CHECK(!r.idle());
    }
    r.abort();
    r.sync();
    r.all.arrive_and_wait();
    CHECK(x.all(r.rank));
  });
  CHECK(counted("lost", 1) - lost == 1);
  control().reset();
}

void test_errors_that_come_later() {
  with_ranks(2, false, [](Rank& r) {
    Memory<int> x(8, r.rank);
    DONE(r.settled(api().AllReduce(x, x, 8, DataType::int32, RedOp::sum, r.comm, r.stream)));
    r.sync();
    r.all.arrive_and_wait();
    if (r.rank == 0) {
      DONE(r.settled(api().AllReduce(x, x, 8, DataType::int32, RedOp::sum, r.comm, r.stream)));
      control().fail(0, int(Result::remote_error), "the cable is out");
      CHECK(r.state() == Result::remote_error);
      CHECK(api().AllReduce(x, x, 8, DataType::int32, RedOp::sum, r.comm, r.stream) == Result::remote_error);
      DONE(api().GroupStart());
      CHECK(api().Send(x, 8, DataType::int32, 1, r.comm, r.stream) == Result::remote_error);
      CHECK(api().GroupEnd() == Result::remote_error);
      CHECK(api().GetLastError(r.comm) == std::string("the cable is out"));
    }
    r.all.arrive_and_wait();
    if (r.rank == 1) DONE(r.settled(api().AllReduce(x, x, 8, DataType::int32, RedOp::sum, r.comm, r.stream)));
    a_while();
    CHECK(!r.idle());  // nothing moves any more
    r.abort();
    r.sync();
    CHECK(x.all(1));
  });
}

void test_abort_that_hangs() {
  std::barrier<> nobody(1);
  Rank r{0, 1, nullptr, nullptr, nobody};
  DONE(init(r, new_id(), true));
  control().set("abort_hangs_s", 0, 1);
  const auto begun = Clock::now();
  r.abort();
  CHECK(Clock::now() - begun >= std::chrono::seconds(1));
  DONE(init(r, new_id(), true));
  control().set("abort_hangs_s", 0, -1);
  std::atomic<bool> over{false};
  std::thread aborts([&] {
    r.abort();
    over = true;
  });
  a_while();
  CHECK(!over);
  control().set("abort_hangs_s", 0, 0);
  aborts.join();
}

void test_abort_of_what_a_graph_holds() {
  const int64_t late = counted("late_replays");
  with_ranks(2, true, [](Rank& r) {
    Memory<int> x(8, r.rank);
    Graph graph(r, [&] { DONE(api().AllReduce(x, x, 8, DataType::int32, RedOp::sum, r.comm, r.stream)); });
    const int64_t groups = counted("groups", 0);
    if (r.rank == 0) {
      for (int i = 0; i < 2; ++i) OK(cudaGraphLaunch(graph.exec, r.stream));
      CHECK(eventually([&] { return counted("groups", 0) > groups; }));  // the first one runs, and waits for rank 1
    }
    a_while();
    CHECK(r.idle() == (r.rank == 1));
    std::thread aborts([&] { r.abort(); });
    CHECK(eventually([&] { return r.idle(); }));  // though the abort still waits for the graph
    graph.destroy();
    aborts.join();
    CHECK(x.all(r.rank));
  });
  CHECK(counted("late_replays") - late == 1);
}

// ---- children ----------------------------------------------------------------------------------------------------

struct Ended {
  int status = -1;
  std::string said;  // on stderr
  bool aborted_with(const char* text) const {
    return WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT && said.find(text) != std::string::npos;
  }
  bool well() const { return WIFEXITED(status) && WEXITSTATUS(status) == 0; }
};

// Runs a scene in a child, to its end. Its own alarm is the deadline.
Ended play(const std::string& scene, const std::string& knobs = "") {
  int ends[2];
  if (!CHECK(pipe2(ends, O_CLOEXEC) == 0)) return {};
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, ends[1], STDERR_FILENO);
  posix_spawn_file_actions_addopen(&actions, STDOUT_FILENO, "/dev/null", O_WRONLY, 0);
  std::string program = "test_stand_in_nccl", name = scene, variable = "STAND_IN_NCCL=" + knobs;
  char* argv[] = {program.data(), name.data(), nullptr};
  std::vector<char*> environment{variable.data()};
  for (char** one = environ; *one; ++one) environment.push_back(*one);
  environment.push_back(nullptr);
  pid_t pid = -1;
  CHECK(posix_spawn(&pid, "/proc/self/exe", &actions, nullptr, argv, environment.data()) == 0);
  posix_spawn_file_actions_destroy(&actions);
  close(ends[1]);
  Ended ended;
  char text[4096];
  for (ssize_t got; (got = read(ends[0], text, sizeof text)) > 0;) ended.said.append(text, size_t(got));
  close(ends[0]);
  CHECK(waitpid(pid, &ended.status, 0) == pid);
  return ended;
}

// A communicator of one rank, or of two whose other rank is this thread's too.
struct Solo {
  explicit Solo(int ranks = 1) {
    const UniqueId id = new_id();
    Config config;
    config.blocking = 0;
    for (int i = 0; i < ranks; ++i) api().CommInitRankConfig(&comms[i], ranks, id, i, &config);
    for (int i = 0; i < ranks; ++i) settle(comms[i]);
    OK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    OK(cudaMalloc(&memory, 64));
  }
  static void settle(Comm comm) {
    Result state = Result::in_progress;
    CHECK(eventually([&] { return api().CommGetAsyncError(comm, &state), state != Result::in_progress; }));
  }
  Result send(size_t count = 1, int peer = 0) {
    return api().Send(memory, count, DataType::int8, peer, comms[0], stream);
  }
  Result reduce(const void* from = nullptr) {
    return api().AllReduce(from ? from : memory, memory, 1, DataType::int8, RedOp::sum, comms[0], stream);
  }
  Comm comms[2]{};
  cudaStream_t stream = nullptr;
  void* memory = nullptr;
};

using Misuse = std::pair<std::function<void()>, const char*>;

const std::map<std::string, Misuse>& misuses() {
  static const std::map<std::string, Misuse> all = {
      {"a peer too many", {[] { Solo().send(1, 1); }, "ncclSend: peer 1 of 1 ranks"}},
      {"a negative count", {[] { Solo().send(size_t(-3)); }, "ncclSend: -3 elements"}},
      {"memory that is not known", {[] { Solo().reduce("x"); }, "neither device nor registered"}},
      {"past the end", {[] { Solo().send(65); }, "past the end"}},
      {"memory that has gone",
       {[] {
          Solo solo;
          std::barrier<> nobody(1);
          const Rank r{0, 1, solo.comms[0], solo.stream, nobody};
          Graph graph(r, [&] { r.settled(solo.reduce()); });
          cudaFree(solo.memory);
          OK(cudaGraphLaunch(graph.exec, solo.stream));
          r.sync();
        },
        "an NCCL operation: "}},
      {"after destroy",
       {[] {
          Solo solo;
          api().CommDestroy(solo.comms[0]);
          solo.reduce();
        },
        "was destroyed or aborted"}},
      {"after abort",
       {[] {
          Solo solo;
          api().CommAbort(solo.comms[0]);
          Result error{};
          api().CommGetAsyncError(solo.comms[0], &error);
        },
        "was destroyed or aborted"}},
      {"after finalize",
       {[] {
          Solo solo;
          api().CommFinalize(solo.comms[0]);
          Solo::settle(solo.comms[0]);
          solo.reduce();
        },
        "after ncclCommFinalize"}},
      {"while in progress",
       {[] {
          Solo solo(2);
          solo.send(1, 1);
          solo.send(1, 1);
        },
        "still in progress"}},
      {"two communicators",
       {[] {
          Solo one, two;
          api().GroupStart();
          one.reduce();
          two.reduce();
          api().GroupEnd();
        },
        "a group of two communicators"}},
      {"two streams",
       {[] {
          Solo solo;
          api().GroupStart();
          solo.reduce();
          solo.stream = nullptr;
          solo.reduce();
          api().GroupEnd();
        },
        "a group of two streams"}},
      {"a stream of another device",
       {[] {
          Solo solo;
          cudaSetDevice(1);
          cudaStreamCreate(&solo.stream);
          solo.reduce();
        },
        "rank 0 is on device 0, the stream on 1"}},
      {"to itself, alone", {[] { Solo().send(); }, "sends to itself"}},
      {"an end without a start", {[] { api().GroupEnd(); }, "ncclGroupEnd without"}},
      {"a rank twice",
       {[] {
          const UniqueId id = new_id();
          Comm comm = nullptr;
          api().CommInitRankConfig(&comm, 1, id, 0, nullptr);
          api().CommInitRankConfig(&comm, 1, id, 0, nullptr);
        },
        "joins twice"}},
      {"ranks that do not agree",
       {[] {
          const UniqueId id = new_id();
          Comm comm = nullptr;
          api().CommInitRankConfig(&comm, 1, id, 0, nullptr);
          api().CommInitRankConfig(&comm, 2, id, 1, nullptr);
        },
        "joins 1 ranks"}},
      {"no id",
       {[] {
          Comm c;
          api().CommInitRankConfig(&c, 1, {}, 0, nullptr);
        },
        "no id of ncclGetUniqueId"}},
      {"a graph of what was destroyed",
       {[] {
          control().set("graphs_hold", -1, 0);
          Solo solo;
          std::barrier<> nobody(1);
          const Rank r{0, 1, solo.comms[0], solo.stream, nobody};
          Graph graph(r, [&] { r.settled(solo.reduce()); });
          api().CommDestroy(solo.comms[0]);
          OK(cudaGraphLaunch(graph.exec, solo.stream));
          r.sync();
        },
        "was destroyed"}},
      {"a knob that is none", {[] { control().set("colour", -1, 0); }, "'colour' is no knob"}},
  };
  return all;
}

void test_misuse_is_fatal() {
  for (const auto& [name, misuse] : misuses()) {
    const Ended ended = play(name);
    if (!CHECK(ended.aborted_with(misuse.second)))
      std::fprintf(stderr, "  %s: status %#x: %s\n", name.c_str(), unsigned(ended.status), ended.said.c_str());
  }
}

void test_every_wait_has_an_end() {
  CHECK(play("missing peer", "deadline_s=1").aborted_with("in a group of all-reduce"));
  CHECK(play("missing rank", "deadline_s=1").aborted_with("rank 0 of 2 waits for the others"));
  CHECK(play("exit").well());  // what hangs does not keep the process
  CHECK(play("version", "version=21700").well());
  CHECK(play("version", "version=newest").aborted_with("no whole number"));
}

}  // namespace

void test_communicators() {
  test_a_communicator_is_in_progress_until_all_have_joined();
  for (const bool always : {false, true}) test_the_first_group_connects(always);
  test_init_that_fails();
  test_a_device_that_is_shared();
}

void test_errors_and_aborts() {
  test_abort_ends_what_waits();
  test_a_peer_that_comes_after_an_abort();
  test_abort_during_a_connection();
  test_a_lost_message();
  test_errors_that_come_later();
  test_abort_that_hangs();
  test_abort_of_what_a_graph_holds();
}

void test_what_ends_the_process() {
  test_misuse_is_fatal();
  test_every_wait_has_an_end();
}

int play_scene(const std::string& scene) {
  const rlimit no_core{0, 0};
  setrlimit(RLIMIT_CORE, &no_core);
  if (scene == "missing rank") {
    Comm comm = nullptr;
    api().CommInitRankConfig(&comm, 2, new_id(), 0, nullptr);
  } else if (scene == "missing peer" || scene == "exit") {
    Solo solo(2);
    solo.reduce();
    api().AllReduce(solo.memory, solo.memory, 1, DataType::int8, RedOp::sum, solo.comms[1], solo.stream);
    for (Comm comm : solo.comms) Solo::settle(comm);
    if (scene == "exit") return finish();
    cudaStreamSynchronize(solo.stream);  // both on one stream: neither comes to an end
  } else if (scene == "version") {
    try {
      api();
    } catch (const dpcomm::Error& error) {
      return std::string(error.what()).find("2.17.0") != std::string::npos ? 0 : 1;
    }
  } else {
    misuses().at(scene).first();
  }
  return 2;
}

}  // namespace nccl_tests
