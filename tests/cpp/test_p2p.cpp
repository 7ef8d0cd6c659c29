// ./test_p2p [every]   Engine p2p where all goes well, on the stand-in CUDA runtime: bits, launches, the order of
// streams, graphs, lists, what it takes and gives back. every: plays only each every-th call of the list of
// calls (sanitizers are slow). A stop after 150 s ends whatever hangs.
#include <unistd.h>

#include <set>

#include "cuda/p2p_kernels.h"
#include "p2p_ranks.h"

using namespace p2p;
using stand_in::counters;
using stand_in::machine;

namespace {

// ---- bits --------------------------------------------------------------------------------------------------------

const std::vector<Layout> kLayouts = {
    {0}, {1}, {255}, {257}, {1021}, {7001}, {0, 5, 0, 300, 0}, {1, 1, 1}, {256, 0, 511, 64}, {3000, 1, 2999}};
const std::vector<steps::Kind> kCodings = {{CodecKind::none, Dtype::float32},
                                           {CodecKind::fp16, Dtype::float32},
#if !defined(STAND_IN_FEW)
                                           {CodecKind::none, Dtype::float64},
                                           {CodecKind::none, Dtype::float16},
                                           {CodecKind::none, Dtype::bfloat16},
                                           {CodecKind::none, Dtype::int64},
                                           {CodecKind::fp16, Dtype::float16},
                                           {CodecKind::fp16, Dtype::bfloat16}
#endif
};

std::vector<Step> script(int ranks, int every, uint32_t seed) {
  return steps::shuffled(kLayouts, kCodings, ranks, every, seed);
}

// True if it holds the bits of the reference on every rank.
bool right(const Step& step, const char* what) {
  for (size_t r = 0; r < step.memory.size(); ++r) {
    if (CHECK(step.memory[r] == step.result(int(r)))) continue;
    std::fprintf(stderr, "  %s, rank %zu/%zu: algorithm %d codec %d dtype %d op %d\n", what, r, step.memory.size(),
                 int(step.algorithm), int(step.codec), int(step.dtype), int(step.op));
    return false;
  }
  return true;
}

// All calls are on their way before the first result is looked at.
void play(Queues& ranks, std::vector<Step>& steps, const char* what) {
  const auto streams = streams_of(ranks);
  for (Step& step : steps) {
    std::vector<std::shared_ptr<Pending>> pending;
    for (size_t r = 0; r < ranks.size(); ++r)
      pending.push_back(ranks[r]->enqueue(call_of(step, int(r)), streams[r].number()));
    for (size_t r = 0; r < ranks.size(); ++r) pending[r]->join(streams[r].number(), kLongS, {});
  }
  for (const StreamOf& stream : streams) CHECK(stream.done());
  for (auto& rank : ranks) rank->engine().check();
  for (const Step& step : steps)
    if (!right(step, what)) return;
}

void test_every_rank_has_the_bits_of_the_reference(int every) {
  uint32_t seed = 0;
  const std::vector<std::vector<int>> places = {{0, 0}, {0, 1}, {0, 1, 0}, {0, 0, 0, 0}, {1, 0, 1, 0, 0}};
  for (const auto& devices : places)
    for (const bool pinned : {false, true}) {
      ++seed;
      Queues ranks = local(devices, wish(int(seed % 3) + 1, pinned));
      auto steps = script(int(devices.size()), every, seed);
      play(ranks, steps, pinned ? "pinned" : "device");
    }
}

void test_builders_that_are_threads_give_the_same_bits(int every) {
  for (const bool pinned : {false, true}) {
    Queues ranks = built({0, 1, 0}, wish(2, pinned));
    auto steps = script(3, 3 * every, 20);
    play(ranks, steps, pinned ? "built, pinned" : "built");
    const Description d = ranks[1]->engine().describe();
    const std::string how = pinned ? "pinned host memory" : "plain pointer";
    CHECK((d.peers == std::vector<std::string>{how, pinned ? how : "own", how}));
    CHECK(d.device == 1 && d.max_ctas == 2 && d.engine == "p2p" && d.pids == std::vector<int>(3, getpid()));
    CHECK(d.arena == (pinned ? "pinned" : "device") && d.sequence == steps.size());
    close_all(ranks);
  }
}

// ---- launches ----------------------------------------------------------------------------------------------------

// Ranks of one device are one launch; every call launches the same number of CTAs, all of them at once.
void check_launches(const std::vector<int>& devices, int remote) {
  Queues ranks = local(devices);
  stand_in::clear_log();
  machine().log = true;
  CHECK(usable(ranks));
  machine().log = false;
  const auto launches = stand_in::launches();
  const auto here = [&](int device) { return unsigned(std::count(devices.begin(), devices.end(), device)); };
  CHECK(launches.size() == std::set<int>(devices.begin(), devices.end()).size());
  const Algorithm chosen = devices.size() == 2 ? Algorithm::oneshot : Algorithm::direct;  // of 28 KiB
  for (const stand_in::Launch& l : launches) {
    CHECK(l.key == p2p_kernel(Dtype::float32, CodecKind::none, chosen));
    CHECK(l.grid == here(l.device) * 2 && l.threads == unsigned(kCtaThreads));
    CHECK(l.cooperative && l.sync_domain == remote);
  }
}

void test_one_cooperative_launch_a_call_and_device() {
  check_launches({0, 0}, cudaLaunchMemSyncDomainRemote);
  check_launches({0, 1, 1}, cudaLaunchMemSyncDomainRemote);
  machine().major = 8;  // knows no domains; the runtime is idle
  check_launches({1, 1, 0}, cudaLaunchMemSyncDomainDefault);
  machine().major = 9;
}

void test_small_calls_take_few_ctas() {
  Queues ranks = local({0, 0}, wish(4));
  std::vector<unsigned> grids;
  for (const int64_t elems : {0, 1, 256, 512, 1024, 4096, 100000}) {
    Data<> a(elems, 0), b(elems, 1);
    stand_in::clear_log();
    machine().log = true;
    CHECK(run_all(ranks, [&](int r) { return (r ? b : a).call; }));
    machine().log = false;
    CHECK(a.all(3) && b.all(3));
    grids.push_back(stand_in::launches().at(0).grid);
  }
  CHECK(grids.front() == 2 && grids.back() == 8 && std::is_sorted(grids.begin(), grids.end()));
}

// ---- the order of streams ----------------------------------------------------------------------------------------

void test_calls_are_behind_earlier_and_before_later_work() {
  Queues ranks = local({0, 1});
  const auto streams = streams_of(ranks);
  Data<> a(5000, 0), b(5000, 1);
  Gate gate;
  std::atomic<int> seen{-1};
  const Body write = [&] { std::fill(a.x.begin(), a.x.end(), 10.0f); };
  const Body read = [&] { seen = a.all(12); };
  launch(gate.body, streams[0]);
  launch(write, streams[0]);
  run_on(*ranks[0], a.call, streams[0]);
  launch(read, streams[0]);
  run_on(*ranks[1], b.call, streams[1]);  // the host waits for neither
  CHECK(cudaStreamQuery(streams[1]) == cudaErrorNotReady);
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  CHECK(seen == -1 && a.all(1) && b.all(2));
  gate.open = true;
  CHECK(streams[0].done() && streams[1].done());
  CHECK(seen == 1 && b.all(12));
}

void test_asynchronous_calls_are_before_what_joins_only() {
  Queues ranks = local({0, 0});
  const auto streams = streams_of(ranks);
  Data<> a(5000, 0), b(5000, 1);
  std::atomic<int> before{-1}, after{-1};
  const Body look_before = [&] { before = a.all(1); };
  const Body look_after = [&] { after = a.all(3); };
  const auto first = ranks[0]->enqueue(a.call, streams[0].number());
  launch(look_before, streams[0]);
  CHECK(streams[0].done() && before == 1);  // though the call is on its way
  CHECK(!first->done() && !first->synchronize(0.05, {}) && !first->error());
  Gate gate;
  launch(gate.body, streams[1]);
  const auto second = ranks[1]->enqueue(b.call, streams[1].number());
  first->join(streams[0].number(), kLongS, {});
  launch(look_after, streams[0]);
  CHECK(cudaStreamQuery(streams[0]) == cudaErrorNotReady && !second->done());
  gate.open = true;
  CHECK(streams[0].done() && after == 1);
  CHECK(second->synchronize(kLongS, {}) && second->done() && !second->error() && b.all(3));
}

void test_a_join_waits_for_the_ranks_of_its_device() {
  Queues ranks = local({0, 0});
  const auto streams = streams_of(ranks);
  Data<> a(300, 0), b(300, 1);
  std::thread late([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    run_on(*ranks[1], b.call, streams[1]);
  });
  run_on(*ranks[0], a.call, streams[0]);
  late.join();
  CHECK(streams[0].done() && streams[1].done() && a.all(3) && b.all(3));
}

void test_threads_and_streams_take_turns() {
  for (const std::vector<int>& devices : {std::vector<int>{0, 0}, {0, 1}}) {
    Queues ranks = local(devices);
    in_threads(4, [&](int t) {
      Queue& queue = *ranks[size_t(t % 2)];
      const StreamOf stream(queue.engine().device());
      for (int i = 0; i < 40; ++i) {
        Data<> d(2000, t % 2);
        run_on(queue, d.call, stream);
        CHECK(stream.done() && d.all(3));
      }
    });
    CHECK(ranks[0]->engine().describe().sequence == 80);
  }
}

void test_the_default_stream_is_a_stream() {
  Queues ranks = local({0, 0});
  Data<> a(300, 0), b(300, 1);
  const auto first = ranks[0]->enqueue(a.call, 0), second = ranks[1]->enqueue(b.call, 0);
  first->join(0, kLongS, {});
  OK(cudaStreamSynchronize(nullptr));
  CHECK(a.all(3) && b.all(3));
}

// ---- graphs ------------------------------------------------------------------------------------------------------

void test_a_graph_is_replayed_a_thousand_times_and_calls_go_on_between() {
  constexpr int kReplays = 1000;
  Queues ranks = local({0, 0});
  const StreamOf stream(0);
  Data<> a(3000, 0), b(3000, 1), c(7001, 0), d(7001, 1);
  std::atomic<int> wrong{0}, looked{0};
  const Body refill = [&] { std::fill(a.x.begin(), a.x.end(), float(++looked)); };
  const Body look = [&] { wrong += !a.all(float(looked + 2)) || !b.all(float(looked + 2)); };
  const Body again = [&] { std::fill(b.x.begin(), b.x.end(), 2.0f); };
  const cudaGraphExec_t graph = captured(stream, [&] {
    launch(refill, stream);
    launch(again, stream);
    const auto first = ranks[0]->enqueue(a.call, stream.number()), second = ranks[1]->enqueue(b.call, stream.number());
    first->join(stream.number(), kLongS, {});
    second->join(stream.number(), kLongS, {});
    launch(look, stream);
  });
  CHECK(looked == 0);  // nothing has run yet
  for (int i = 0; i < kReplays; ++i) {
    OK(cudaGraphLaunch(graph, stream));
    if (i % 100 != 50) continue;
    c.x.assign(7001, 1), d.x.assign(7001, 2);
    const auto first = ranks[0]->enqueue(c.call, stream.number()), second = ranks[1]->enqueue(d.call, stream.number());
    first->join(stream.number(), kLongS, {});
    CHECK(stream.done() && c.all(3) && d.all(3));
  }
  CHECK(stream.done());
  CHECK(looked == kReplays && wrong == 0);
  for (auto& rank : ranks) rank->engine().check();
  OK(cudaGraphExecDestroy(graph));
}

// Ranks of two devices: a graph each, captured in a thread each.
void test_graphs_of_two_devices_meet() {
  Queues ranks = built({0, 1});
  in_threads(2, [&](int r) {
    const StreamOf stream(r);
    const CurrentDevice current(r);
    Data<> data(3000, r);
    const Body refill = [&] { data.x.assign(3000, float(r + 1)); };
    std::atomic<int> right{0};
    const Body look = [&] { right += data.all(3); };
    const cudaGraphExec_t graph = captured(stream, [&] {
      launch(refill, stream);
      run_on(*ranks[size_t(r)], data.call, stream);
      launch(look, stream);
    });
    for (int i = 0; i < 100; ++i) OK(cudaGraphLaunch(graph, stream));
    CHECK(stream.done() && right == 100);
    OK(cudaGraphExecDestroy(graph));
  });
  close_all(ranks);
}

// ---- lists -------------------------------------------------------------------------------------------------------

Layout many(int tensors) {
  Layout layout;
  for (int i = 0; i < tensors; ++i) layout.push_back(i % 5 == 0 ? 0 : i % 300);
  return layout;
}

void test_long_lists_travel_in_tables() {
  Queues ranks = local({0, 0, 1});
  std::vector<Step> steps;
  for (const int tensors : {48, 49, 96, 97, 500, 2000})  // 96 segments of one launch fit into its argument
    for (const Algorithm algorithm : {Algorithm::direct, Algorithm::ring})
      steps.emplace_back(algorithm, CodecKind::none, Dtype::float32, Op::sum, many(tensors), false, 3, tensors);
  play(ranks, steps, "lists");
}

// A table that a graph has captured is not given to a later call.
void test_captured_lists_keep_their_tables() {
  Queues ranks = local({0, 0});
  const StreamOf stream(0);
  Step kept(Algorithm::direct, CodecKind::none, Dtype::float32, Op::max, many(300), false, 2, 1);
  const cudaGraphExec_t graph = captured(stream, [&] {
    const auto first = ranks[0]->enqueue(call_of(kept, 0), stream.number());
    const auto second = ranks[1]->enqueue(call_of(kept, 1), stream.number());
    first->join(stream.number(), kLongS, {});
  });
  std::vector<Step> others;
  for (uint32_t i = 0; i < 10; ++i)
    others.emplace_back(Algorithm::direct, CodecKind::none, Dtype::float32, Op::sum, many(200), false, 2, i);
  play(ranks, others, "between");
  CHECK(kept.memory == kept.input);
  for (int i = 0; i < 3; ++i) {
    kept.memory = kept.input;
    OK(cudaGraphLaunch(graph, stream));
    CHECK(stream.done());
    right(kept, "captured");
  }
  OK(cudaGraphExecDestroy(graph));
}

// ---- what it takes -----------------------------------------------------------------------------------------------

void test_calls_make_nothing() {
  Queues ranks = local({0, 1});
  const auto streams = streams_of(ranks);
  Data<> a(9000, 0), b(9000, 1);
  const auto round = [&] {
    run_on(*ranks[0], a.call, streams[0]);
    run_on(*ranks[1], b.call, streams[1]);
  };
  round();
  const int64_t mallocs = counters().malloc_calls, pinned = counters().host_allocations, events = counters().events;
  for (int i = 0; i < 1000; ++i) {
    round();
    if (i % 10 == 0) CHECK(streams[0].done());  // or all 2000 would have events at once
  }
  CHECK(streams[0].done() && streams[1].done());
  CHECK(counters().malloc_calls == mallocs && counters().host_allocations == pinned && counters().events == events);
}

void test_ctas_are_leased_until_close() {
  const int all = p2p_channels(0, 1, wish(64));  // of the device's 16, all
  CHECK(all == 16 && p2p_channels(0, 3, wish(64)) == 5 && p2p_channels(0, 2, wish(3)) == 3);
  {
    Queues ranks = local({0, 0}, wish(8));
    const Error full = error_of([] { p2p_channels(0, 1, wish(1)); });
    CHECK(says(full, Code::resource, {"GPU 0 runs 16 CTAs at once", "leased 16", "close communicators", "max_ctas"}));
    CHECK(full.errnum == EBUSY);
    CHECK(error_of([] { local({1, 0}, wish(1)); }).errnum == EBUSY);
    CHECK(p2p_channels(1, 1, wish(64)) == 16);  // the other device's are untouched
    CHECK(usable(ranks));
    for (auto& rank : ranks) rank->close(1);
    CHECK(p2p_channels(0, 1, wish(64)) == 16);
  }
  CHECK(p2p_channels(0, 1, wish(64)) == 16);
}

void test_statistics() {
  Queues ranks = local({0, 1});
  Data<> a(1000, 0), b(1000, 1);
  CHECK(run_all(ranks, [&](int r) { return (r ? b : a).call; }));
  Stats s = ranks[0]->engine().stats(false);
  CHECK(s.calls == 1 && s.input_bytes == 4000 && s.wire_bytes == 4 * 1024 && s.nonfinite_groups == 0);
  a.x[700] = INFINITY, b.x[3] = NAN;
  a.call.codec = b.call.codec = CodecKind::fp16;
  a.call.algorithm = b.call.algorithm = Algorithm::direct;
  CHECK(run_all(ranks, [&](int r) { return (r ? b : a).call; }));
  s = ranks[0]->engine().stats(true);
  CHECK(s.calls == 2 && s.wire_bytes == 4 * 1024 + 4 * 513);
  const int64_t others = ranks[1]->engine().stats(true).nonfinite_groups;
  // Either's contribution has one such group, and the results of both, of which each owns some.
  if (!CHECK(s.nonfinite_groups + others == 4))
    std::fprintf(stderr, "  %lld and %lld\n", (long long)s.nonfinite_groups, (long long)others);
  s = ranks[0]->engine().stats(false);
  CHECK(s.calls == 0 && s.nonfinite_groups == 0 && s.wire_bytes == 0);
}

void test_devices_are_described() {
  const auto all = cuda_devices();
  CHECK(all.size() == 2 && all[1].ordinal == 1 && all[1].name == "Stand-in GPU" && all[1].capability == "9.0");
  CHECK(all[0].uuid != all[1].uuid && all[0].uuid.rfind("GPU-", 0) == 0 && all[0].uuid.size() == 40);
  CHECK(all[0].sms == 16 && all[0].pci_bus_id == "0000:10:00.0" && cuda_unusable_reason().empty());
  uint8_t uuid[16];
  uuid_of(1, uuid);
  CHECK(device_with(uuid) == 1 && text_of_uuid(uuid) == all[1].uuid);
}

}  // namespace

int main(int argc, char** argv) {
  ::alarm(150);
  const int every = argc > 1 ? std::atoi(argv[1]) : 1;
  test_devices_are_described();
  test_calls_are_behind_earlier_and_before_later_work();
  test_asynchronous_calls_are_before_what_joins_only();
  test_a_join_waits_for_the_ranks_of_its_device();
  test_threads_and_streams_take_turns();
  test_the_default_stream_is_a_stream();
  test_one_cooperative_launch_a_call_and_device();
  test_small_calls_take_few_ctas();
  test_a_graph_is_replayed_a_thousand_times_and_calls_go_on_between();
  test_graphs_of_two_devices_meet();
  test_long_lists_travel_in_tables();
  test_captured_lists_keep_their_tables();
  test_calls_make_nothing();
  test_ctas_are_leased_until_close();
  test_statistics();
  test_builders_that_are_threads_give_the_same_bits(every);
  test_every_rank_has_the_bits_of_the_reference(every);
  check_nothing_is_left();
  return finish();
}
