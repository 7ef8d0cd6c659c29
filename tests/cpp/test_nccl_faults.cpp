// ./test_nccl_faults   What engine nccl answers when something goes wrong, on stand-ins for the CUDA runtime and for
// NCCL: calls end with the same cause on all ranks, in time, with NaNs in their buckets. A stop after 240 s ends
// whatever hangs.
#include <sys/wait.h>

#include <barrier>

#include "nccl_ranks.h"

using namespace nccl_ranks;
using stand_in::machine;
using namespace std::chrono_literals;

// Exceptions that two threads hold are counted by atomics inside of libstdc++, where the detector does not look.
extern "C" const char* __tsan_default_suppressions() {
  return "race:std::runtime_error::~runtime_error\nrace:std::__exception_ptr::exception_ptr::_M_release\n";
}

namespace {

constexpr double kShortS = 1.5;  // of calls that are to time out; verify() has no more
constexpr double kSoonS = 10;    // for what takes a second at most
constexpr int64_t kElems = 5000;

struct Kind {
  CodecKind codec;
  Algorithm algorithm;
};
constexpr Kind kCoded{CodecKind::fp16, Algorithm::direct}, kRinged{CodecKind::fp16, Algorithm::ring},
    kOwn{CodecKind::none, Algorithm::automatic}, kNative{CodecKind::fp16, Algorithm::native};
constexpr Kind kKinds[] = {kCoded, kRinged, kOwn, kNative};

// One call of one rank, on a stream of its own.
struct Flight {
  Flight(const Group& group, int r, const Kind& kind, int64_t elems = kElems)
      : data(elems, r, group.device_of(r)), stream(group.device_of(r)), queue(group.queue(r)), rank(r) {
    data.call.codec = kind.codec, data.call.algorithm = kind.algorithm;
  }
  void start() { pending = queue.enqueue(data.call, stream.number()); }
  bool untouched() const { return data.all(float(rank + 1)); }

  // What the call ends with. It has reached the GPU; nothing touches the bucket any more.
  Error error() {
    CHECK(pending->synchronize(kLongS, {}) && pending->done());
    check_left_alone();
    CHECK(data.call.dtype != Dtype::float32 || data.all_nan());
    return error_of(*pending);
  }
  void check_left_alone() {
    const std::vector<float> left = data.x;
    std::this_thread::sleep_for(5ms);
    CHECK(std::memcmp(left.data(), data.x.data(), left.size() * sizeof(float)) == 0);
  }
  // The same of a call that may be refused while it is put on the stream.
  Error failure() {
    try {
      start();
    } catch (const Error& error) {
      CHECK(stream.done() && (untouched() || data.all_nan()));
      check_left_alone();
      return error;
    }
    return error();
  }

