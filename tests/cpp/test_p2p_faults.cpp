// ./test_p2p_faults   What engine p2p answers when something goes wrong, on the stand-in CUDA runtime. Ranks are of
// this process; test_p2p_processes plays them as processes. A stop after 150 s ends whatever hangs.
#include <unistd.h>

#include "p2p_ranks.h"

using namespace p2p;
using stand_in::machine;

// Exceptions that two threads hold are counted by atomics inside of libstdc++, where the detector does not look.
extern "C" const char* __tsan_default_suppressions() {
  return "race:std::runtime_error::~runtime_error\nrace:std::__exception_ptr::exception_ptr::_M_release\n";
}

namespace {

constexpr double kShortS = 1.5;  // of calls that are to time out; half of it has each wait of verify()
constexpr double kSoonS = 0.1;   // a call in flight ends within this once somebody gave up
const double kSlow =
#if defined(STAND_IN_FEW)
    10;  // sanitizers
#else
    2;  // a busy machine
#endif

// Every further call is refused at once, on every rank, and names the cause.
void check_poisoned(Queues& ranks, const std::vector<std::string>& words) {
  for (auto& rank : ranks)
    for (int i = 0; i < 2; ++i) {
      Data<> d(300, 0);
      const auto start = Clock::now();
      CHECK(says(error_of([&] { rank->enqueue(d.call, rank->engine().stream()); }), Code::aborted, words));
      CHECK(seconds_since(start) < 1 && d.all(1));
    }
}

// Makes a rank's caller meet the cause.
Error met(Queue& rank) {
  return error_of([&] { rank.engine().check(); });
}

// ---- ranks that do not come --------------------------------------------------------------------------------------

void test_a_rank_of_the_same_device_that_never_enters() {
  Queues ranks = local({0, 0, 0});
  const StreamOf stream(0);
  Data<> a(300, 0);
  const auto pending = ranks[1]->enqueue(a.call, stream.number());
  const Error error = error_of([&] { pending->join(stream.number(), 0.2, {}); });
  CHECK(says(error, Code::timeout, {"rank 1/3", "waiting for rank 0 (pid", "rank 2 (pid", "last seq 0"}));
  CHECK((error.waiting_for == std::vector<int>{0, 2}));
  CHECK(pending->done() && a.all(1));
  check_poisoned(ranks, {"because: [TIMEOUT] ", "rank 0 (pid"});
}

// The kernel waits, not the host.
void check_late_rank(Queues ranks) {
  Data<> a(5000, 0), late(5000, 1);
  const auto pending = ranks[0]->enqueue(a.call, ranks[0]->engine().stream());
  CHECK(pending->synchronize(kLongS, {}));
  CHECK(says(error_of(*pending), Code::timeout, {"rank 0/2", "waiting for rank 1 (pid", "last seq 0", "for 1.5 s"}));
  const Error error = met(*ranks[0]);
  CHECK(says(error, Code::timeout, {"waiting for rank 1"}) && error.waiting_for == std::vector<int>{1});
  CHECK(a.all_nan());
  const Error theirs = error_of([&] { ranks[1]->enqueue(late.call, ranks[1]->engine().stream()); });
  CHECK(says(theirs, Code::aborted, {"because: [TIMEOUT] rank 0 waited for rank 1"}));
  CHECK(late.all(2));
  check_poisoned(ranks, {"[TIMEOUT]"});
  close_all(ranks);
}

void test_a_rank_elsewhere_that_never_calls() {
  check_late_rank(built({0, 1}, wish(), kShortS));
  check_late_rank(local({0, 1}, wish(2, true), kShortS));
}

void test_whole_numbers_have_no_nan() {
  Queues ranks = local({0, 1}, wish(), kShortS);
  Data<int32_t> a(5000, 0);
  const auto pending = ranks[0]->enqueue(a.call, ranks[0]->engine().stream());
  CHECK(pending->synchronize(kLongS, {}));
  CHECK(error_of(*pending).code == Code::timeout);
}

void test_a_rank_that_closes_before_a_call_of_another() {
  for (const std::vector<int>& devices : {std::vector<int>{0, 1}, {0, 0}}) {
    Queues ranks = local(devices);
    CHECK(usable(ranks));
    Data<> a(5000, 0);
    const auto pending = ranks[0]->enqueue(a.call, ranks[0]->engine().stream());
    const auto start = Clock::now();
    ranks[1]->close(1);
    CHECK(pending->synchronize(kLongS, {}));
    CHECK(says(error_of(*pending), Code::peer_lost, {"rank 1 closed its connection (clean shutdown) at seq 1"}));
    CHECK(seconds_since(start) < kSlow);
    CHECK(devices[1] == 0 || a.all_nan());
    CHECK(says(met(*ranks[0]), Code::peer_lost, {"rank 1"}));
    check_poisoned(ranks, {});
  }
}

// ---- ranks that say different things -----------------------------------------------------------------------------

struct Lie {
  const char* text;
  void (*tell)(Call&);
};
const Lie kLies[] = {
    {"numel: rank 0 has 5000, rank 1 has 4999", [](Call& c) { c.counts[0] = 4999; }},
    {"op: rank 0 has sum, rank 1 has max", [](Call& c) { c.op = Op::max; }},
    {"dtype: rank 0 has float32, rank 1 has int32", [](Call& c) { c.dtype = Dtype::int32; }},
    {"codec: rank 0 has none, rank 1 has fp16", [](Call& c) { c.codec = CodecKind::fp16; }},
    {"algorithm: rank 0 has direct, rank 1 has ring", [](Call& c) { c.algorithm = Algorithm::ring; }},
    {"rank 0 is in no bucket, rank 1 in bucket 3", [](Call& c) { c.bucket = 3; }},
    {"number of tensors: rank 0 has 1, rank 1 has 2",
     [](Call& c) {
       c.counts = {2560, 2440};
       c.addresses.push_back(c.addresses[0] + 2560 * 4);
     }},
};

void check_mismatch(Queues ranks, const Lie& lie) {
  CHECK(usable(ranks));
  Data<> a(5000, 0), b(5000, 1);
  a.call.algorithm = b.call.algorithm = Algorithm::direct;
  lie.tell(b.call);
  std::vector<std::shared_ptr<Pending>> pending;
  std::vector<Error> errors;
  for (int r = 0; r < 2; ++r) try {
      pending.push_back(ranks[size_t(r)]->enqueue((r ? b : a).call, ranks[size_t(r)]->engine().stream()));
    } catch (const Error& error) {
      errors.push_back(error);  // ranks of one device: whoever enters last
    }
  for (const auto& p : pending) CHECK(p->synchronize(kLongS, {}));
  for (const auto& p : pending) errors.push_back(error_of(*p));
  CHECK(errors.size() == 2);
  for (const Error& error : errors) CHECK(says(error, Code::mismatch, {lie.text, "(seq 2)", "same order"}));
  for (auto& rank : ranks) CHECK(says(met(*rank), Code::mismatch, {lie.text}));
  check_poisoned(ranks, {"because: [MISMATCH] ", lie.text});
  close_all(ranks);
}

void test_a_mismatch_is_told_to_all() {
  for (const Lie& lie : kLies) {
    check_mismatch(local({0, 0}), lie);
    check_mismatch(local({0, 1}), lie);
  }
  check_mismatch(local({0, 1}, wish(2, true)), kLies[0]);
  check_mismatch(built({1, 0}), kLies[1]);
  check_mismatch(built({1, 1}), kLies[2]);
}

void test_ranks_of_three_devices_places_name_the_odd_one() {
  for (const std::vector<int>& devices : {std::vector<int>{0, 0, 1}, {0, 1, 1}, {0, 1, 0}}) {
    Queues ranks = local(devices);
    Data<> a(5000, 0), b(5000, 1), c(4096, 2);
    const Data<>* const all[] = {&a, &b, &c};
    for (size_t r = 0; r < 3; ++r) try {
        ranks[r]->enqueue(all[r]->call, ranks[r]->engine().stream());
      } catch (const Error&) {
      }
    for (auto& rank : ranks) {
      CHECK(eventually([&] {
        try {
          rank->engine().check();
        } catch (const Error&) {
          return true;
        }
        return false;
      }));
      // A launch that never was is not announced: ranks of other devices learn who, but not the values.
      const bool launched = std::count(devices.begin(), devices.end(), devices[2]) == 1;
      const bool told = launched || rank->engine().device() == devices[2];
      const auto words = told ? std::vector<std::string>{"has 5000", "rank 2 has 4096"} : std::vector<std::string>{};
      CHECK(says(met(*rank), Code::mismatch, words));
      CHECK(says(met(*rank), Code::mismatch, {"numel", "rank 2"}));
    }
  }
}

// ---- abort, close ------------------------------------------------------------------------------------------------

void check_abort(Queues ranks, bool filled) {
  CHECK(usable(ranks));
  Data<> a(5000, 0);
  const auto pending = ranks[0]->enqueue(a.call, ranks[0]->engine().stream());
  std::this_thread::sleep_for(std::chrono::milliseconds(30));
  CHECK(!pending->done() && !pending->error());
  const auto start = Clock::now();
  ranks[1]->engine().abort("enough");
  CHECK(pending->synchronize(kLongS, {}));
  if (!CHECK(seconds_since(start) < kSoonS * kSlow + 0.5)) std::fprintf(stderr, "  %.3f s\n", seconds_since(start));
  CHECK(says(error_of(*pending), Code::aborted, {"rank 1 gave up at seq 1: enough"}));
  CHECK(filled ? a.all_nan() : a.all(1));
  check_poisoned(ranks, {"rank 1 gave up", "enough"});
  close_all(ranks);
}

void test_abort_ends_a_call_in_flight() {
  check_abort(built({0, 1}), true);
  check_abort(local({0, 1}), true);
  check_abort(local({0, 1}, wish(2, true)), true);
  check_abort(local({0, 0}), false);  // it was never launched
}

void test_close_ends_what_is_under_way() {
  Queues ranks = local({0, 1});
  Data<> a(5000, 0);
  const auto pending = ranks[0]->enqueue(a.call, ranks[0]->engine().stream());
  std::thread other([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    ranks[1]->engine().abort("leaving");
  });
  ranks[0]->close(0);
  other.join();
  CHECK(pending->done() && a.all_nan());
  CHECK(says(error_of([&] { ranks[0]->enqueue(a.call, 0); }), Code::aborted, {"has been closed"}));
  ranks[0]->close(0);
}

void test_interrupted_joins_abort() {
  Queues ranks = local({0, 0});
  const StreamOf stream(0);
  Data<> a(300, 0);
  const auto pending = ranks[0]->enqueue(a.call, stream.number());
  CHECK(says(error_of([&] { pending->join(stream.number(), kLongS, [] { return true; }); }), Code::aborted,
             {"interrupted"}));
  check_poisoned(ranks, {"interrupted"});
}

// A kernel that is still to come, behind other work of the device, finds memory whenever it comes.
void test_memory_stays_for_a_kernel_that_comes_after_close() {
  Queues ranks = built({0, 1});
  const StreamOf stream(0);
  Data<> a(5000, 0);
  std::atomic<bool> go{false};
  const Body other_work = [&] { eventually([&] { return go.load(); }); };
  launch(other_work, stream);
  const auto pending = ranks[0]->enqueue(a.call, stream.number());
  const auto start = Clock::now();
  close_all(ranks);
  CHECK(seconds_since(start) < 30);
  go = true;
  CHECK(stream.done() && pending->synchronize(kLongS, {}) && a.all_nan());
}

// Two launches of one process wait for each other.
void test_blocking_launches_are_refused() {
  ::setenv("CUDA_LAUNCH_BLOCKING", "1", 1);
  CHECK(says(error_of([] { local({0, 1}); }), Code::argument, {"CUDA_LAUNCH_BLOCKING=1", "Unset it"}));
  {
    Queues one_launch = local({0, 0});
    CHECK(usable(one_launch));
  }
  ::setenv("CUDA_LAUNCH_BLOCKING", "0", 1);
  Queues two = local({0, 1});
  CHECK(usable(two));
}

// ---- the runtime -------------------------------------------------------------------------------------------------

void test_an_error_of_a_launch_is_this_ranks_and_the_others_are_told() {
  Queues ranks = local({0, 1});
  Data<> a(300, 0), b(300, 1);
  machine().launch = cudaErrorLaunchOutOfResources;
  const Error mine = error_of([&] { ranks[0]->enqueue(a.call, ranks[0]->engine().stream()); });
  machine().launch = cudaSuccess;
  CHECK(says(mine, Code::cuda, {"rank 0/2", "cudaLaunchKernelExC", "cudaErrorLaunchOutOfResources"}));
  const Error theirs = error_of([&] { ranks[1]->enqueue(b.call, ranks[1]->engine().stream()); });
  CHECK(says(theirs, Code::aborted, {"rank 0 gave up", "cudaLaunchKernelExC"}));
  CHECK(a.all(1) && b.all(2));
  check_poisoned(ranks, {"rank 0 gave up"});
}

void test_a_lost_context() {
  Queues ranks = local({0, 1});
  Data<> a(300, 0);
  machine().sticky = cudaErrorIllegalAddress;
  const Error mine = error_of([&] { ranks[0]->enqueue(a.call, ranks[0]->engine().stream()); });
  CHECK(says(mine, Code::cuda, {"cudaErrorIllegalAddress", "earlier", "CUDA_LAUNCH_BLOCKING=1"}));
  check_poisoned(ranks, {"rank 0 gave up"});
  for (auto& rank : ranks) rank->close(0);  // does not wait for a device that will never answer
  machine().sticky = cudaSuccess;
}

void test_a_stream_that_does_not_exist() {
  Queues ranks = local({0, 1});
  Data<> a(300, 0);
  const StreamOf elsewhere(1);
  const Error error = error_of([&] { ranks[0]->enqueue(a.call, elsewhere.number()); });
  CHECK(says(error, Code::cuda, {"stream", "exist, on this device?"}));
  const Error unknown = error_of([&] { ranks[0]->enqueue(a.call, 0x7ffffff0); });
  CHECK(says(unknown, Code::cuda, {"stream", "exist, on this device?"}));
  CHECK(usable(ranks));  // nothing had begun
  CHECK(ranks[0]->engine().describe().sequence == 1);
}

void test_too_long_a_list() {
  Queues ranks = local({0, 0});
  std::vector<float> x(1, 1);
  Call call;
  call.addresses.assign(16385, reinterpret_cast<char*>(x.data()));
  call.counts.assign(16385, 0);
  for (auto& rank : ranks)
    CHECK(says(error_of([&] { rank->enqueue(call, rank->engine().stream()); }), Code::unsupported,
               {"16385 tensors in one call, and 16384 are possible"}));
  CHECK(usable(ranks));  // nothing had begun
}

void test_what_no_codec_serves() {
  Queues ranks = local({0, 1});
  Data<int32_t> a(300, 0);
  a.call.codec = CodecKind::fp16;
  CHECK(says(error_of([&] { ranks[0]->enqueue(a.call, 0); }), Code::unsupported, {"codec fp16 serves"}));
  Data<> b(300, 0);
  CHECK(says(error_of([&] { ranks[0]->run(b.call); }), Code::internal, {"need a stream"}));
  CHECK(usable(ranks));
}

// ---- construction ------------------------------------------------------------------------------------------------

void test_what_cannot_be_made() {
  machine().no_kernel_image = true;
  CHECK(says(error_of([] { local({0, 1}); }), Code::version, {"do not run on GPU 0", "sm_90", "CUDAARCHS"}));
  machine().no_kernel_image = false;
  CHECK(says(error_of([] { local({0, 2}); }), Code::argument, {"no GPU 2", "sees 2"}));
  CHECK(says(error_of([] { local({0, -1}); }), Code::argument, {"no GPU -1"}));
  CHECK(says(error_of([] { local({0, 1}, wish(65)); }), Code::argument, {"max_ctas"}));
  P2pWish small = wish(8);
  small.arena_bytes = 65536;
  CHECK(says(error_of([&] { local({0, 1}, small); }), Code::argument, {"65536 bytes is too small", "are needed"}));
  machine().driver = cudaErrorNoDevice;
  CHECK(says(error_of([] { local({0, 1}); }), Code::argument, {"CUDA not available: cudaGetDeviceCount"}));
  CHECK(cuda_devices().empty() && !cuda_unusable_reason().empty());
  machine().driver = cudaSuccess;
  machine().host_register = cudaErrorNotSupported;
  CHECK(says(error_of([] { local({0, 1}, wish(2, true)); }), Code::resource, {"cudaHostRegister", "ulimit -l"}));
  machine().host_register = cudaSuccess;
  machine().says = stand_in::Machine::all(false);  // nothing runs
  CHECK(says(error_of([] { local({0, 1}); }), Code::p2p, {"GPU 0 has no peer access to GPU 1"}));
  Queues pinned = local({0, 1}, wish(2, true));
  CHECK(usable(pinned));
  machine().says = stand_in::Machine::all(true);
}

void test_memory_that_is_not_to_be_had() {
  size_t free = 0, total = 0;
  OK(cudaMemGetInfo(&free, &total));
  void* rest = nullptr;
  OK(cudaMalloc(&rest, free - size_t{3} * kMiB));
  const Error error = error_of([] { local({0, 0}); });
  CHECK(says(error, Code::resource, {"2097152 bytes of GPU memory", "are free", "DPCOMM_ARENA_MB"}));
  CHECK(error.errnum == ENOMEM);
  OK(cudaFree(rest));
  Queues ranks = local({0, 0});
  CHECK(usable(ranks));
}

}  // namespace

int main() {
  ::alarm(150);
  machine().memory_bytes = size_t{64} << 20;
  test_what_cannot_be_made();
  test_memory_that_is_not_to_be_had();
  test_a_rank_of_the_same_device_that_never_enters();
  test_a_rank_elsewhere_that_never_calls();
  test_whole_numbers_have_no_nan();
  test_a_rank_that_closes_before_a_call_of_another();
  test_a_mismatch_is_told_to_all();
  test_ranks_of_three_devices_places_name_the_odd_one();
  test_abort_ends_a_call_in_flight();
  test_close_ends_what_is_under_way();
  test_interrupted_joins_abort();
  test_an_error_of_a_launch_is_this_ranks_and_the_others_are_told();
  test_a_stream_that_does_not_exist();
  test_too_long_a_list();
  test_what_no_codec_serves();
  test_blocking_launches_are_refused();
  check_nothing_is_left();
  test_memory_stays_for_a_kernel_that_comes_after_close();  // these leave memory behind
  test_a_lost_context();
  return finish();
}
