// What ranks of a host do around an all-reduce between hosts (core/local.h), on racing lanes: shards are gathered at
// their owners and spread again, with nothing between.
#include "core_local.h"

#include "core/local.h"
#include "core_steps.h"

namespace {

using namespace dpcomm;
using Lanes = racing::RacingLanes<1>;
using PairedLanes = racing::RacingLanes<2>;
using steps::Step;

void count_groups(const Shards& shards, std::vector<int>& met) {
  for (int owner = 0; owner < shards.ranks; ++owner)
    for (int64_t slice = 0; slice < shards.slices(); ++slice)
      for (int part = 0; part < shards.parts; ++part)
        for (int64_t k = 0; k < shards.messages(); ++k) {
          const Range r = shards.range(owner, slice, part, k);
          CHECK(r.groups >= 0 && r.groups <= shards.message_groups);
          for (int64_t g = r.first; g < r.first + r.groups; ++g)
            if (CHECK(g >= 0 && g < shards.groups)) ++met[size_t(g)];
        }
}

template <class L>
bool round(L& lanes, const Team& t, const Step& step, const Bucket& bucket, const Shards& shards, LocalTurn turn,
           int64_t slice, int part) {
  if (step.codec == CodecKind::fp16)
    return local_round<Fp16<Float32>>(lanes, t, bucket, step.op, shards, turn, slice, part);
  if (step.dtype == Dtype::bfloat16)
    return local_round<None<Bfloat16>>(lanes, t, bucket, step.op, shards, turn, slice, part);
  return local_round<None<Float32>>(lanes, t, bucket, step.op, shards, turn, slice, part);
}

// As the schedule between hosts does it: a slice is gathered before the one two rounds earlier is spread.
template <class L>
bool reduce(L& lanes, const Team& t, const Step& step, const Bucket& bucket, const Shards& shards) {
  for (int64_t c = 0; c < shards.slices() + 2; ++c)
    for (int part = 0; part < shards.parts; ++part) {
      if (c < shards.slices() && !round(lanes, t, step, bucket, shards, LocalTurn::gather, c, part)) return false;
      if (c >= 2 && !round(lanes, t, step, bucket, shards, LocalTurn::spread, c - 2, part)) return false;
    }
  return true;
}

std::vector<Step> script(int ranks, int every, uint32_t seed) {
  const std::vector<steps::Kind> kinds = {
      {CodecKind::none, Dtype::float32}, {CodecKind::none, Dtype::bfloat16}, {CodecKind::fp16, Dtype::float32}};
  auto calls = steps::shuffled({{0}, {1}, {257}, {3000, 1, 2999}, {5, 0, 300, 7001}, {20000}}, kinds, ranks, every,
                               seed, {Algorithm::two_level});
  std::vector<Step> kept;
  for (Step& call : calls) {
    if (call.op == Op::mean) continue;  // hosts divide
    call.hosts.emplace_back();
    for (int r = 0; r < ranks; ++r) call.hosts[0].push_back(r);
    call.fp16_inside = true, call.fp16_between = false;
    kept.push_back(std::move(call));
  }
  return kept;
}

// count: of shards; parts: hosts.
template <class L>
void play(int ranks, int lanes, int count, int parts, int every) {
  const racing::Shape shape{ranks, lanes, 4, true};
  racing::World world(shape);
  auto calls = script(ranks, every, uint32_t(ranks * 100 + lanes * 10 + count));
  std::vector<std::vector<Bucket>> buckets;
  for (Step& call : calls) {
    buckets.emplace_back();
    for (int r = 0; r < ranks; ++r) buckets.back().push_back(call.bucket(r));
  }
  std::atomic<int> failures{0};
  world.run<L>(7, [&](L& one, const Team& team) {
    for (size_t i = 0; i < calls.size() && failures == 0; ++i) {
      const Bucket& bucket = buckets[i][size_t(team.rank)];
      const Shards shards = Shards::cut(bucket.groups, count, parts, 5, ranks, 2);
      if (!reduce(one, team, calls[i], bucket, shards)) ++failures;
    }
  });
  CHECK(failures == 0);
  for (size_t i = 0; i < calls.size(); ++i) steps::compare(shape, calls[i], i);
}

}  // namespace

void test_each_group_is_in_one_message_of_one_owner() {
  for (const int64_t groups : {0, 1, 2, 5, 17, 64, 101})
    for (const int count : {1, 2, 3, 5})
      for (int ranks = 1; ranks <= count; ++ranks)
        for (const int parts : {1, 2, 3})
          for (const int64_t most : {1, 4, 100})
            for (const int64_t message : {1, 3, 50}) {
              const Shards shards = Shards::cut(groups, count, parts, most, ranks, message);
              std::vector<int> met(static_cast<size_t>(groups));
              count_groups(shards, met);
              CHECK(std::all_of(met.begin(), met.end(), [](int n) { return n == 1; }));
            }
}

void test_what_is_gathered_and_spread_is_the_sum_of_the_host(int lanes, int every) {
  for (const int ranks : {1, 2, 3, 4})
    for (const int each : {1, 3}) {
      if (lanes > 0 && each != lanes) continue;
      play<Lanes>(ranks, each, ranks, 2, every);      // a shard each
      play<Lanes>(ranks, each, ranks + 2, 3, every);  // owners of several
    }
  play<PairedLanes>(2, 2, 3, 1, every);
}