  OnDevice<> data;
  const StreamOf stream;
  Queue& queue;
  const int rank;
  std::shared_ptr<Pending> pending;
};

// Every further call is refused at once and names the cause.
void check_poisoned(const Group& group, const std::vector<std::string>& words) {
  for (int r = 0; r < group.size(); ++r)
    for (int i = 0; i < 2; ++i) {
      CHECK(eventually([&] { return failed(group, r); }));
      if (i == 0) error_of([&] { group.engine(r).check(); });  // this rank has been told
      Flight late(group, r, kCoded);
      const auto start = Clock::now();
      CHECK(says(error_of([&] { late.start(); }), Code::aborted, words));
      CHECK(seconds_since(start) < kSoonS && late.stream.done() && late.untouched());
    }
}

// All ranks but `but` call; their errors go to `judge`.
void fail_all(const Group& group, const Kind& kind, const std::function<void(int, const Error&)>& judge, int but = -1) {
  group.all([&](int r) {
    if (r == but) return;
    Flight flight(group, r, kind);
    judge(r, flight.failure());
  });
}

// The same, and a fault while the calls are in flight: rank `but` has not called, so that none can end.
void fail_in_flight(const Group& group, const Kind& kind, int but, const std::function<void()>& fault,
                    const std::function<void(int, const Error&)>& judge) {
  std::atomic<int> under_way{0};
  group.all([&](int r) {
    if (r == but) {
      CHECK(eventually([&] { return under_way == group.size() - 1; }));
      std::this_thread::sleep_for(20ms);
      return fault();
    }
    Flight flight(group, r, kind);
    flight.start();
    ++under_way;
    const auto start = Clock::now();
    const Error error = flight.error();
    CHECK(seconds_since(start) < kSoonS);
    judge(r, error);
  });
}

// ---- ranks that do not come --------------------------------------------------------------------------------------

void test_a_rank_that_never_calls_is_named() {
  for (const Kind& kind : kKinds) {
    Group group(Shape{3, kShortS});
    if (!group.joined()) return;
    fail_all(
        group, kind,
        [](int, const Error& error) {
          CHECK(says(error, Code::timeout, {"for rank 2 (pid", "last seq 0", "at seq 1"}));
          CHECK(error.waiting_for == std::vector<int>{2});
        },
        2);
    check_poisoned(group, {"because: [TIMEOUT] ", "rank 2 (pid"});
  }
}

// Nobody knows who is to blame: ranks that wait for each other are late as well.
void test_a_lost_message_is_a_timeout() {
  for (const Kind& kind : kKinds) {
    Group group(Shape{3, kShortS});
    if (!group.joined()) return;
    control().set("lose_messages", 1, -1);
    std::atomic<int> timeouts{0};
    fail_all(group, kind, [&](int, const Error& error) {
      CHECK(error.code == Code::timeout || says(error, Code::aborted, {"because: [TIMEOUT]"}));
      timeouts += error.code == Code::timeout;
    });
    CHECK(timeouts >= 1);
    control().reset();
    check_poisoned(group, {"[TIMEOUT]"});
  }
}

void test_a_rank_that_dies_is_lost() {
  for (const Kind& kind : kKinds) {
    Group group(Shape{3});
    if (!group.joined()) return;
    fail_in_flight(
        group, kind, 2, [&] { group.die(2); },
        [](int, const Error& error) {
          CHECK(says(error, Code::peer_lost, {"rank 2 (pid", "disappeared"}) && error.rank == 2);
        });
  }
}

void test_a_rank_that_closes_early_is_lost() {
  for (const Kind& kind : kKinds) {
    Group group(Shape{3});
    if (!group.joined()) return;
    CHECK(usable(group));
    fail_in_flight(
        group, kind, 1, [&] { group.queue(1).close(1); },
        [](int, const Error& error) {
          CHECK(says(error, Code::peer_lost, {"rank 1 closed its connection (clean shutdown) at seq 2"}));
          CHECK(error.rank == 1);
        });
  }
}

// A goodbye is no failure until somebody calls.
void test_a_goodbye_disturbs_nobody_at_first() {
  Group group(Shape{2});
  if (!group.joined()) return;
  group.queue(0).close(1);
  std::this_thread::sleep_for(300ms);
  group.engine(1).check();
  Flight flight(group, 1, kCoded);
  CHECK(says(flight.failure(), Code::peer_lost, {"rank 0 closed its connection (clean shutdown) at seq 0"}));
}

void test_a_death_is_seen_while_nothing_is_in_flight() {
  Group group(Shape{3});
  if (!group.joined()) return;
  CHECK(usable(group));
  group.die(1);
  for (const int r : {0, 2}) {
    CHECK(eventually([&] { return failed(group, r); }, kSoonS));
    CHECK(says(error_of([&] { group.engine(r).check(); }), Code::peer_lost, {"rank 1 (pid", "disappeared"}));
    Flight late(group, r, kCoded);
    CHECK(says(error_of([&] { late.start(); }), Code::aborted, {"because: [PEER_LOST] rank 1"}) && late.untouched());
  }
}

// ---- ranks that say different things -----------------------------------------------------------------------------

struct Lie {
  const char* text;
  void (*tell)(Call&);
};
const Lie kLies[] = {
    {"numel: rank 0 has 5000, rank 1 has 4999", [](Call& c) { c.counts[0] = 4999; }},
    {"numel: rank 0 has 5000, rank 1 has 1", [](Call& c) { c.counts[0] = 1; }},
    {"numel: rank 0 has 5000, rank 1 has 0", [](Call& c) { c.counts[0] = 0; }},
    {"op: rank 0 has sum, rank 1 has mean", [](Call& c) { c.op = Op::mean; }},
    {"codec: rank 0 has", [](Call& c) { c.codec = c.codec == CodecKind::none ? CodecKind::fp16 : CodecKind::none; }},
    {"algorithm: rank 0 has", [](Call& c) { c.algorithm = Algorithm::ring; }},
    {"rank 0 is in no bucket, rank 1 in bucket 3", [](Call& c) { c.bucket = 3; }},
    {"number of tensors: rank 0 has 1, rank 1 has 2",
     [](Call& c) {
       c.counts = {2560, 2440};
       c.addresses.push_back(c.addresses[0] + 2560 * 4);
     }},
};
const Lie kOfWholeNumbers = {"dtype: rank 0 has float32, rank 1 has int32", [](Call& c) { c.dtype = Dtype::int32; }};

void check_mismatch(const Kind& kind, const Lie& lie, int ranks) {
  Group group(Shape{ranks});
  if (!group.joined()) return;
  group.all([&](int r) {
    Flight flight(group, r, kind);
    if (r == 1) lie.tell(flight.data.call);
    const auto start = Clock::now();
    try {
      flight.start();
    } catch (const Error& error) {
      CHECK(flight.stream.done() && says(error, Code::mismatch, {lie.text, "(seq 1)"}));
      return;
    }
    CHECK(flight.pending->synchronize(kLongS, {}));
    CHECK(seconds_since(start) < kSoonS);
    CHECK(says(error_of(*flight.pending), Code::mismatch, {lie.text, "(seq 1)", "same order"}));
    const Call& call = flight.data.call;  // what it named is filled, and nothing behind it
    const int64_t filled = call.dtype != Dtype::float32 ? 0 : call.counts.size() > 1 ? kElems : call.counts[0];
    for (int64_t i = 0; i < filled; i += 97) CHECK(std::isnan(flight.data.x[size_t(i)]));
    for (int64_t i = filled; i < kElems; ++i) CHECK(call.dtype != Dtype::float32 || flight.data.x[size_t(i)] == r + 1);
    flight.check_left_alone();
  });
  check_poisoned(group, {"because: [MISMATCH] ", lie.text});
}

// Where NCCL would wait for ever, or not notice.
void test_mismatches_are_told_to_all() {
  for (const Lie& lie : kLies) {
    check_mismatch(kCoded, lie, 3);
    check_mismatch(kOwn, lie, 2);
  }
  check_mismatch(kRinged, kLies[0], 2);
  check_mismatch(kOwn, kOfWholeNumbers, 3);
}

// The negative control: what all ranks say is no mismatch.
void test_what_all_say_is_no_mismatch() {
  Group group(Shape{2});
  if (!group.joined()) return;
  for (const Lie& lie : kLies)
    group.all([&](int r) {
      Flight flight(group, r, kCoded);
      lie.tell(flight.data.call);
      flight.start();
      CHECK(flight.pending->synchronize(kLongS, {}) && !flight.pending->error());
    });
  CHECK(usable(group));
}

void test_calls_in_another_order_are_a_mismatch() {
  Group group(Shape{2});
  if (!group.joined()) return;
  group.all([&](int r) {
    Flight first(group, r, kCoded), second(group, r, kCoded);
    first.data.call.bucket = r, second.data.call.bucket = 1 - r;
    CHECK(says(first.failure(), Code::mismatch, {"rank 0 is in bucket 0, rank 1 in bucket 1"}));
    second.failure();
  });
  check_poisoned(group, {"rank 0 is in bucket 0, rank 1 in bucket 1"});
}

// ---- somebody gives up -------------------------------------------------------------------------------------------

void test_abort_ends_calls_in_flight() {
  for (const Kind& kind : kKinds) {
    Group group(Shape{3});
    if (!group.joined()) return;
    fail_in_flight(
        group, kind, 1, [&] { group.engine(1).abort("enough"); },
        [](int, const Error& error) { CHECK(says(error, Code::aborted, {"rank 1 gave up at seq 0: enough"})); });
    check_poisoned(group, {"rank 1 gave up", "enough"});
  }
}

// All of them are on their streams when the first one fails.
void test_calls_behind_one_that_fails_fail_too() {
  Group group(Shape{2});
  if (!group.joined()) return;
  std::vector<std::unique_ptr<Flight>> all;
  for (int i = 0; i < 8; ++i) {
    all.push_back(std::make_unique<Flight>(group, 0, kKinds[i % 4]));
    all.back()->start();
  }
  group.engine(1).abort("enough");
  for (auto& flight : all) CHECK(says(flight->error(), Code::aborted, {"rank 1 gave up at seq 0: enough"}));
  check_poisoned(group, {"enough"});
}

// What has ended well stays well.
void test_a_call_that_was_seen_to_end_well_stays_well() {
  Group group(Shape{2});
  if (!group.joined()) return;
  Flight a(group, 0, kCoded), b(group, 1, kCoded);
  a.start(), b.start();
  CHECK(a.pending->synchronize(kLongS, {}) && !a.pending->error());
  CHECK(b.pending->synchronize(kLongS, {}) && !b.pending->error());
  group.engine(1).abort("enough");
  CHECK(eventually([&] { return failed(group, 0); }));
  CHECK(!a.pending->error() && a.data.all(3) && b.data.all(3));
}

void test_close_ends_what_is_in_flight() {
  Group group(Shape{2});
  if (!group.joined()) return;
  Flight mine(group, 0, kCoded);
  mine.start();
  const auto start = Clock::now();
  group.queue(0).close(0);
  CHECK(seconds_since(start) < kLongS);
  CHECK(says(mine.error(), Code::aborted, {"rank 0 gave up", "closed while operations were in flight"}));
  CHECK(says(error_of([&] { mine.start(); }), Code::aborted, {"has been closed"}));
  CHECK(eventually([&] { return failed(group, 1); }));
  Flight theirs(group, 1, kCoded);
  CHECK(says(error_of([&] { theirs.start(); }), Code::aborted, {"rank 0 gave up"}) && theirs.untouched());
}

// ---- NCCL --------------------------------------------------------------------------------------------------------

void test_an_error_of_nccls_own_is_told_to_all() {
  Group group(Shape{3});
  if (!group.joined()) return;
  fail_in_flight(
      group, kCoded, 2, [] { control().fail(1, int(nccl::Result::remote_error), "planted"); },
      [](int, const Error& error) {
        CHECK(says(error, Code::aborted, {"rank 1 gave up", "NCCL: planted (remote process exited"}));
      });
  check_poisoned(group, {"rank 1 gave up", "remote process exited"});
}

// NCCL often notices first that a peer has died; the cause is the death.
void test_the_cause_of_nccls_error_is_told_where_it_is_known() {
  Group group(Shape{3});
  if (!group.joined()) return;
  fail_in_flight(
      group, kCoded, 2,
      [&] {
        for (const int r : {0, 1}) control().fail(r, int(nccl::Result::remote_error), "planted");
        group.die(2);
      },
      [](int, const Error& error) { CHECK(says(error, Code::peer_lost, {"rank 2 (pid", "disappeared"})); });
}

void test_a_call_that_nccl_refuses() {
  for (const Kind& kind : {kCoded, kOwn, kNative}) {
    Group group(Shape{2});
    if (!group.joined()) return;
    control().fail(0, int(nccl::Result::system_error), "planted");
    Flight mine(group, 0, kind), theirs(group, 1, kind);
    theirs.start();
    CHECK(says(mine.failure(), Code::aborted, {"rank 0 gave up", "planted (unhandled system error"}));
    CHECK(mine.data.all_nan());
    CHECK(says(theirs.error(), Code::aborted, {"rank 0 gave up", "unhandled system error"}));
    check_poisoned(group, {"rank 0 gave up"});
  }
}

void test_nccl_that_cannot_join() {
  control().set("fail_init", 1, int(nccl::Result::internal_error));
  {
    Group group(Shape{3});
    for (const auto& error : group.unjoined)
      CHECK(error && says(*error, Code::aborted, {"rank 1 gave up", "planted: initialization fails (internal error"}));
  }
  control().reset();
  control().set("refuse_shared_device", -1, 1);
  {
    Shape shape{2};
    shape.devices = 1;
    Group group(shape);
    for (const auto& error : group.unjoined)
      CHECK(error && says(*error, Code::aborted, {"gave up", "Duplicate GPU detected : rank"}));
  }
  control().reset();
  CHECK(counted("comms") == 0);
}

void test_a_rank_that_never_joins() {
  Shape shape{3};
  shape.connect_s = 1, shape.absent = 2;
  Group group(shape);
  int timeouts = 0;
  for (const int r : {0, 1}) {
    const Error* const error = group.unjoined[size_t(r)].get();
    if (!CHECK(error)) continue;
    timeouts += error->code == Code::timeout;
    CHECK(error->code == Code::timeout || says(*error, Code::aborted, {"because: [TIMEOUT]"}));
    CHECK(says(*error, error->code, {"rank 2 (pid"}));
  }
  CHECK(timeouts >= 1);
}

// ---- the runtime -------------------------------------------------------------------------------------------------

void test_a_launch_that_is_refused() {
  Group group(Shape{2});
  if (!group.joined()) return;
  Flight mine(group, 0, kCoded), theirs(group, 1, kCoded);
  theirs.start();
  machine().launch = cudaErrorLaunchOutOfResources;
  const Error error = error_of([&] { mine.start(); });
  machine().launch = cudaSuccess;
  CHECK(says(error, Code::cuda, {"rank 0/2", "cudaLaunchKernel", "cudaErrorLaunchOutOfResources"}));
  CHECK(mine.stream.done() && mine.untouched());
  CHECK(says(theirs.error(), Code::aborted, {"rank 0 gave up", "cudaLaunchKernel"}));
  check_poisoned(group, {"rank 0 gave up", "cudaLaunchKernel"});
}

// Some steps are on the stream by then; what the caller's stream does next comes behind them.
void test_a_launch_that_is_refused_in_the_middle() {
  Group group(Shape{2});
  if (!group.joined()) return;
  Flight mine(group, 0, kCoded, 2000000), theirs(group, 1, kCoded, 2000000);
  stand_in::clear_log();
  machine().log = true;
  std::thread other([&] {
    CHECK(eventually([] { return stand_in::log().size() > 20; }));
    machine().launch = cudaErrorLaunchOutOfResources;
  });
  const Error error = error_of([&] { mine.start(); });
  other.join();
  machine().log = false;
  machine().launch = cudaSuccess;
  CHECK(says(error, Code::cuda, {"rank 0/2", "cudaLaunchKernel"}));
  CHECK(mine.stream.done());
  mine.check_left_alone();
  CHECK(says(error_of([&] { theirs.start(); }), Code::aborted, {"rank 0 gave up", "cudaLaunchKernel"}));
}

void test_a_stream_that_does_not_exist() {
  Group group(Shape{2});
  if (!group.joined()) return;
  Flight flight(group, 0, kCoded);
  const StreamOf elsewhere(1);
  for (const uintptr_t stream : {elsewhere.number(), uintptr_t{0x7ffffff0}})
    CHECK(says(error_of([&] { group.queue(0).enqueue(flight.data.call, stream); }), Code::cuda,
               {"rank 0/2", "stream 0x", "exist, on this device?"}));
  CHECK(flight.untouched() && usable(group));  // nothing had begun
}

void test_what_is_not_served() {
  Group group(Shape{2});
  if (!group.joined()) return;
  Flight flight(group, 0, kCoded);
  flight.data.call.op = Op::max;
  CHECK(says(error_of([&] { flight.start(); }), Code::unsupported, {"codec fp16 serves"}));
  Call call;
  call.addresses.assign(32769, reinterpret_cast<char*>(flight.data.x.data()));
  call.counts.assign(32769, 0);
  CHECK(says(error_of([&] { group.queue(0).enqueue(call, flight.stream.number()); }), Code::unsupported,
             {"32769 tensors in one call, and 32768 are possible"}));
  CHECK(says(error_of([&] { group.queue(0).run(flight.data.call); }), Code::internal, {"need a stream"}));
  CHECK(flight.untouched() && usable(group));
}

void test_what_cannot_be_made() {
  const auto make = [](int device, int64_t bytes) {
    return NcclEngine::make({0, device, {bytes}, {{getpid(), ""}}, std::vector<PeerSockets>(1), library()});
  };
  machine().no_kernel_image = true;
  CHECK(says(error_of([&] { make(0, kMiB); }), Code::version, {"do not run on GPU 0", "CUDAARCHS"}));
  machine().no_kernel_image = false;
  machine().driver = cudaErrorNoDevice;
  CHECK(says(error_of([&] { make(0, kMiB); }), Code::argument, {"CUDA not available: cudaGetDeviceCount"}));
  machine().driver = cudaSuccess;
  CHECK(says(error_of([&] { make(0, 10000); }), Code::argument, {"10000 bytes is too small", "DPCOMM_ARENA_MB"}));
}

void test_a_forked_child_is_refused() {
#if !defined(__SANITIZE_THREAD__)  // which ends a child of many threads
  Group group(Shape{2});
  if (!group.joined()) return;
  Flight flight(group, 0, kCoded);
  const pid_t child = ::fork();
  if (child == 0) {
    ::alarm(30);
    const Error enqueued = error_of([&] { flight.start(); }), checked = error_of([&] { group.engine(0).check(); });
    group.queue(0).close(1);
    ::_exit(enqueued.code == Code::fork && checked.code == Code::fork ? 0 : 1);
  }
  int status = 0;
  CHECK(::waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
  CHECK(flight.untouched() && usable(group));
#endif
}

// ---- graphs ------------------------------------------------------------------------------------------------------

// A call that is refused takes no part in the capture, which goes on.
void test_a_failure_before_a_captured_call() {
  Group group(Shape{2});
  if (!group.joined()) return;
  Flight flight(group, 0, kCoded);
  const Body nothing = [] {};
  const cudaGraphExec_t graph = captured(flight.stream, [&] {
    launch(nothing, flight.stream);
    group.engine(1).abort("enough");
    CHECK(eventually([&] { return failed(group, 0); }));
    CHECK(says(error_of([&] { flight.start(); }), Code::aborted, {"rank 1 gave up"}));
  });
  OK(cudaGraphLaunch(graph, flight.stream));
  CHECK(flight.stream.done() && flight.untouched());
  OK(cudaGraphExecDestroy(graph));
}

void test_a_captured_call_that_nccl_refuses() {
  Shape shape{2};
  shape.slice_bytes = 0;
  Group group(shape);
  if (!group.joined()) return;
  Flight flight(group, 0, kCoded);
  const cudaGraphExec_t graph = captured(flight.stream, [&] {
    control().fail(0, int(nccl::Result::system_error), "planted");
    CHECK(says(error_of([&] { flight.start(); }), Code::aborted, {"rank 0 gave up", "planted"}));
  });
  CHECK(flight.untouched());
  OK(cudaGraphExecDestroy(graph));
  check_poisoned(group, {"rank 0 gave up"});
}

// A call whose steps and messages were side by side has left nothing that the capture would have to wait for.
void test_a_captured_call_that_nccl_refuses_behind_one_of_slices() {
  Group group(Shape{2});
  if (!group.joined()) return;
  std::vector<std::unique_ptr<Flight>> sliced;
  for (int r = 0; r < 2; ++r) sliced.push_back(std::make_unique<Flight>(group, r, kCoded, 20000));
  for (auto& one : sliced) one->start();
  for (auto& one : sliced) CHECK(one->pending->synchronize(kLongS, {}) && one->data.all(3));
  Flight flight(group, 0, kNative);
  const cudaGraphExec_t graph = captured(flight.stream, [&] {
    control().fail(0, int(nccl::Result::system_error), "planted");
    CHECK(says(error_of([&] { flight.start(); }), Code::aborted, {"rank 0 gave up", "planted"}));
  });
  CHECK(flight.untouched());
  OK(cudaGraphExecDestroy(graph));
}

// What a graph holds does not keep anybody from ending, and its replays end with NaNs.
void test_replays_after_a_failure_end_with_nans() {
  for (const Kind& kind : {kCoded, kOwn, kNative}) {
    Group group(Shape{2});
    if (!group.joined()) return;
    std::barrier<> both(2);
    group.all([&](int r) {
      Flight flight(group, r, kind);
      const cudaGraphExec_t graph =
          captured(flight.stream, [&] { run_on(flight.queue, flight.data.call, flight.stream); });
      OK(cudaGraphLaunch(graph, flight.stream));
      CHECK(flight.stream.done() && flight.data.all(3));
      both.arrive_and_wait();  // a rank may still be at the end of its replay when the other is done
      if (r == 1) group.engine(1).abort("enough");
      CHECK(eventually([&] { return failed(group, r); }));
      CHECK(says(error_of([&] { group.engine(r).check(); }), Code::aborted, {"rank 1 gave up"}));
      OK(cudaGraphLaunch(graph, flight.stream));
      CHECK(flight.stream.done());
      CHECK(eventually([&] {  // what was replayed before the failure reached the GPU may have ended well
        OK(cudaGraphLaunch(graph, flight.stream));
        return flight.stream.done() && flight.data.all_nan();
      }));
      OK(cudaGraphExecDestroy(graph));
    });
  }
}

// One replays, the other does not.
void test_a_replay_that_waits_times_out() {
  Group group(Shape{2, kShortS});
  if (!group.joined()) return;
  std::barrier<> both(2);
  group.all([&](int r) {
    Flight flight(group, r, kCoded);
    const cudaGraphExec_t graph =
        captured(flight.stream, [&] { run_on(flight.queue, flight.data.call, flight.stream); });
    both.arrive_and_wait();
    OK(cudaGraphLaunch(graph, flight.stream));
    CHECK(flight.stream.done() && flight.data.all(3));
    both.arrive_and_wait();
    if (r == 0) {
      OK(cudaGraphLaunch(graph, flight.stream));
      CHECK(flight.stream.done() && flight.data.all_nan());
      CHECK(says(error_of([&] { group.engine(0).check(); }), Code::timeout, {"waiting for rank 1 (pid"}));
    }
    OK(cudaGraphExecDestroy(graph));
  });
}

// ---- what leaves memory behind -----------------------------------------------------------------------------------

// NCCL waits for the graphs that have captured its communicator; close() does not.
void test_close_does_not_wait_for_graphs() {
  cudaGraphExec_t graphs[2];
  {
    Group group(Shape{2});
    if (!group.joined()) return;
    group.all([&](int r) {
      Flight flight(group, r, kCoded);
      graphs[r] = captured(flight.stream, [&] { run_on(flight.queue, flight.data.call, flight.stream); });
      const auto start = Clock::now();
      group.queue(r).close(1);
      CHECK(seconds_since(start) < kLongS);
    });
  }
  CHECK(counted("comms") == 2);
  for (const cudaGraphExec_t graph : graphs) OK(cudaGraphExecDestroy(graph));
  CHECK(eventually([] { return counted("comms") == 0; }));
}

// A kernel that is still to come, behind other work of the device, finds memory whenever it comes.
void test_memory_stays_for_what_comes_after_close() {
  std::unique_ptr<Flight> flight;
  Gate gate;
  {
    Group group(Shape{2});
    if (!group.joined()) return;
    flight = std::make_unique<Flight>(group, 0, kCoded);
    launch(gate.body, flight->stream);
    flight->start();
    const auto start = Clock::now();
    group.all([&](int r) { group.queue(r).close(1); });
    CHECK(seconds_since(start) < kLongS);
    gate.open = true;
    CHECK(flight->stream.done() && flight->pending->synchronize(kLongS, {}) && flight->data.all_nan());
    flight->pending.reset();
  }
}

void test_a_lost_context() {
  Group group(Shape{2});
  if (!group.joined()) return;
  Flight flight(group, 0, kCoded);
  machine().sticky = cudaErrorIllegalAddress;
  const Error error = error_of([&] { flight.start(); });
  CHECK(says(error, Code::cuda, {"rank 0/2", "cudaErrorIllegalAddress", "earlier", "CUDA_LAUNCH_BLOCKING=1"}));
  for (int r = 0; r < 2; ++r) {
    CHECK(eventually([&] { return failed(group, r); }));
    CHECK(says(error_of([&] { group.engine(r).check(); }), Code::aborted, {"rank 0 gave up"}));
  }
  const auto start = Clock::now();
  for (int r = 0; r < 2; ++r) group.queue(r).close(0);
  CHECK(seconds_since(start) < kLongS);
  machine().sticky = cudaSuccess;
}

// NCCL never lets go of rank 0's GPU. Its memory is there to the end of the process, which ends all the same. Rank 1
// would be another process: freeing its memory here would wait for all GPUs of this one.
void test_an_abort_that_hangs() {
  static Group* const group = new Group(Shape{2});
  if (!group->joined()) return;
  control().set("abort_hangs_s", 0, -1);
  static Flight* const flight = new Flight(*group, 0, kCoded);
  flight->start();
  group->engine(1).abort("enough");
  const auto start = Clock::now();
  const Error error = error_of([&] { flight->pending->synchronize(2 * kLongS, {}); });
  CHECK(says(error, Code::timeout, {"rank 0/2", "not let go of the GPU after ncclCommAbort", "Restart the process"}));
  CHECK(seconds_since(start) > 5 && seconds_since(start) < kLongS);
  CHECK(!flight->pending->done() && flight->untouched());
  Flight late(*group, 0, kCoded);
  CHECK(says(error_of([&] { late.start(); }), Code::aborted, {"rank 1 gave up"}));
  group->all([](int r) {
    const auto begun = Clock::now();
    group->queue(r).close(1);
    CHECK(seconds_since(begun) < kLongS);
  });
  flight->pending.reset();
  group->ranks[0].reset();
  CHECK(seconds_since(start) < 2 * kLongS && flight->untouched());
  CHECK(counted("comms", 0) == 1 && counted("comms", 1) == 0);
}

}  // namespace

int main() {
  ::alarm(240);
  test_what_cannot_be_made();
  test_a_rank_that_never_calls_is_named();
  test_a_lost_message_is_a_timeout();
  test_a_rank_that_dies_is_lost();
  test_a_rank_that_closes_early_is_lost();
  test_a_goodbye_disturbs_nobody_at_first();
  test_a_death_is_seen_while_nothing_is_in_flight();
  test_mismatches_are_told_to_all();
  test_what_all_say_is_no_mismatch();
  test_calls_in_another_order_are_a_mismatch();
  test_abort_ends_calls_in_flight();
  test_calls_behind_one_that_fails_fail_too();
  test_a_call_that_was_seen_to_end_well_stays_well();
  test_close_ends_what_is_in_flight();
  test_an_error_of_nccls_own_is_told_to_all();
  test_the_cause_of_nccls_error_is_told_where_it_is_known();
  test_a_call_that_nccl_refuses();
  test_nccl_that_cannot_join();
  test_a_rank_that_never_joins();
  test_a_launch_that_is_refused();
  test_a_launch_that_is_refused_in_the_middle();
  test_a_stream_that_does_not_exist();
  test_what_is_not_served();
  test_a_forked_child_is_refused();
  test_a_failure_before_a_captured_call();
  test_a_captured_call_that_nccl_refuses();
  test_a_captured_call_that_nccl_refuses_behind_one_of_slices();
  test_replays_after_a_failure_end_with_nans();
  test_a_replay_that_waits_times_out();
  check_nothing_is_left(kStreamsAtOnce);
  CHECK(counted("comms") == 0);
  test_close_does_not_wait_for_graphs();
  test_memory_stays_for_what_comes_after_close();
  test_a_lost_context();
  test_an_abort_that_hangs();
  return finish();
}
