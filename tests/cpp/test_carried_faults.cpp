// Engines whose messages a carrier moves, when something goes wrong: ranks that disagree, leave, die or abort, carriers
// that lose messages or break. A stop after 120 s ends whatever hangs.
#include "carried_group.h"

using namespace thread_ranks;
using carried::Group, carried::Shape;
using namespace std::chrono_literals;

// Errors are destroyed by whichever thread lets go of them last, and the C++ library that counts them is not built for
// this race detector.
extern "C" const char* __tsan_default_suppressions() {
  return "race:std::runtime_error::~runtime_error\nrace:std::__exception_ptr::exception_ptr::_M_release\n";
}

namespace {

// A call of rank r that fails. When its error is here nothing touches the caller's memory any more.
Error failure_of(Group& group, int r, Data& d, double limit_s = 5) {
  const Error error = error_of([&] { group.queue(r).run(d.call); }, limit_s * kSlow);
  CHECK(group.board.aborted(r) && !group.board.holds_memory(r));
  const std::vector<float> left = d.x;
  std::this_thread::sleep_for(5ms);
  CHECK(std::memcmp(left.data(), d.x.data(), left.size() * sizeof(float)) == 0);
  return error;
}
void is_poisoned(Group& group, int r) {
  Data d(5, r);
  CHECK(is(error_of([&] { group.queue(r).run(d.call); }, kSlow), Code::aborted) && d.all(float(r + 1)));
}

constexpr Algorithm kAlgorithms[] = {Algorithm::direct, Algorithm::oneshot, Algorithm::ring};

// ---- before any payload moves --------------------------------------------------------------------------------------

void test_mismatches_move_nothing_and_are_told_to_all() {
  for (const Mismatch& mismatch : kMismatches) {
    Group group(3);
    const auto before = group.exchanges();
    group.all([&](int r) {
      Disagreeing d(mismatch, r);
      const Error error = failure_of(group, r, d, 2);
      CHECK(is(error, Code::mismatch) && says(error, mismatch.text));
      CHECK(d.all(float(r + 1)));
      is_poisoned(group, r);
    });
    CHECK(group.exchanges() == before);
  }
}

// An argument that no rank can serve is no failure of the group.
void test_an_unserved_codec_leaves_the_communicator_usable() {
  Group group(2);
  const auto before = group.exchanges();
  group.all([&](int r) {
    Data d(1000, r);
    d.call.codec = CodecKind::fp16;
    d.call.op = Op::max;
    CHECK(is(error_of([&] { group.queue(r).run(d.call); }), Code::unsupported));
    d.call.op = Op::sum, d.call.dtype = Dtype::int32;
    CHECK(is(error_of(group.queue(r).submit(d.call)), Code::unsupported));
    CHECK(d.all(float(r + 1)) && group.exchanges() == before);
    CHECK(!group.board.aborted(r));
  });
  group.all([&](int r) {
    Data d(1000, r);
    d.call.codec = CodecKind::fp16;
    group.queue(r).run(d.call);
    CHECK(d.all(3));
  });
}

void test_a_rank_that_never_calls_is_named() {
  Group group(3, kShortS);
  group.all([&](int r) {
    if (r == 2) return;
    Data d(5, r);
    const Error error = failure_of(group, r, d, 3);
    CHECK(is(error, Code::timeout) && says(error, "rank 2 (pid ") && says(error, "last seq 0"));
    CHECK(error.waiting_for == std::vector<int>{2} && d.all(float(r + 1)));
  });
  is_poisoned(group, 2);
  CHECK(is(error_of([&] { group.engine(0).check(); }), Code::timeout));
}

// They are asked to decide, one after the other: that takes a while, and the cause is known all the same.
void test_a_rank_finds_the_cause_though_all_others_are_silent() {
  constexpr int kRanks = 24, kMe = kRanks - 1;
  carried::Board board(kRanks);
  planes::Mesh mesh = planes::mesh_of(kRanks);  // nobody is at the other ends
  CarriedEngine engine(kMe, {carried::kScratch}, std::vector<CarriedPeer>(kRanks, {getpid(), ""}),
                       std::make_unique<ControlPlane>(kMe, std::move(mesh[kMe])), board.carrier(kMe), isa("portable"),
                       "threads");
  const Error error = error_of([&] { engine.verify(0.1, "abcd"); }, (4 + 0.6 * kRanks) * kSlow);
  CHECK(is(error, Code::timeout) && error.waiting_for.size() == kRanks - 1);
  CHECK(board.aborted(kMe) && board.exchanges(kMe) == 0);
}

void test_a_peer_that_closes_early_is_lost() {
  Group group(3);
  std::thread leaver([&] {
    std::this_thread::sleep_for(20ms);
    group.ranks[1].reset();
  });
  group.all([&](int r) {
    if (r == 1) return;
    Data d(40000, r);
    const Error error = failure_of(group, r, d, 2);
    CHECK(is(error, Code::peer_lost) && error.rank == 1 && says(error, "clean shutdown"));
    CHECK(d.all(float(r + 1)));
  });
  leaver.join();
}

// ---- while payload moves -------------------------------------------------------------------------------------------

// Rank 2 has all it needs, the others wait for what it has sent.
void test_a_message_that_does_not_come_is_a_timeout() {
  Group group(Shape{3, kShortS, 1, 7});  // nobody but the engine aborts carriers
  group.board.lose(2);
  group.all([&](int r) {
    Data d(100, r);
    d.call.algorithm = Algorithm::oneshot;
    if (r == 2) {
      group.queue(r).run(d.call);
      CHECK(d.all(6));
      return;
    }
    const Error error = failure_of(group, r, d, 3);
    CHECK(is(error, Code::timeout) && error.waiting_for == std::vector<int>{2});
  });
  for (int r = 0; r < 3; ++r) is_poisoned(group, r);
}

// Nobody knows who is to blame in the middle of a call: ranks that wait for each other are late as well.
void test_lost_messages_end_every_algorithm_on_all_ranks() {
  for (const Algorithm algorithm : kAlgorithms) {
    Group group(3, kShortS);
    group.board.lose(1);
    std::atomic<int> timeouts{0};
    group.all([&](int r) {
      Data d(200000, r);
      d.call.algorithm = algorithm;
      const Error error = failure_of(group, r, d, 3);
      CHECK(error.code == Code::timeout || is(error, Code::aborted));
      timeouts += error.code == Code::timeout;
      is_poisoned(group, r);
    });
    CHECK(timeouts >= 1);
  }
}

void test_a_carrier_that_breaks_is_told_to_all() {
  for (const Algorithm algorithm : kAlgorithms) {
    Group group(Shape{3, patience_s, 1, 2});  // on rank 1 nobody but the engine aborts the carrier
    group.board.cut(1);
    group.all([&](int r) {
      Data d(200000, r);
      d.call.algorithm = algorithm;
      const Error error = failure_of(group, r, d);
      CHECK(is(error, Code::aborted) && says(error, "rank 1 gave up") && says(error, "threads: the cable is cut"));
      is_poisoned(group, r);
    });
  }
}

// A fault while payload moves: rank 1's messages are lost, so that no rank's call can end.
void during_a_call(Group& group, const std::function<void()>& fault,
                   const std::function<void(int, const Error&)>& check) {
  const auto before = group.exchanges();
  group.board.lose(1);
  std::thread other([&] {
    group.until_payload_moves(before);
    fault();
  });
  group.all([&](int r) {
    Data d(200000, r);
    check(r, failure_of(group, r, d, 3));
    is_poisoned(group, r);
  });
  other.join();
}

void test_abort_ends_calls_in_flight_on_all_ranks() {
  Group group(3);
  during_a_call(
      group,
      [&] {
        in_threads(2, [&](int) { group.engine(2).abort("enough"); });  // the first cause wins
      },
      [](int, const Error& error) {
        CHECK(is(error, Code::aborted) && says(error, "rank 2 gave up") && says(error, "enough"));
      });
}

void test_a_peer_that_dies_in_the_middle_is_lost() {
  Group group(3);
  during_a_call(
      group, [&] { group.ranks[2]->die(); },
      [](int, const Error& error) {
        CHECK(is(error, Code::peer_lost) && error.rank == 2 && says(error, "disappeared"));
      });
}

void test_a_peer_that_is_destroyed_in_the_middle_is_told_to_all() {
  Group group(3);
  const auto before = group.exchanges();
  group.board.lose(1);
  std::shared_ptr<Job> job;
  Data mine(200000, 2);
  group.all([&](int r) {
    if (r == 2) {
      job = group.queue(r).submit(mine.call);
      group.until_payload_moves(before);
      group.ranks[2].reset();
      return;
    }
    Data d(200000, r);
    const Error error = failure_of(group, r, d, 3);
    CHECK(is(error, Code::aborted) && says(error, "rank 2 gave up") && says(error, "closed while operations"));
  });
  CHECK(job->done() && is(error_of(job), Code::aborted) && !group.board.holds_memory(2));
}

void test_an_interrupted_caller_aborts() {
  Group group(2);
  group.board.lose(1);
  std::atomic<bool> interrupted{false};
  std::thread signal([&] {
    std::this_thread::sleep_for(50ms);
    interrupted = true;
  });
  group.all([&](int r) {
    Data d(100000, r);
    if (r == 0) d.call.interrupted = [&] { return interrupted.load(); };
    const Error error = failure_of(group, r, d, 2);
    CHECK(is(error, Code::aborted) && says(error, "rank 0 gave up") && says(error, "interrupted"));
  });
  signal.join();
}

// ---- closing and verifying -----------------------------------------------------------------------------------------

void test_close_ends_what_is_in_flight() {
  Group group(2);
  group.board.lose(1);
  Data d(100000, 0), later(5, 0), peer(100000, 1);
  const auto job = group.queue(0).submit(d.call), queued = group.queue(0).submit(later.call);
  const auto theirs = group.queue(1).submit(peer.call);
  const auto start = Clock::now();
  std::thread twice([&] { group.queue(0).close(0.05); });  // idempotent, from two threads
  group.queue(0).close(0.05);
  twice.join();
  CHECK(seconds_since(start) < 2 * kSlow);
  CHECK(is(error_of(job), Code::aborted) && is(error_of(queued), Code::aborted) && later.all(1));
  CHECK(!group.board.holds_memory(0));
  CHECK(is(error_of([&] { group.queue(0).run(later.call); }), Code::aborted));
  CHECK(is(error_of(theirs), Code::aborted));
}

void test_closing_without_a_call_disturbs_nobody_at_first() {
  Group group(2);
  group.queue(0).close(1);
  CHECK(is(error_of([&] { group.queue(0).submit(Data(5, 0).call); }), Code::aborted));
  group.engine(1).check();  // a goodbye is no failure until somebody calls
  Data d(5, 1);
  CHECK(is(failure_of(group, 1, d), Code::peer_lost) && d.all(2));
}

// A carrier that changes what it carries is noticed before it carries anything of the user's.
void test_a_carrier_that_spoils_messages_is_noticed() {
  Group group(Shape{3, patience_s, 1, 0, 1});
  for (int r = 0; r < 3; ++r) {
    const Error* const error = group.ranks[size_t(r)]->unverified.get();
    CHECK(error && is(*error, Code::internal) && says(*error, "does not deliver what was sent"));
  }
}

}  // namespace

int main() {
  ::alarm(120);
  test_mismatches_move_nothing_and_are_told_to_all();
  test_an_unserved_codec_leaves_the_communicator_usable();
  test_a_rank_that_never_calls_is_named();
  test_a_rank_finds_the_cause_though_all_others_are_silent();
  test_a_peer_that_closes_early_is_lost();
  test_a_message_that_does_not_come_is_a_timeout();
  test_lost_messages_end_every_algorithm_on_all_ranks();
  test_a_carrier_that_breaks_is_told_to_all();
  test_abort_ends_calls_in_flight_on_all_ranks();
  test_a_peer_that_dies_in_the_middle_is_lost();
  test_a_peer_that_is_destroyed_in_the_middle_is_told_to_all();
  test_an_interrupted_caller_aborts();
  test_close_ends_what_is_in_flight();
  test_closing_without_a_call_disturbs_nobody_at_first();
  test_a_carrier_that_spoils_messages_is_noticed();
  return finish();
}
