// ./test_core [lanes] [every]   The core on racing ranks, and its arithmetic without any. lanes: threads a rank has (0:
// one, two and three in turn). every: plays only each every-th call of the list (sanitizers are slow).
// A stop after 150 s ends whatever hangs.
#include "core_local.h"
#include "core_steps.h"

using namespace steps;

namespace {

using Lanes = racing::RacingLanes<1>;
using PairedLanes = racing::RacingLanes<2>;

constexpr Algorithm kAlgorithms[] = {Algorithm::direct, Algorithm::oneshot, Algorithm::ring};
const std::vector<Layout> kLayouts = {
    {0}, {1}, {255}, {256}, {257}, {1021}, {7001}, {0, 5, 0, 300, 0}, {1, 1, 1}, {256, 0, 511, 64}, {3000, 1, 2999}};

std::vector<Coding<Lanes>> all_codings() {
  return {coding<Lanes, None<Float32>>(CodecKind::none, Dtype::float32),
          coding<Lanes, None<Float64>>(CodecKind::none, Dtype::float64),
          coding<Lanes, None<Bfloat16>>(CodecKind::none, Dtype::bfloat16),
          coding<Lanes, None<Int64>>(CodecKind::none, Dtype::int64),
          coding<Lanes, Fp16<Float32>>(CodecKind::fp16, Dtype::float32),
          coding<Lanes, Fp16<Float16>>(CodecKind::fp16, Dtype::float16)};
}

// Every layout with every codec and all algorithms, shuffled so that everything follows everything.
template <class Lanes>
std::vector<Step> script(const std::vector<Coding<Lanes>>& codings, int ranks, int every, uint32_t seed) {
  std::vector<Step> steps;
  uint32_t i = seed;
  for (const Layout& layout : kLayouts)
    for (const Coding<Lanes>& c : codings)
      for (const Algorithm algorithm : kAlgorithms) {
        if (++i % uint32_t(every) != 0) continue;
        const bool few_ops = c.codec == CodecKind::fp16;
        Op op = Op(i / uint32_t(every) % (few_ops ? 2 : 4));
        if (c.dtype == Dtype::int64 && op == Op::mean) op = Op::sum;
        steps.emplace_back(algorithm, c.codec, c.dtype, op, layout, i % 3 == 0, ranks, i);
      }
  std::vector<size_t> order(steps.size());
  for (size_t k = 0; k < order.size(); ++k) order[k] = k;
  std::shuffle(order.begin(), order.end(), std::mt19937(seed));
  std::vector<Step> shuffled;
  for (const size_t k : order) shuffled.push_back(std::move(steps[k]));
  return shuffled;
}

void test_every_rank_has_the_bits_of_the_reference(int lanes, int every) {
  uint32_t seed = 0;
  for (const int ranks : {1, 2, 3, 4, 5, 8})
    for (const bool shared : {true, false})
      for (const int slots : {4, 64}) {
        ++seed;
        const Shape shape{ranks, lanes > 0 ? lanes : int(seed % 3) + 1, slots, shared};
        auto calls = script(all_codings(), ranks, every, seed);
        run(shape, all_codings(), calls, seed);
      }
}

// As on a GPU: one group's exponent is found by several lanes together.
void test_lanes_that_share_a_group_agree_on_its_exponent(int every) {
  const std::vector<Coding<PairedLanes>> codings = {
      coding<PairedLanes, Fp16<Float32>>(CodecKind::fp16, Dtype::float32)};
  for (const int ranks : {2, 3}) {
    auto calls = script(codings, ranks, every, 77);
    run(Shape{ranks, 2, 4, ranks == 2}, codings, calls, 77);
  }
}

// What one rank may say differently from the others.
struct Lie {
  Field field;
  void (*tell)(Header&);
};
const Lie kLies[] = {{Field::sequence, [](Header& h) { h.sequence += 2; }},
                     {Field::bucket, [](Header& h) { h.bucket = 7; }},
                     {Field::dtype, [](Header& h) { h.dtype = uint8_t(Dtype::int32); }},
                     {Field::op, [](Header& h) { h.op = uint8_t(Op::max); }},
                     {Field::codec, [](Header& h) { h.codec = uint8_t(CodecKind::fp16); }},
                     {Field::tensors, [](Header& h) { h.tensors += 1; }},
                     {Field::layout, [](Header& h) { h.layout += 1; }}};

// Plays one good call, then one in which rank `odd` differs from the others.
void disagree(const Shape& shape, Step& good, Step& usual, Step& other, int odd, const Lie& lie) {
  World world(shape);
  const auto codings = all_codings();
  std::atomic<int> ends{0};
  std::vector<Bucket> first, second;
  for (int r = 0; r < shape.ranks; ++r) {
    first.push_back(good.bucket(r));
    second.push_back((r == odd ? other : usual).bucket(r));
  }
  world.run<Lanes>(uint32_t(odd), [&](Lanes& lanes, const Team& team) {
    const int r = team.rank;
    Step& step = r == odd ? other : usual;
    Header header = step.header(2);
    if (r == odd && lie.tell) lie.tell(header);
    CHECK(play(lanes, team, codings, good, first[size_t(r)], good.header(1)));
    if (!play(lanes, team, codings, step, second[size_t(r)], header)) ++ends;
  });
  CHECK(ends == shape.ranks * shape.lanes);
  const Failure failure = unpack(world.failure);
  CHECK(failure.cause == Cause::mismatch);
  if (!CHECK(failure.field == lie.field))
    std::fprintf(stderr, "  field %d, not %d\n", int(failure.field), int(lie.field));
  CHECK(failure.rank < failure.other && (failure.rank == odd || failure.other == odd));
  CHECK(usual.memory == usual.input);
  CHECK(other.memory == other.input);
}

void test_a_mismatch_is_seen_by_all_before_memory_is_written(int lanes) {
  const auto step = [](Algorithm algorithm, int64_t elems, uint32_t seed) {
    return Step(algorithm, CodecKind::none, Dtype::float32, Op::sum, {elems}, false, 3, seed);
  };
  for (const bool shared : {true, false})
    for (const Algorithm algorithm : kAlgorithms) {
      const Algorithm another = algorithm == Algorithm::direct ? Algorithm::ring : Algorithm::direct;
      const Shape shape{3, lanes > 0 ? lanes : 2, 4, shared};
      const auto against = [&](Step other, int odd, const Lie& lie) {
        Step good = step(algorithm, 3000, 1), usual = step(algorithm, 7001, 2);
        if (Checks::failed == 0) disagree(shape, good, usual, other, odd, lie);  // a deadlock takes its time
      };
      for (int i = 0; i < int(std::size(kLies)); ++i) against(step(algorithm, 7001, 2), i % 3, kLies[i]);
      against(step(algorithm, 0, 2), 0, {Field::numel, nullptr});
      against(step(algorithm, 20011, 2), 1, {Field::numel, nullptr});
      against(step(another, 7001, 2), 2, {Field::algorithm, nullptr});
      against(step(another, 1, 2), 1, {Field::numel, nullptr});  // the more telling of the two
    }
}

void test_every_wait_ends_when_somebody_gives_up() {
  for (const Algorithm algorithm : kAlgorithms) {
    World world({3, 2, 4, true});
    Step step(algorithm, CodecKind::none, Dtype::float32, Op::sum, {7001}, false, 3, 5);
    std::vector<Bucket> buckets;
    for (int r = 0; r < 3; ++r) buckets.push_back(step.bucket(r));
    const uint64_t word = pack({Cause::aborted, 2, 0, Field::none, 1});
    world.run<Lanes>(1, [&](Lanes& lanes, const Team& team) {
      if (team.rank == 2) {  // never calls
        usleep(2000);
        set_once(&world.failure, word);
        set_once(&world.failure, pack({Cause::internal, 1, 0, Field::none, 2}));  // comes second
        return;
      }
      CHECK(!play(lanes, team, all_codings(), step, buckets[size_t(team.rank)], step.header(1)));
    });
    CHECK(world.failure == word);
    CHECK(step.memory == step.input);
  }
}

// ---- without threads ---------------------------------------------------------------------------------------------

void test_flags_compare_across_the_wrap() {
  for (const uint32_t value : {0u, 1u, 5u, 0x7fffffffu, 0x80000000u, 0xfffffffdu, 0xffffffffu}) {
    CHECK(reached(value, value));
    CHECK(reached(value + 1, value));
    CHECK(!reached(value - 1, value));
    CHECK(reached(value + 0x7fffffff, value));
    CHECK(!reached(value - 0x7fffffff, value));
  }
}

void test_no_two_slots_overlap_and_all_lie_in_their_arena() {
  for (const bool shared : {true, false})
    for (const int ranks : {1, 2, 3, 8, 64}) {
      World world({ranks, 1, 4, shared, 128, 128});
      std::vector<char*> taken;
      for (const Stream stream : {kGiven, kResult, kRing})
        for (int writer = 0; writer < ranks; ++writer)
          for (int reader = 0; reader < ranks; ++reader) {
            const bool common = shared && stream == kResult;  // one for all readers
            if (common && reader != writer) continue;
            if (stream == kRing && reader != (writer + 1) % ranks) continue;
            const int home = common ? writer : reader;
            for (uint32_t number = 0xfffffffe; number != 2; ++number) {
              char* at = slot(world.team(0), stream, writer, reader, number);
              taken.push_back(at);
              const char* arena = reinterpret_cast<char*>(world.box[size_t(home)]);
              CHECK(at >= arena + sizeof(Mailbox));
              CHECK(at + 128 <= arena + arena_bytes(ranks, 4, 128, shared));
            }
            CHECK(slot(world.team(0), stream, writer, reader, 3) == slot(world.team(0), stream, writer, reader, 7));
          }
      std::sort(taken.begin(), taken.end());
      for (size_t i = 1; i < taken.size(); ++i) CHECK(taken[i] - taken[i - 1] >= 128);
    }
}

void check_cut(int64_t groups, int ranks, int64_t most, int channels = 1) {
  int64_t all = 0;
  for (int part = 0; part < ranks; ++part) {
    std::vector<Range> ranges;
    for (int channel = 0; channel < channels; ++channel) {
      const Chunks chunks = Chunks::cut(groups, ranks, most, channel, channels);
      CHECK(chunks.slice_groups <= most && (channel > 0 || chunks.slices >= 1));
      for (int64_t slice = 0; slice < chunks.slices; ++slice) ranges.push_back(chunks.range(slice, part));
    }
    std::sort(ranges.begin(), ranges.end(), [](Range a, Range b) { return a.first < b.first; });
    for (const Range range : ranges) {  // they cover the bucket without gap or overlap
      CHECK(range.groups >= 0 && range.groups <= most);
      if (range.groups > 0 && CHECK(range.first == all)) all += range.groups;
    }
  }
  CHECK(all == groups);
}

void test_chunks_cover_the_bucket_exactly_once() {
  for (int64_t groups = 0; groups < 40; ++groups)
    for (int ranks = 1; ranks <= 9; ++ranks)
      for (const int64_t most : {1, 2, 3, 7, 100})
        for (const int channels : {1, 2, 3}) check_cut(groups, ranks, most, channels);
  for (const int ranks : {1, 3, 8, 64}) check_cut((int64_t{1} << 40) / kGroup + 1, ranks, int64_t{1} << 20);
}

void test_offsets_have_64_bits() {
  const int64_t huge = (int64_t{1} << 33) + 12345, groups = groups_of(huge);
  CHECK(groups == (int64_t{1} << 25) + 49);
  CHECK(groups_of(INT64_MAX) == (int64_t{1} << 55));
  char* const base = reinterpret_cast<char*>(uintptr_t{1} << 40);  // never touched
  const Segment table[] = {{base, huge, 0}, {base, 0, groups}, {base + 64, huge, groups}, {base, 1, 2 * groups}};
  const Bucket bucket{table, 4, 2 * groups + 1};
  CHECK(segment_of(bucket, groups - 1) == 0);
  CHECK(segment_of(bucket, groups) == 2);
  CHECK(segment_of(bucket, 2 * groups - 1) == 2);
  CHECK(segment_of(bucket, 2 * groups) == 3);
  struct OneLane {
    int index() const { return 0; }
    int count() const { return 1; }
  };
  std::vector<Unit<double>> units;
  const auto note = [&](Unit<double> unit, bool whole) {
    units.push_back(unit);
    CHECK(whole == (unit.count == kGroup));
  };
  each_unit<double, kGroup>(OneLane{}, bucket, {2 * groups - 2, 3}, note);
  CHECK(units.size() == 3);
  const char* second = base + 64 + (groups - 2) * kGroup * 8;
  CHECK(reinterpret_cast<const char*>(units[0].x) == second && units[0].count == kGroup && units[0].at == 0);
  CHECK(reinterpret_cast<const char*>(units[1].x) == second + kGroup * 8 && units[1].count == huge % kGroup);
  CHECK(reinterpret_cast<const char*>(units[2].x) == base && units[2].count == 1 && units[2].at == 2 * kGroup);
  const Message<None<Float64>> message{base, groups};
  CHECK(reinterpret_cast<char*>(message.codes(huge)) == base + huge * 8);
  const Message<Fp16<Float32>> scaled{base, groups};
  CHECK(reinterpret_cast<char*>(scaled.exponent((groups - 1) * kGroup)) == base + groups * kGroup * 2 + groups - 1);
}

void test_a_slice_is_what_fits() {
  CHECK(most_groups(4096, 4096, 1024) == 4);
  CHECK(most_groups(4096, 2048, 1024) == 2);
  CHECK(most_groups(4096, 1 << 20, 1024) == 4);
  CHECK(most_groups(2048, 100, 2048) == 1);
  CHECK(most_groups(2 * 513 - 1, 4096, 513) == 1);
  CHECK(most_groups(2 * 513, 4096, 513) == 2);
}

void test_a_failure_survives_its_word() {
  const Failure f{Cause::timeout, 63, 62, Field::layout, 0xfedcba98};
  const Failure back = unpack(pack(f));
  CHECK(back.cause == f.cause && back.rank == 63 && back.other == 62);
  CHECK(back.field == f.field && back.sequence == f.sequence);
}

}  // namespace

int main(int argc, char** argv) {
  ::alarm(150);
  const int lanes = argc > 1 ? std::atoi(argv[1]) : 0, every = argc > 2 ? std::atoi(argv[2]) : 1;
  test_flags_compare_across_the_wrap();
  test_no_two_slots_overlap_and_all_lie_in_their_arena();
  test_chunks_cover_the_bucket_exactly_once();
  test_offsets_have_64_bits();
  test_a_slice_is_what_fits();
  test_a_failure_survives_its_word();
  test_every_wait_ends_when_somebody_gives_up();
  test_a_mismatch_is_seen_by_all_before_memory_is_written(lanes);
  test_lanes_that_share_a_group_agree_on_its_exponent(every);
  test_every_rank_has_the_bits_of_the_reference(lanes, every);
  test_each_group_is_in_one_message_of_one_owner();
  test_what_is_gathered_and_spread_is_the_sum_of_the_host(lanes, every);
  return finish();
}
