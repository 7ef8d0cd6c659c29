// ./test_two_level [every] [patience]   Engine two_level: ranks that are threads, those of a host over memory, hosts
// over the carrier of thread_carrier.h. Arguments as of test_carried; faults as well.
#include "carried_script.h"
#include "two_level_hosts.h"

using namespace thread_ranks;
using carried::Group;
using carried::play;
using carried::Round;
using steps::Layout;
using two_level::Hosts;
using two_level::kCodings;
using two_level::kHosts;
using two_level::size_of;

namespace {

// Buckets smaller than their shards are many, short last groups, and more messages than slots.
const std::vector<Layout> kLayouts = {{0},
                                      {1},
                                      {256},
                                      {257},
                                      {600},
                                      {7001},
                                      {65536},
                                      {(1 << 17) + 3},
                                      {1, 1, 1},
                                      {0, 5, 0, 300, 0},
                                      {},
                                      {256, 0, 511, 64},
                                      {3000, 1, 2999},
                                      {4096, 2560, 255, 8192, 257, 12288}};

carried::Shape shape_of(const Hosts& hosts, int64_t slice_bytes, bool fp16_inside) {
  carried::Shape shape{size_of(hosts), patience_s, slice_bytes};
  shape.hosts = hosts;
  shape.fp16_inside = fp16_inside;
  return shape;
}

void test_every_rank_has_the_bits_of_the_reference(int every) {
  uint32_t seed = 1;
  for (const Hosts& hosts : kHosts)
    for (const bool inside : {false, true}) {
      if (Checks::failed > 0) return;
      Group group(shape_of(hosts, 1, inside));
      // direct: flat algorithms between all ranks still serve, between calls of two levels.
      auto calls = steps::shuffled(kLayouts, kCodings, group.size(), 2 * every, ++seed,
                                   {Algorithm::two_level, Algorithm::two_level, Algorithm::direct});
      for (Round& call : calls) call.hosts = hosts, call.fp16_inside = inside;
      play(group, calls);
    }
}

void test_a_call_that_leaves_the_algorithm_open_takes_two_levels() {
  Group group(shape_of(kHosts[0], 0, false));
  const Description d = group.engine(0).describe();
  CHECK(d.hosts == kHosts[0] && d.intra_codec == "none");
  const int64_t before = group.board.sent_bytes(0);
  group.all([&](int r) {
    Data d(100'000, r);
    group.queue(r).run(d.call);
    CHECK(d.all(10));
  });
  // Half of the bucket is this rank's; half of that goes to the other owner, and the result of the other half.
  CHECK(group.board.sent_bytes(0) - before == group.engine(0).stats(false).wire_bytes);
  CHECK(std::abs(group.board.sent_bytes(0) - before - 200'000) < 4096);
}

// The error that a call ends with. It holds the job longer than the error, which share memory: ThreadSanitizer does not
// see how exceptions are counted.
void expect(const Group& group, int rank, Data& d, Code code, const std::string& text) {
  const auto job = group.queue(rank).submit(d.call);
  const Error error = error_of(job);
  CHECK(is(error, code) && says(error, text));
}

void test_other_engines_refuse_two_levels() {
  Group group(2);
  Data d(10, 0);
  d.call.algorithm = Algorithm::two_level;
  expect(group, 0, d, Code::unsupported, "algorithm two_level");
}

// Rank `missing` does not come to its second call; the others of its host, and those of the other, wait in vain.
void test_a_missing_rank_is_named_by_all(int missing) {
  carried::Shape shape = shape_of(kHosts[0], 1, false);
  shape.timeout_s = kShortS;
  Group group(shape);
  group.all([&](int r) {
    Data d(50'000, r);
    group.queue(r).run(d.call);
    CHECK(d.all(10));
    if (r == missing) return;
    expect(group, r, d, Code::timeout, "rank " + std::to_string(missing));
  });
}

// What rank 1 sends to its peer on the other host is lost. Its peer waits for it, and each one's neighbour for them.
void test_a_silent_line_ends_the_call_on_all_ranks() {
  carried::Shape shape = shape_of(kHosts[0], 0, false);
  shape.timeout_s = kShortS;
  Group group(shape);
  group.board.lose(1);
  group.all([&](int r) {
    Data d(2'000'000, r);  // direct between hosts: nobody can finish
    expect(group, r, d, Code::timeout, "");
  });
}

void test_a_rank_that_dies_inside_a_call_is_lost_to_all() {
  Group group(shape_of(kHosts[5], 1, false));
  group.board.lose(3);  // so that nobody can finish
  const auto before = group.exchanges();
  std::thread killer([&] {
    group.until_payload_moves(before);
    group.ranks[3]->die();
  });
  group.all([&](int r) {
    Data d(200'000, r);
    if (r != 3) return expect(group, r, d, Code::peer_lost, "rank 3");
    const auto job = group.queue(r).submit(d.call);
    CHECK(job->wait(patience_s));
  });
  killer.join();
}

}  // namespace

int main(int argc, char** argv) {
  ::alarm(180);
  const int every = argc > 1 ? std::atoi(argv[1]) : 1;
  if (argc > 2) patience_s = std::atof(argv[2]);
  test_every_rank_has_the_bits_of_the_reference(every);
  if (Checks::failed > 0) return finish();  // the others would wait for what does not come
  test_a_call_that_leaves_the_algorithm_open_takes_two_levels();
  test_other_engines_refuse_two_levels();
  for (const int missing : {0, 1, 3}) test_a_missing_rank_is_named_by_all(missing);
  test_a_silent_line_ends_the_call_on_all_ranks();
  test_a_rank_that_dies_inside_a_call_is_lost_to_all();
  return finish();
}
