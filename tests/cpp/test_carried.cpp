// ./test_carried [every] [patience]   Engines whose messages a carrier moves: ranks that are threads, over a carrier
// that delivers late, in any order, and checks what it is asked (thread_carrier.h). Every result is compared bit for
// bit with core_reference.h. every: plays only each every-th call of the list (sanitizers are slow). patience: seconds
// for what should take milliseconds. A stop after 120 s ends whatever hangs. What goes wrong: test_carried_faults.cpp.
#include "carried_script.h"

using namespace thread_ranks;
using carried::Group;
using carried::play;
using carried::Round;
using steps::Layout;

namespace {

constexpr Algorithm kAlgorithms[] = {Algorithm::direct, Algorithm::oneshot, Algorithm::ring};
// 16 KiB are four slots of the smallest size. Segments within a message, across messages, and whole ones beside short
// ones, whose values do not lie in memory as they travel.
const std::vector<Layout> kLayouts = {{0},
                                      {1},
                                      {255},
                                      {256},
                                      {257},
                                      {7001},
                                      {65536},
                                      {(1 << 18) + 3},
                                      {1, 1, 1},
                                      {0, 5, 0, 300, 0},
                                      {},
                                      {256, 0, 511, 64},
                                      {3000, 1, 2999},
                                      {4096, 2560, 255, 8192, 257, 12288}};

const std::vector<steps::Kind> kCodings = {
    {CodecKind::none, Dtype::float32}, {CodecKind::none, Dtype::int32}, {CodecKind::fp16, Dtype::float32}};

std::vector<Round> script(int ranks, int every, uint32_t seed) {
  return steps::shuffled(kLayouts, kCodings, ranks, every, seed);
}

void test_every_rank_has_the_bits_of_the_reference(int every) {
  for (const int ranks : {2, 3, 4, 5, 8}) {
    if (Checks::failed > 0) return;
    Group group(ranks);
    auto calls = script(ranks, every, uint32_t(ranks));
    play(group, calls);
  }
}

void test_bits_do_not_depend_on_slices() {
  for (const int ranks : {2, 3}) {
    Group group(carried::Shape{ranks, patience_s, 0});
    CHECK(group.engine(0).describe().slot_bytes > 100 * 4096);
    auto calls = script(ranks, 7, 7);
    play(group, calls);
  }
}

void test_threads_share_a_communicator() {
  const Group group(3);
  group.all([&](int r) {
    in_threads(3, [&](int t) {  // equal calls: it does not matter which goes with which
      for (int i = 0; i < 10; ++i) {
        Data d(3000, r);
        if (t < 2)
          group.queue(r).run(d.call);
        else
          CHECK(group.queue(r).submit(d.call)->wait(patience_s));
        CHECK(d.all(6));
        group.engine(r).check();
        CHECK(group.engine(r).describe().slots == kCarriedSlots && group.engine(r).stats(false).calls >= 0);
      }
    });
  });
}

// A rank may leave as soon as its own last call is done: the others must still finish theirs.
void test_leaving_after_the_last_call_disturbs_nobody() {
  for (int i = 0; i < 6; ++i) {
    Group group(3);
    group.all([&](int r) {
      Data d(i % 2 ? 5 : 20000, r);
      d.call.algorithm = kAlgorithms[i / 2];
      group.queue(r).run(d.call);
      group.queue(r).close(0);
      CHECK(d.all(6));
    });
  }
}

void test_one_rank_has_nothing_to_do() {
  Group group(1);
  Data d(1000, 4);
  d.call.codec = CodecKind::fp16;
  group.queue(0).run(d.call);
  CHECK(group.queue(0).submit(d.call)->wait(patience_s) && d.all(5));
  const Stats stats = group.engine(0).stats(false);
  CHECK(stats.calls == 0 && stats.wire_bytes == 0 && group.board.exchanges(0) == 0);
}

}  // namespace

int main(int argc, char** argv) {
  ::alarm(120);
  const int every = argc > 1 ? std::atoi(argv[1]) : 1;
  if (argc > 2) patience_s = std::atof(argv[2]);
  test_every_rank_has_the_bits_of_the_reference(every);
  if (Checks::failed > 0) return finish();  // the others would wait for what does not come
  test_bits_do_not_depend_on_slices();
  test_threads_share_a_communicator();
  test_leaving_after_the_last_call_disturbs_nobody();
  test_one_rank_has_nothing_to_do();
  return finish();
}
