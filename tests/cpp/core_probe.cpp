// ./core_probe [lanes]   The least of test_core that notices the bugs mutants.py plants: it is compiled for each of
// them, so it has two codecs only. A stop after 40 s ends whatever hangs.
#include "core_steps.h"

using namespace steps;

namespace {

using Lanes = racing::RacingLanes<1>;

constexpr Algorithm kAlgorithms[] = {Algorithm::oneshot, Algorithm::direct, Algorithm::ring};

std::vector<Coding<Lanes>> codings() {
  return {coding<Lanes, None<Float32>>(CodecKind::none, Dtype::float32),
          coding<Lanes, Fp16<Float32>>(CodecKind::fp16, Dtype::float32)};
}

// Bursts of small oneshot calls (peers run ahead), then calls of many slices (slots are used again).
std::vector<Step> script(int ranks) {
  std::vector<Step> steps;
  for (uint32_t i = 0; i < 48; ++i) {
    const Algorithm algorithm = kAlgorithms[i / 4 % 3];
    const bool small = algorithm == Algorithm::oneshot;
    const CodecKind codec = i % 2 == 0 ? CodecKind::none : CodecKind::fp16;
    const Op op = Op(i % 2 == 0 ? i / 2 % 4 : i / 2 % 2);
    const Layout layout = small ? Layout{1 + 51 * int64_t(i % 8)} : Layout{int64_t(1000 + 997 * (i % 8)), 0, 257};
    steps.emplace_back(algorithm, codec, Dtype::float32, op, layout, i % 3 == 0, ranks, i);
  }
  return steps;
}

void test_bits(int lanes) {
  for (const int ranks : {2, 3})
    for (const bool shared : {true, false}) {
      auto steps = script(ranks);
      run(Shape{ranks, lanes, 4, shared, 1152, 1152}, codings(), steps, uint32_t(ranks));
    }
}

// Two ranks that disagree in numel fail, with memory as it was; the first cause is the one that stays.
void test_mismatch(int lanes) {
  for (const Algorithm algorithm : kAlgorithms) {
    World world({2, lanes, 4, true});
    std::vector<Step> steps;
    for (const int64_t elems : {3000, 2999})  // as many groups: without the check the call would succeed
      steps.emplace_back(algorithm, CodecKind::none, Dtype::float32, Op::sum, Layout{elems}, false, 2, 1);
    const Bucket buckets[] = {steps[0].bucket(0), steps[1].bucket(1)};
    world.run<Lanes>(1, [&](Lanes& lane, const Team& team) {
      const size_t r = size_t(team.rank);
      CHECK(!play(lane, team, codings(), steps[r], buckets[r], steps[r].header(1)));
    });
    const uint64_t word = world.failure;
    CHECK(unpack(word).cause == Cause::mismatch && unpack(word).field == Field::numel);
    set_once(&world.failure, pack({Cause::aborted, 1, 0, Field::none, 1}));
    CHECK(world.failure == word);
    for (const Step& step : steps) CHECK(step.memory == step.input);
  }
}

}  // namespace

int main(int argc, char** argv) {
  ::alarm(40);
  racing::patience = std::chrono::seconds(3);
  const int lanes = argc > 1 ? std::atoi(argv[1]) : 2;
  test_mismatch(lanes);
  if (Checks::failed == 0) test_bits(lanes);
  return finish();
}
