// ./test_nccl [every]   Engine nccl where all goes well, on stand-ins for the CUDA runtime and for NCCL: bits,
// launches, streams, graphs, lists. Every result of our own algorithms is compared bit for bit with core_reference.h.
// every: plays only each every-th call of the list (sanitizers are slow). A stop after 150 s ends whatever hangs. What
// goes wrong: test_nccl_faults.cpp.
#include <cmath>
#include <set>
#include <tuple>

#include "core/protocol.h"
#include "gpu/native_kernels.h"
#include "nccl/step_kernels.h"
#include "nccl_ranks.h"

using namespace nccl_ranks;
using stand_in::machine;

namespace {

// ---- bits --------------------------------------------------------------------------------------------------------

// 4 KiB are the smallest slots. Segments within a message, across messages, whole ones beside short ones.
const std::vector<Layout> kLayouts = {{0},
                                      {1},
                                      {255},
                                      {257},
                                      {7001},
                                      {65536},
                                      {0, 5, 0, 300, 0},
                                      {1, 1, 1},
                                      {256, 0, 511, 64},
                                      {4096, 2560, 255, 8192, 257, 12288}};
const std::vector<steps::Kind> kCodings = {
    {CodecKind::none, Dtype::float32}, {CodecKind::none, Dtype::int32}, {CodecKind::fp16, Dtype::float32}};

std::vector<Round> script(int ranks, int every, uint32_t seed) {
  return steps::shuffled(kLayouts, kCodings, ranks, every, seed);
}

void test_every_rank_has_the_bits_of_the_reference(int every) {
  for (const int ranks : {2, 3, 4, 5, 6, 7, 8}) {
    if (Checks::failed > 0) return;
    Group group(Shape{ranks});
    if (!group.joined()) return;
    auto steps = script(ranks, ranks == 6 || ranks == 7 ? 5 * every : every, uint32_t(ranks));
    play(group, steps, "smallest slices");
    for (int r = 0; r < ranks; ++r) {
      const Stats stats = group.engine(r).stats(true);
      CHECK(stats.calls == int64_t(steps.size()) && stats.wire_bytes > 0);
      CHECK(group.engine(r).describe().sequence == uint64_t(steps.size()));
    }
  }
}

void test_bits_do_not_depend_on_slices() {
  for (const int ranks : {2, 3}) {
    Group group(Shape{ranks, kLongS, 0});
    if (!group.joined()) return;
    CHECK(group.engine(0).describe().slot_bytes > 100 * 4096);
    auto steps = script(ranks, 7, 7);
    play(group, steps, "one slice");
  }
}

// ---- NCCL's own all-reduce ---------------------------------------------------------------------------------------

// What codec none and no choice of an algorithm come to: groups and all-reduces of NCCL's, both counted for one rank.
struct Own {
  int64_t groups, all_reduces;
};
template <class T>
Own count_own(Group& group, Op op, Dtype dtype, T expected) {
  const Own before{counted("groups", 0), counted("all_reduces", 0)};
  group.all([&](int r) {
    OnDevice<T> d(7001, r, group.device_of(r));
    d.call.dtype = dtype, d.call.op = op;
    const StreamOf stream(group.device_of(r));
    run_on(group.queue(r), d.call, stream);
    CHECK(stream.done() && d.all(expected));
  });
  CHECK(group.engine(0).stats(true).wire_bytes > 0);
  return {counted("groups", 0) - before.groups, counted("all_reduces", 0) - before.all_reduces};
}

void test_nothing_beats_nccl_for_values() {
  Group group(Shape{3});
  if (!group.joined()) return;
  for (const Own& own :
       {count_own<float>(group, Op::sum, Dtype::float32, 6), count_own<float>(group, Op::mean, Dtype::float32, 2),
        count_own<int32_t>(group, Op::sum, Dtype::int32, 6), count_own<int32_t>(group, Op::min, Dtype::int32, 1),
        count_own<int32_t>(group, Op::max, Dtype::int32, 3)})
    CHECK(own.groups == 1 && own.all_reduces == 1);
  for (const Own& own :
       {count_own<float>(group, Op::min, Dtype::float32, 1), count_own<float>(group, Op::max, Dtype::float32, 3)})
    CHECK(own.groups > 1 && own.all_reduces == 0);
}

// A call whose codes NCCL adds up: cast, one all-reduce, widen; several of them where the slots hold less.
void check_native(Group& group, CodecKind codec, Op op, int64_t elems) {
  const int64_t groups = counted("groups", 0), all_reduces = counted("all_reduces", 0);
  stand_in::clear_log();
  machine().log = true;
  group.all([&](int r) {
    OnDevice<> d(elems, r, group.device_of(r));
    d.call.codec = codec, d.call.algorithm = Algorithm::native, d.call.op = op;
    const StreamOf stream(group.device_of(r));
    run_on(group.queue(r), d.call, stream);
    CHECK(stream.done() && d.all(op == Op::sum ? 6 : 2));
    const Stats stats = group.engine(r).stats(true);
    CHECK(stats.calls == 1 && stats.nonfinite_groups == 0);
    CHECK(stats.wire_bytes == (elems + kGroup - 1) / kGroup * kGroup * 2 * 4 / 3);  // 2 (N-1) / N of the codes
  });
  machine().log = false;
  const Description d = group.engine(0).describe();
  const int64_t most = Scratch::common_bytes(group.size(), kCarriedSlots, d.slot_bytes) / (kGroup * 2);
  const int64_t messages = ((elems + kGroup - 1) / kGroup + most - 1) / most;
  CHECK(counted("groups", 0) - groups == messages && counted("all_reduces", 0) - all_reduces == messages);
  const auto launches = stand_in::launches();
  const auto of = [&](const void* key) {
    return std::count_if(launches.begin(), launches.end(), [&](const stand_in::Launch& l) { return l.key == key; });
  };
  CHECK(of(cast_kernel(Dtype::float32, codec)) == 3 * messages);
  CHECK(of(widen_kernel(Dtype::float32, codec)) == 3 * messages);
  CHECK(int64_t(launches.size()) == 3 * (2 * messages + 2));  // begin and end
}

void test_nccl_adds_up_sixteen_bits_on_request() {
  Group group(Shape{3});
  if (!group.joined()) return;
  for (const CodecKind codec : {CodecKind::fp16, CodecKind::bf16})
    for (const Op op : {Op::sum, Op::mean}) check_native(group, codec, op, 7001);
  check_native(group, CodecKind::bf16, Op::mean, 500001);
  CHECK(500001 * 2 > 2 * group.engine(0).describe().arena_bytes);
}

// NCCL's minima and maxima of real numbers, ours of 16 bits, and a codec without an algorithm.
void test_what_nccl_does_not_add_up_is_refused() {
  Group group(Shape{2});
  if (!group.joined()) return;
  using Asked = std::tuple<CodecKind, Algorithm, Op, const char*>;
  for (const auto& [codec, algorithm, op, words] :
       {Asked{CodecKind::none, Algorithm::native, Op::min, "algorithm native is"},
        Asked{CodecKind::fp16, Algorithm::native, Op::max, "algorithm native is"},
        Asked{CodecKind::bf16, Algorithm::automatic, Op::sum, "codec bf16 is of algorithm native"}}) {
    OnDevice<> d(1000, 0, 0);
    d.call.codec = codec, d.call.algorithm = algorithm, d.call.op = op;
    try {
      group.queue(0).enqueue(d.call, group.engine(0).stream());
      CHECK(!"it is refused");
    } catch (const Error& error) {
      CHECK(error.code == Code::unsupported && std::string(error.what()).find(words) != std::string::npos);
    }
  }
  CHECK(usable(group));
}

// NCCL's minima and maxima drop NaNs; ours do not.
void test_extremes_keep_nan() {
  Group group(Shape{3});
  if (!group.joined()) return;
  for (const Op op : {Op::min, Op::max})
    group.all([&](int r) {
      OnDevice<> d(3000, r, group.device_of(r));
      d.call.op = op;
      if (r == 1) d.x[700] = NAN;
      const StreamOf stream(group.device_of(r));
      run_on(group.queue(r), d.call, stream);
      CHECK(stream.done() && d.x[700] != d.x[700]);
      d.x[700] = op == Op::min ? 1 : 3;
      CHECK(d.all(d.x[700]));
    });
}

void test_lists_of_values_are_one_group() {
  Group group(Shape{2});
  if (!group.joined()) return;
  const Own before{counted("groups", 1), counted("all_reduces", 1)};
  Round list(Algorithm::automatic, CodecKind::none, Dtype::int32, Op::sum, {300, 0, 7, 4096, 0}, true, 2, 1);
  std::vector<Round> steps{list};
  play(group, steps, "values");
  CHECK(counted("groups", 1) == before.groups + 1 && counted("all_reduces", 1) == before.all_reduces + 3);
}

// ---- lists -------------------------------------------------------------------------------------------------------

Layout many(int tensors) {
  Layout layout;
  for (int i = 0; i < tensors; ++i) layout.push_back(i % 5 == 0 ? 0 : i % 300);
  return layout;
}

void test_long_lists_travel_in_tables() {
  Group group(Shape{3});
  if (!group.joined()) return;
  std::vector<Round> steps;
  for (const int tensors : {kInlineSegments, kInlineSegments + 1, 500})
    for (const Algorithm algorithm : {Algorithm::direct, Algorithm::ring})
      steps.emplace_back(algorithm, CodecKind::fp16, Dtype::float32, Op::mean, many(tensors), false, 3, tensors);
  steps.emplace_back(Algorithm::automatic, CodecKind::none, Dtype::int32, Op::sum, many(200), false, 3, 1);
  play(group, steps, "lists");
}

void test_calls_of_nothing() {
  Group group(Shape{2});
  if (!group.joined()) return;
  const int64_t before = counted("groups");
  std::vector<Round> steps;
  for (const Layout& layout : {Layout{}, {0}, {0, 0, 0}})
    for (const CodecKind codec : {CodecKind::none, CodecKind::fp16})
      steps.emplace_back(Algorithm::automatic, codec, Dtype::float32, Op::sum, layout, false, 2, 1);
  play(group, steps, "nothing");
  CHECK(counted("groups") == before && group.engine(0).describe().sequence == steps.size());
}

// ---- the order of streams ----------------------------------------------------------------------------------------

void test_calls_are_behind_earlier_and_before_later_work() {
  for (const CodecKind codec : {CodecKind::none, CodecKind::fp16}) {
    Group group(Shape{2});
    if (!group.joined()) return;
    const auto streams = streams_of(group.ranks);
    OnDevice<> a(5000, 0, 0), b(5000, 1, 1);
    a.call.codec = b.call.codec = codec;
    Gate gate;
    std::atomic<int> seen{-1};
    const Body write = [&] { std::fill(a.x.begin(), a.x.end(), 10.0f); };
    const Body read = [&] { seen = a.all(12); };
    launch(gate.body, streams[0]);
    launch(write, streams[0]);
    run_on(group.queue(0), a.call, streams[0]);
    launch(read, streams[0]);
    run_on(group.queue(1), b.call, streams[1]);  // the host waits for neither
    CHECK(cudaStreamQuery(streams[1]) == cudaErrorNotReady);
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    CHECK(seen == -1 && a.all(1) && b.all(2));
    gate.open = true;
    CHECK(streams[0].done() && streams[1].done());
    CHECK(seen == 1 && b.all(12));
  }
}

void test_asynchronous_calls_are_before_what_joins_only() {
  Group group(Shape{2});
  if (!group.joined()) return;
  const auto streams = streams_of(group.ranks);
  OnDevice<> a(5000, 0, 0), b(5000, 1, 1);
  std::atomic<int> before{-1}, after{-1};
  const Body look_before = [&] { before = a.all(1); };
  const Body look_after = [&] { after = a.all(3); };
  const auto first = group.queue(0).enqueue(a.call, streams[0].number());
  launch(look_before, streams[0]);
  CHECK(streams[0].done() && before == 1);  // though the call is on its way
  CHECK(!first->done() && !first->synchronize(0.05, {}) && !first->error());
  Gate gate;
  launch(gate.body, streams[1]);
  const auto second = group.queue(1).enqueue(b.call, streams[1].number());
  first->join(streams[0].number(), kLongS, {});
  launch(look_after, streams[0]);
  CHECK(cudaStreamQuery(streams[0]) == cudaErrorNotReady && !second->done());
  gate.open = true;
  CHECK(streams[0].done() && after == 1);
  CHECK(second->synchronize(kLongS, {}) && second->done() && !second->error() && b.all(3));
}

// Each rank is called from two threads, with a stream each. Which of them comes first does not matter: calls are alike.
void test_threads_and_streams_take_turns() {
  constexpr int kCalls = 20;
  Group group(Shape{2});
  if (!group.joined()) return;
  in_threads(4, [&](int t) {
    const int r = t % 2;
    const StreamOf stream(group.device_of(r));
    OnDevice<> d(2000, r, group.device_of(r));
    d.call.codec = CodecKind::fp16;
    for (int i = 0; i < kCalls; ++i) {
      std::fill(d.x.begin(), d.x.end(), float(r + 1));
      run_on(group.queue(r), d.call, stream);
      CHECK(stream.done() && d.all(3));
    }
  });
  CHECK(group.engine(0).describe().sequence == 2 * kCalls);
}

void test_the_default_stream_is_a_stream() {
  Group group(Shape{2});
  if (!group.joined()) return;
  group.all([&](int r) {
    const CurrentDevice current(group.device_of(r));
    OnDevice<> d(300, r, group.device_of(r));
    group.queue(r).enqueue(d.call, 0)->join(0, kLongS, {});
    OK(cudaStreamSynchronize(nullptr));
    CHECK(d.all(3));
  });
}

// ---- graphs ------------------------------------------------------------------------------------------------------

// Several calls of one graph, of every kind, and direct ones between the replays.
using How = std::pair<CodecKind, Algorithm>;
constexpr How kCoded{CodecKind::fp16, Algorithm::direct}, kOwn{CodecKind::none, Algorithm::automatic},
    kNative{CodecKind::bf16, Algorithm::native};

void check_graphs(int ranks, const std::vector<How>& hows) {
  constexpr int kReplays = 3;
  Group group(Shape{ranks});
  if (!group.joined()) return;
  const float sum = float(ranks * (ranks + 1) / 2);
  group.all([&](int r) {
    const int device = group.device_of(r);
    const StreamOf stream(device);
    const CurrentDevice current(device);
    std::vector<std::unique_ptr<OnDevice<>>> all;
    for (const auto& [codec, algorithm] : hows) {
      all.push_back(std::make_unique<OnDevice<>>(9000, r, device));
      all.back()->call.codec = codec, all.back()->call.algorithm = algorithm;
    }
    int replay = 0;  // only streams' work looks at it, and this thread when there is none
    const Body refill = [&] {
      for (auto& d : all) std::fill(d->x.begin(), d->x.end(), float((r + 1) << replay));
    };
    int right = 0;
    const Body look = [&] {
      for (auto& d : all) right += d->all(sum * float(1 << replay));
      ++replay;
    };
    const cudaGraphExec_t graph = captured(stream, [&] {
      launch(refill, stream);
      for (auto& d : all) run_on(group.queue(r), d->call, stream);
      launch(look, stream);
    });
    CHECK(all[0]->all(float(r + 1)));  // nothing has run yet
    for (int i = 0; i < kReplays; ++i) {
      OK(cudaGraphLaunch(graph, stream));
      OnDevice<> between(7001, r, device);
      std::tie(between.call.codec, between.call.algorithm) = hows[size_t(i) % hows.size()];
      run_on(group.queue(r), between.call, stream);
      CHECK(stream.done() && between.all(sum));
    }
    CHECK(right == kReplays * int(all.size()) && replay == kReplays);
    group.engine(r).check();
    OK(cudaGraphExecDestroy(graph));
  });
}

void test_graphs_are_replayed_and_calls_go_on_between() {
  check_graphs(2, {kCoded});
  check_graphs(2, {kOwn});
  check_graphs(3, {kNative});
  check_graphs(4, {kCoded, kNative, kOwn, kCoded, kNative});
}

// A table that a graph has captured is not given to a later call.
void test_captured_lists_keep_their_tables() {
  Group group(Shape{2});
  if (!group.joined()) return;
  const auto streams = streams_of(group.ranks);
  std::vector<Round> kept;
  kept.emplace_back(Algorithm::direct, CodecKind::fp16, Dtype::float32, Op::sum, many(300), false, 2, 1);
  Round& step = kept.front();
  const auto adopted = adopt(kept, group);
  std::vector<cudaGraphExec_t> graphs(2);
  group.all([&](int r) {
    graphs[size_t(r)] =
        captured(streams[size_t(r)], [&] { run_on(group.queue(r), call_of(step, r), streams[size_t(r)]); });
  });
  std::vector<Round> others;
  for (uint32_t i = 0; i < 10; ++i)
    others.emplace_back(Algorithm::direct, CodecKind::fp16, Dtype::float32, Op::sum, many(200), false, 2, i);
  play(group, others, "between");
  CHECK(step.memory == step.input);
  for (int i = 0; i < 3; ++i) {
    for (size_t r = 0; r < 2; ++r) std::copy(step.input[r].begin(), step.input[r].end(), step.memory[r].begin());
    for (size_t r = 0; r < 2; ++r) OK(cudaGraphLaunch(graphs[r], streams[r]));
    for (size_t r = 0; r < 2; ++r) CHECK(streams[r].done() && step.memory[r] == step.result(int(r)));
  }
  for (const cudaGraphExec_t graph : graphs) OK(cudaGraphExecDestroy(graph));
}

// ---- what it takes -----------------------------------------------------------------------------------------------

void test_a_direct_call_is_five_launches_and_two_groups() {
  constexpr int kRanks = 8;
  Group group(Shape{kRanks, kLongS, 0});
  if (!group.joined()) return;
  std::vector<std::unique_ptr<OnDevice<>>> all;
  for (int r = 0; r < kRanks; ++r) {
    all.push_back(std::make_unique<OnDevice<>>(20000, r, group.device_of(r)));
    all.back()->call.codec = CodecKind::fp16, all.back()->call.algorithm = Algorithm::direct;
  }
  const int64_t groups = counted("groups");
  stand_in::clear_log();
  machine().log = true;
  CHECK(run_all(group.ranks, [&](int r) { return all[size_t(r)]->call; }));
  machine().log = false;
  const auto launches = stand_in::launches();
  const auto of = [&](const void* key) {
    return std::count_if(launches.begin(), launches.end(), [&](const stand_in::Launch& l) { return l.key == key; });
  };
  CHECK(of(begin_kernel()) == kRanks && of(end_kernel()) == kRanks);
  CHECK(of(step_kernel(Dtype::float32, CodecKind::fp16, Algorithm::direct)) == 3 * kRanks);  // give, reduce, take
  CHECK(int(launches.size()) == 5 * kRanks);
  CHECK(counted("groups") - groups == 2 * kRanks);
  for (const auto& d : all) CHECK(d->all(36));
}

// One call of all ranks: what NCCL has carried for it is what the engine counts.
void check_wire_bytes(Group& group, Algorithm algorithm, CodecKind codec) {
  constexpr int64_t kElems = 20001;
  std::vector<std::unique_ptr<OnDevice<>>> all;
  std::vector<int64_t> before;
  for (int r = 0; r < group.size(); ++r) {
    before.push_back(counted("bytes", r));
    all.push_back(std::make_unique<OnDevice<>>(kElems, r, group.device_of(r)));
    all.back()->call.codec = codec, all.back()->call.algorithm = algorithm;
  }
  CHECK(run_all(group.ranks, [&](int r) { return all[size_t(r)]->call; }));
  for (int r = 0; r < group.size(); ++r) {
    const Stats stats = group.engine(r).stats(true);
    const int64_t bytes = counted("bytes", r) - before[size_t(r)];
    if (!CHECK(stats.wire_bytes == bytes && stats.calls == 1 && stats.input_bytes == kElems * 4))
      std::fprintf(stderr, "  rank %d/%d, algorithm %d: %lld, and NCCL sent %lld\n", r, group.size(), int(algorithm),
                   (long long)stats.wire_bytes, (long long)bytes);
  }
}

void test_wire_bytes_are_what_nccl_carries() {
  for (const int ranks : {2, 3, 8}) {
    Group group(Shape{ranks});
    if (!group.joined()) return;
    for (const Algorithm algorithm : {Algorithm::direct, Algorithm::oneshot, Algorithm::ring})
      for (const CodecKind codec : {CodecKind::none, CodecKind::fp16}) check_wire_bytes(group, algorithm, codec);
  }
}

void test_statistics_count_nonfinite_groups() {
  Group group(Shape{2});
  if (!group.joined()) return;
  OnDevice<> a(1000, 0, 0), b(1000, 1, 1);
  a.x[700] = INFINITY, b.x[3] = NAN;
  a.call.codec = b.call.codec = CodecKind::fp16;
  a.call.algorithm = b.call.algorithm = Algorithm::direct;
  CHECK(run_all(group.ranks, [&](int r) { return (r ? b : a).call; }));
  int64_t groups = 0;
  for (int r = 0; r < 2; ++r) groups += group.engine(r).stats(true).nonfinite_groups;
  // Either's contribution has one such group, and the results of both, of which each owns some.
  if (!CHECK(groups == 4)) std::fprintf(stderr, "  %lld\n", (long long)groups);
  const Stats s = group.engine(0).stats(false);
  CHECK(s.calls == 0 && s.nonfinite_groups == 0 && s.wire_bytes == 0 && s.input_bytes == 0);
}

void test_statistics_count_codes_that_overflow() {
  Group group(Shape{2});
  if (!group.joined()) return;
  OnDevice<> a(1000, 0, 0), b(1000, 1, 1);
  a.x[700] = 65520, a.x[10] = 65519, b.x[3] = NAN;  // half the last place more than the largest half rounds up
  a.call.codec = b.call.codec = CodecKind::fp16;
  a.call.algorithm = b.call.algorithm = Algorithm::native;
  CHECK(run_all(group.ranks, [&](int r) { return (r ? b : a).call; }));
  CHECK(group.engine(0).stats(true).nonfinite_groups == 1 && group.engine(1).stats(true).nonfinite_groups == 1);
  CHECK(std::isinf(b.x[700]) && a.x[10] == 65504 && std::isnan(a.x[3]));
}

void test_a_communicator_describes_itself() {
  Group group(Shape{3});
  if (!group.joined()) return;
  CHECK(usable(group));
  const Description d = group.engine(1).describe();
  CHECK(d.engine == "nccl" && d.device == 1 && d.device_name == "Stand-in GPU" && d.arena == "device");
  CHECK(d.slots == kCarriedSlots && d.slot_bytes == 4096 && d.aside_bytes == 1 && d.sequence == 2);
  CHECK(d.arena_bytes >= d.slots * d.slot_bytes && d.arena_bytes <= 64 * kMiB);
  CHECK(d.pids == std::vector<int>(3, getpid()));
  CHECK(d.carrier == "NCCL 2.27.3 (" NCCL_STAND_IN ")");
}

void test_calls_make_nothing() {
  Group group(Shape{2});
  if (!group.joined()) return;
  const auto streams = streams_of(group.ranks);
  OnDevice<> a(9000, 0, 0), b(9000, 1, 1);
  a.call.codec = b.call.codec = CodecKind::fp16;
  const auto round = [&] {
    for (int r = 0; r < 2; ++r) run_on(group.queue(r), (r ? b : a).call, streams[size_t(r)]);
    CHECK(streams[0].done() && streams[1].done());
  };
  round();
  const stand_in::Counters& c = stand_in::counters();
  const int64_t mallocs = c.malloc_calls, pinned = c.host_allocations, events = c.events, made = c.streams;
  for (int i = 0; i < 50; ++i) round();
  CHECK(c.malloc_calls == mallocs && c.host_allocations == pinned && c.events == events && c.streams == made);
}

// ---- slots -------------------------------------------------------------------------------------------------------

// Where one rank's slots of every message lie that it sends or receives.
std::vector<char*> lanes_of(const Team& t) {
  const int next = (t.rank + 1) % t.nranks, previous = (t.rank + t.nranks - 1) % t.nranks;
  std::vector<char*> lanes{slot(t, kGiven, t.rank, t.rank, 0), slot(t, kRing, t.rank, next, 0),
                           slot(t, kRing, previous, t.rank, 0)};
  for (int r = 0; r < t.nranks; ++r) {
    lanes.push_back(slot(t, kResult, r, t.rank, 0));
    if (r == t.rank) continue;
    lanes.push_back(slot(t, kGiven, t.rank, r, 0));
    lanes.push_back(slot(t, kGiven, r, t.rank, 0));
  }
  return lanes;
}

void check_scratch(int rank, int ranks) {
  constexpr int64_t kWish = 4 * kMiB;
  const int64_t most = Scratch::slot_bytes_for(ranks, kCarriedSlots, kWish);
  CHECK(most >= 4096 && most % 4096 == 0);
  const Scratch scratch(rank, ranks, kCarriedSlots, most);
  CHECK(Scratch::common_bytes(ranks, kCarriedSlots, most) <= scratch.bytes());
  CHECK(scratch.bytes() <= kWish && scratch.bytes() > kWish / 2);
  const Team team{rank, ranks, scratch.box(), nullptr, kCarriedSlots, most, most, true};
  std::vector<char*> lanes = lanes_of(team);
  std::sort(lanes.begin(), lanes.end());
  const int64_t lane_bytes = kCarriedSlots * most;
  for (size_t i = 1; i < lanes.size(); ++i) CHECK(lanes[i] - lanes[i - 1] >= lane_bytes);
  CHECK(lanes.back() + lane_bytes - lanes.front() <= scratch.bytes());
  for (char* lane : {lanes.front(), lanes.back()}) {
    CHECK(uintptr_t(lane) % 4096 == 0);
    OK(cudaMemset(lane, 1, size_t(lane_bytes)));  // ends the process where it is not all scratch
  }
}

void test_lanes_share_no_memory() {
  for (const int ranks : {2, 3, 4, 5, 6, 7, 8, 9, 16, 31, 32, 63, kMaxRanks})
    for (const int rank : std::set<int>{0, 1, ranks / 2, ranks - 1}) check_scratch(rank, ranks);
  CHECK(Scratch::slot_bytes_for(64, kCarriedSlots, 100000) == 0);
}

}  // namespace

