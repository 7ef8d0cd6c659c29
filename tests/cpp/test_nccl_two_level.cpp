// ./test_nccl_two_level [every]   Algorithm two_level of engine nccl, on stand-ins for the CUDA runtime and for NCCL:
// bits against core_reference.h, lists, graphs, launches, and what goes wrong. every: as of test_nccl.
#include "nccl/step_kernels.h"
#include "nccl_ranks.h"
#include "two_level_hosts.h"

using namespace nccl_ranks;
using stand_in::machine;
using two_level::Hosts;
using two_level::kCodings;
using two_level::kHosts;
using two_level::size_of;

namespace {

// Buckets smaller than their shards are many, short last groups, and more messages than slots.
const std::vector<Layout> kLayouts = {
    {0}, {1}, {257}, {7001}, {65536}, {}, {0, 5, 0, 300, 0}, {256, 0, 511, 64}, {4096, 2560, 255, 8192, 257, 12288}};

Shape shape_of(const Hosts& hosts, bool fp16_inside = false) {
  Shape shape{size_of(hosts)};
  shape.hosts = {hosts, fp16_inside ? CodecKind::fp16 : CodecKind::none};
  return shape;
}

void place(std::vector<Round>& calls, const NcclHosts& hosts) {
  for (Round& call : calls) call.hosts = hosts.hosts, call.fp16_inside = hosts.codec == CodecKind::fp16;
}

// Flat algorithms between all ranks still serve, between calls of two levels.
std::vector<Round> script(const Shape& shape, int every, uint32_t seed) {
  auto calls = steps::shuffled(kLayouts, kCodings, shape.ranks, every, seed,
                               {Algorithm::two_level, Algorithm::two_level, Algorithm::direct});
  place(calls, shape.hosts);
  return calls;
}

void test_every_rank_has_the_bits_of_the_reference(int every) {
  uint32_t seed = 1;
  for (const Hosts& hosts : kHosts)
    for (const bool inside : {false, true}) {
      if (Checks::failed > 0) return;
      const Shape shape = shape_of(hosts, inside);
      Group group(shape);
      if (!group.joined()) return;
      auto calls = script(shape, 2 * every, ++seed);
      play(group, calls, inside ? "fp16 inside" : "plain inside");
      for (int r = 0; r < group.size(); ++r) CHECK(group.engine(r).stats(true).calls == int64_t(calls.size()));
    }
}

void test_bits_do_not_depend_on_slices() {
  Shape shape = shape_of(kHosts[4]);
  shape.slice_bytes = 0;
  Group group(shape);
  if (!group.joined()) return;
  auto calls = script(shape, 5, 7);
  play(group, calls, "one slice");
}

void test_long_lists_travel_in_tables() {
  const Shape shape = shape_of(kHosts[2]);
  Group group(shape);
  if (!group.joined()) return;
  std::vector<Round> calls;
  for (const int tensors : {kInlineSegments, kInlineSegments + 1, 500}) {
    Layout layout;
    for (int i = 0; i < tensors; ++i) layout.push_back(i % 5 == 0 ? 0 : i % 300);
    for (const CodecKind codec : {CodecKind::none, CodecKind::fp16})
      calls.emplace_back(Algorithm::two_level, codec, Dtype::float32, Op::mean, layout, false, shape.ranks, tensors);
  }
  place(calls, shape.hosts);
  play(group, calls, "lists");
}

void test_more_tensors_than_tables_hold_are_refused() {
  Group group(shape_of(kHosts[0]));
  if (!group.joined()) return;
  Call call;
  call.algorithm = Algorithm::two_level;
  call.addresses.assign(size_t(SegmentTables::kMost / 2), nullptr);
  call.counts.assign(call.addresses.size(), 0);
  const Error error = error_of([&] { group.queue(0).enqueue(call, group.engine(0).stream()); });
  CHECK(error.code == Code::unsupported && says(error, Code::unsupported, {"tensors in one call"}));
  CHECK(usable(group));
}

// Replayed, and between direct calls.
void test_graphs_are_replayed() {
  const Shape shape = shape_of(kHosts[1]);
  Group group(shape);
  if (!group.joined()) return;
  const auto streams = streams_of(group.ranks);
  std::vector<Round> kept;
  kept.emplace_back(Algorithm::two_level, CodecKind::fp16, Dtype::float32, Op::sum, Layout{30000, 5}, false, 4, 1);
  place(kept, shape.hosts);
  Round& step = kept.front();
  const auto adopted = adopt(kept, group);
  std::vector<cudaGraphExec_t> graphs(4);
  group.all([&](int r) {
    graphs[size_t(r)] =
        captured(streams[size_t(r)], [&] { run_on(group.queue(r), call_of(step, r), streams[size_t(r)]); });
  });
  CHECK(step.memory == step.input);
  for (int i = 0; i < 3; ++i) {
    for (size_t r = 0; r < 4; ++r) std::copy(step.input[r].begin(), step.input[r].end(), step.memory[r].begin());
    for (size_t r = 0; r < 4; ++r) OK(cudaGraphLaunch(graphs[r], streams[r]));
    for (size_t r = 0; r < 4; ++r) CHECK(streams[r].done() && step.memory[r] == step.result(int(r)));
    auto between = script(shape, 11, uint32_t(i));
    play(group, between, "between replays");
  }
  for (const cudaGraphExec_t graph : graphs) OK(cudaGraphExecDestroy(graph));
}

// Two hosts of two: values of whole groups need no slots inside. What a call takes, and what it sends to the other
// host.
void test_values_go_from_memory_to_memory() {
  constexpr int64_t kElems = 1 << 16;
  Shape shape = shape_of(kHosts[0]);
  shape.slice_bytes = 0;
  Group group(shape);
  if (!group.joined()) return;
  std::vector<std::unique_ptr<OnDevice<>>> all;
  for (int r = 0; r < 4; ++r) {
    all.push_back(std::make_unique<OnDevice<>>(kElems, r, group.device_of(r)));
    all.back()->call.algorithm = Algorithm::two_level;
  }
  const int64_t before = counted("bytes", 0);
  stand_in::clear_log();
  machine().log = true;
  CHECK(run_all(group.ranks, [&](int r) { return all[size_t(r)]->call; }));
  machine().log = false;
  int64_t inside = 0;
  for (const stand_in::Launch& l : stand_in::launches())
    inside += l.key == inside_kernel(Dtype::float32, CodecKind::none);
  // Each rank adds up its shard; nothing is put or taken.
  if (!CHECK(inside == 4)) std::fprintf(stderr, "  %lld\n", (long long)inside);
  for (const auto& d : all) CHECK(d->all(10));
  // To the other host goes my shard, as oneshot has it. Inside: the other's shard, and the result of mine.
  CHECK(group.engine(0).stats(false).wire_bytes == kElems * 4 / 2);
  CHECK(counted("bytes", 0) - before == kElems * 4 / 2 + kElems * 4);
}

void test_a_communicator_says_who_is_where() {
  Group group(shape_of(kHosts[6], true));
  if (!group.joined()) return;
  CHECK(usable(group));  // what leaves the algorithm open stays flat
  const Description d = group.engine(1).describe();
  CHECK(d.engine == "nccl" && d.hosts == kHosts[6] && d.intra_codec == "fp16");
  CHECK(d.arena_bytes <= 64 * kMiB);
}

// ---- what goes wrong ---------------------------------------------------------------------------------------------

void test_without_hosts_it_is_refused() {
  Group group(Shape{2});
  if (!group.joined()) return;
  OnDevice<> d(1000, 0, 0);
  d.call.algorithm = Algorithm::two_level;
  const Error error = error_of([&] { group.queue(0).enqueue(d.call, group.engine(0).stream()); });
  CHECK(says(error, Code::unsupported, {"algorithm two_level"}));
  CHECK(usable(group) && group.engine(0).describe().hosts.empty());
}

void test_memory_that_is_too_small_is_refused() {
  const NcclHosts hosts{kHosts[5], CodecKind::none};
  const Error error = error_of([&] { TwoLevelMemory(0, 6, hosts, 50'000, 0); });
  CHECK(says(error, Code::argument, {"too few for two levels between 3 hosts", "DPCOMM_ARENA_MB"}));
}

// Rank `missing` does not call; the others of its host, and those of the other, wait in vain.
void test_a_missing_rank_is_named_by_all(int missing) {
  Shape shape = shape_of(kHosts[0]);
  shape.timeout_s = 2 * thread_ranks::kSlow;  // of each of some forty groups of NCCL calls
  Group group(shape);
  if (!group.joined()) return;
  group.all([&](int r) {
    if (r == missing) return;
    OnDevice<> d(5'000, r, group.device_of(r));
    d.call.algorithm = Algorithm::two_level;
    const StreamOf stream(group.device_of(r));
    std::shared_ptr<Pending> pending;
    const Error error = error_of([&] {
      pending = group.queue(r).enqueue(d.call, stream.number());
      CHECK(pending->synchronize(kLongS, {}));
      if (const auto failure = pending->error()) std::rethrow_exception(failure);
    });
    CHECK(says(error, Code::timeout, {"rank " + std::to_string(missing)}));
    CHECK(d.x[0] != d.x[0] || (!pending && d.all(float(r + 1))));  // NaN: nobody takes it for a sum
  });
}

// Ranks that are told of different places agree on nothing.
void test_places_that_differ_are_a_mismatch() {
  Shape shape = shape_of(kHosts[0]);
  shape.elsewhere = 3;
  Group group(shape);
  if (!group.joined()) return;
  group.all([&](int r) {
    OnDevice<> d(0, r, group.device_of(r));  // what has no payload is compared, too
    d.call.algorithm = Algorithm::two_level;
    const StreamOf stream(group.device_of(r));
    const auto pending = group.queue(r).enqueue(d.call, stream.number());
    CHECK(pending->synchronize(kLongS, {}));
    const Error error = error_of(*pending);
    CHECK(says(error, Code::mismatch, {}));
  });
}

}  // namespace

int main(int argc, char** argv) {
  ::alarm(170);
  const int every = argc > 1 ? std::atoi(argv[1]) : 1;
  test_every_rank_has_the_bits_of_the_reference(every);
  test_bits_do_not_depend_on_slices();
  test_long_lists_travel_in_tables();
  test_more_tensors_than_tables_hold_are_refused();
  test_graphs_are_replayed();
  test_values_go_from_memory_to_memory();
  test_a_communicator_says_who_is_where();
  test_without_hosts_it_is_refused();
  test_memory_that_is_too_small_is_refused();
  for (const int missing : {0, 3}) test_a_missing_rank_is_named_by_all(missing);
  test_places_that_differ_are_a_mismatch();
  return finish();
}