int main(int argc, char** argv) {
  ::alarm(150);
  const int every = argc > 1 ? std::atoi(argv[1]) : 1;
  test_lanes_share_no_memory();
  test_nothing_beats_nccl_for_values();
  test_nccl_adds_up_sixteen_bits_on_request();
  test_what_nccl_does_not_add_up_is_refused();
  test_extremes_keep_nan();
  test_lists_of_values_are_one_group();
  test_long_lists_travel_in_tables();
  test_calls_of_nothing();
  test_calls_are_behind_earlier_and_before_later_work();
  test_asynchronous_calls_are_before_what_joins_only();
  test_threads_and_streams_take_turns();
  test_the_default_stream_is_a_stream();
  test_graphs_are_replayed_and_calls_go_on_between();
  test_captured_lists_keep_their_tables();
  test_a_direct_call_is_five_launches_and_two_groups();
  test_wire_bytes_are_what_nccl_carries();
  test_statistics_count_nonfinite_groups();
  test_statistics_count_codes_that_overflow();
  test_a_communicator_describes_itself();
  test_calls_make_nothing();
  test_every_rank_has_the_bits_of_the_reference(every);
  test_bits_do_not_depend_on_slices();
  check_nothing_is_left(kStreamsAtOnce);
  CHECK(counted("comms") == 0 && counted("aborts") == 0);
  return finish();
}
