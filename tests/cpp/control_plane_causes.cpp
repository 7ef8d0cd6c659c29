// The control plane when ranks fail: one first cause, whoever proposes, decides, stops, dies or talks nonsense.
#include <sys/mman.h>
#include <sys/wait.h>

#include <atomic>

#include "control_plane_tests.h"

using namespace planes;
using namespace std::chrono_literals;

namespace {

// ---- one first cause ------------------------------------------------------------------------------------------------

// Blames: nobody, each its neighbours, all the lowest: the decision is one all the same.
void propose_something(ControlPlane& plane, int rank, int nranks, int blames) {
  const auto sequence = uint32_t(100 + rank);
  const uint64_t others = ((uint64_t{1} << nranks) - 1) & ~(uint64_t{1} << rank);
  if (blames == 0) return plane.propose({Cause::aborted, uint8_t(rank), 0, Field::none, sequence}, 0, "no more");
  const uint64_t blamed = blames == 1 ? others : others & (~others + 1);
  plane.propose({Cause::timeout, uint8_t(rank), 0, Field::none, sequence}, blamed);
}

void test_proposals_at_once_end_in_one_cause() {
  for (int repeat = 0; repeat < 300 / kSlow; ++repeat) {
    const int nranks = repeat % 10 == 9 ? 8 : 2 + repeat % 2;
    Group group(nranks, 0, repeat % 4 == 3);
    group.all([&](int rank, ControlPlane& plane) {
      Jitter jitter(repeat * 8 + rank);
      jitter(300);
      propose_something(plane, rank, nranks, repeat % 3);
    });
    const Failure f = group.cause();
    CHECK(f.sequence == 100u + f.rank);
  }
}

// The same in processes, so that each has a watchdog of its own.
void test_processes_that_propose_at_once_end_in_one_cause() {
  constexpr int kRanks = 4, kTrials = 60;
  struct Shared {
    std::atomic<int> arrived[2 * kTrials];
    uint64_t cause[kTrials][kRanks];
  };
  auto* const shared =
      static_cast<Shared*>(::mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
  std::vector<std::pair<int, int>> pairs;  // [trial][a < b][control, headers]: numbers, which children keep
  for (int i = 0; i < kTrials * kRanks * (kRanks - 1); ++i) pairs.push_back(unix_pair());
  const auto meet = [&](int point) {
    ++shared->arrived[point];
    while (shared->arrived[point] < kRanks) std::this_thread::yield();
  };
  const auto play = [&](int rank) {
    Jitter jitter(rank);
    for (int trial = 0; trial < kTrials; ++trial) {
      std::vector<PeerSockets> mine(kRanks);
      auto at = pairs.begin() + trial * kRanks * (kRanks - 1);
      for (size_t a = 0; a < kRanks; ++a)
        for (size_t b = a + 1; b < kRanks; ++b)
          for (UniqueFd PeerSockets::* const which : {&PeerSockets::control, &PeerSockets::headers}) {
            const auto [low, high] = *at++;
            if (size_t(rank) == a)
              mine[b].*which = UniqueFd(low);
            else
              ::close(low);
            if (size_t(rank) == b)
              mine[a].*which = UniqueFd(high);
            else
              ::close(high);
          }
      ControlPlane plane(rank, std::move(mine));
      meet(2 * trial);
      jitter(200);
      propose_something(plane, rank, kRanks, trial % 3);
      CHECK(plane.wait_failed(patience_s));
      shared->cause[trial][rank] = plane.failure();
      meet(2 * trial + 1);
    }
  };
  std::fflush(nullptr);
  std::vector<pid_t> children;
  for (int rank = 0; rank < kRanks; ++rank) {
    children.push_back(::fork());
    if (children.back() != 0) continue;
    ::alarm(60);
    Checks::failed = 0;
    play(rank);
    ::_exit(Checks::failed == 0 ? 0 : 1);
  }
  for (const auto& [a, b] : pairs) ::close(a), ::close(b);
  for (const pid_t child : children) {
    int status = -1;
    CHECK(::waitpid(child, &status, 0) == child && status == 0);
  }
  for (const auto& cause : shared->cause)
    for (const uint64_t word : cause) CHECK(word == cause[0] && word != 0);
  ::munmap(shared, sizeof *shared);
}

void test_a_stopped_arbiter_is_passed_over() {
  for (const uint64_t stopped : {uint64_t{1}, uint64_t{3}}) {
    for (const bool blamed : {false, true}) {
      Group group(4, stopped);
      const auto start = Clock::now();
      if (blamed)
        group[3].propose({Cause::timeout, 3, 0, Field::none, 5}, stopped);
      else
        group[3].propose({Cause::aborted, 3, 0, Field::none, 5}, 0, "tired");
      const Failure f = group.cause();
      const double levels = stopped == 1 ? 1 : 3;  // who passes on, and who has been asked, each wait for the next
      CHECK(f.rank == 3 && f.sequence == 5);
      CHECK(seconds_since(start) >= ControlPlane::kDecideS);
      CHECK(seconds_since(start) < levels * (ControlPlane::kDecideS + 0.1) + 1 + ControlPlane::kGatherS);
      // Going on after all, they find the decision behind the question.
      for (int r = 0; r < 2; ++r)
        if (stopped >> r & 1) group.wake(r);
      CHECK(group.cause().rank == 3);
    }
  }
}

// Ranks 2, 0 and 3 wait for each other, and in the end for rank 1, which says nothing.
void test_who_has_waited_in_vain_is_not_to_blame() {
  for (const uint64_t first : {2, 0, 3}) {
    Group group(4);
    const uint64_t blames[] = {2, 0, 1, 2 | 4};  // by rank
    for (const uint64_t rank : {first, uint64_t{0}, uint64_t{2}, uint64_t{3}})
      group[int(rank)].propose({Cause::timeout, uint8_t(rank), 0, Field::none, 5}, blames[rank]);
    const Failure f = group.cause();
    CHECK(f.cause == Cause::timeout && f.sequence == 5);
    for (int r = 0; r < 4; ++r) CHECK(group[r].page().waiting_for[f.rank] == 2);
  }
}

void test_ranks_that_wait_for_each_other_are_named() {
  Group group(3);
  for (const int rank : {0, 1, 2})
    group[rank].propose({Cause::timeout, uint8_t(rank), 0, Field::none, 5}, 1u << (rank + 1) % 3);
  const Failure f = group.cause();
  CHECK(f.cause == Cause::timeout && group[1].page().waiting_for[f.rank] == 1u << (f.rank + 1) % 3);
}

// A stopped arbiter that has a question, an answer and a cause of its own waiting for it, on different sockets.
void test_a_stopped_arbiter_that_goes_on_looks_before_it_decides() {
  for (int repeat = 0; repeat < 20; ++repeat) {
    Group group(3, 7);
    const ControlFrame question = frame_of(Kind::propose, {Cause::aborted, 1, 0, Field::none, 5});
    const ControlFrame answer = frame_of(Kind::decided, {Cause::timeout, 2, 0, Field::none, 5}, 1);
    CHECK(say(group.control(1, 0), &question, sizeof question));
    CHECK(say(group.control(2, 0), &answer, sizeof answer));
    group.wake(0);
    if (repeat % 2) group[0].propose({Cause::internal, 0, 0, Field::none, 5}, 0);
    CHECK(group.cause().cause == Cause::timeout && group[0].page().waiting_for[2] == 1);
  }
}

void test_what_a_dying_arbiter_told_one_rank_holds_for_all() {
  for (int repeat = 0; repeat < 40 / kSlow; ++repeat) {
    const bool told = repeat % 4 != 0;  // else the negative control: then it is a death
    Group group(4, 1);
    ControlFrame decided = frame_of(Kind::decided, {Cause::aborted, 1, 0, Field::none, 9});
    std::strcpy(decided.reason, "last words");
    if (repeat % 3 == 1) group[1].propose({Cause::timeout, 1, 0, Field::none, 9}, 4);  // and nobody answers
    if (told) CHECK(say(group.control(0, 1 + repeat % 3), &decided, sizeof decided));
    group.kill(0);
    const Failure f = group.cause();
    if (told) CHECK(f.cause == Cause::aborted && std::string(group[2].page().reason[1]) == "last words");
    if (!told && repeat % 3 != 1) CHECK(f.cause == Cause::peer_died && f.rank == 0);
  }
}

// Rank 0 has died; rank 3, a puppet, is slow to say what it knows, and rank 1 must not decide before it has.
void test_a_new_arbiter_hears_all_who_live() {
  const ControlFrame told = frame_of(Kind::decided, {Cause::aborted, 0, 0, Field::none, 9});
  const ControlFrame not_told = frame_of(Kind::propose, {Cause::peer_died, 0, 0, Field::none, 8}, 1);
  for (const ControlFrame* says : {&told, &not_told, static_cast<const ControlFrame*>(nullptr)}) {
    Group group(4, 1 | 8);
    const auto start = Clock::now();
    group.kill(0);
    CHECK(!group[1].wait_failed(0.1) && !group[2].wait_failed(0));
    if (says) CHECK(say(group.control(3, 1), says, sizeof *says));
    const Failure f = group.cause();
    CHECK(f.cause == (says == &told ? Cause::aborted : Cause::peer_died) && f.rank == 0);
    CHECK(seconds_since(start) < 1);  // it may be stopped: there is a limit
  }
}

void test_the_first_decision_stands() {
  Group group(3, 1);
  const ControlFrame first = frame_of(Kind::decided, {Cause::aborted, 1, 0, Field::none, 9});
  const ControlFrame second = frame_of(Kind::decided, {Cause::timeout, 2, 0, Field::none, 8}, 1);
  for (const ControlFrame* frame : {&first, &second}) CHECK(say(group.control(0, 1), frame, sizeof *frame));
  CHECK(group.cause().cause == Cause::aborted);
  std::this_thread::sleep_for(20ms);
  CHECK(group.cause().cause == Cause::aborted && group[1].page().waiting_for[2] == 0);
}

// Its sockets may stay open for long: who has said goodbye is not asked.
void test_who_has_said_goodbye_does_not_decide() {
  Group group(3, 1);
  const ControlFrame goodbye = frame_of(Kind::goodbye, {}, 0, 1);
  for (int r = 1; r < 3; ++r) {
    CHECK(say(group.control(0, r), &goodbye, sizeof goodbye));
    for (int i = 0; i < 1000 && load_acquire(&group[r].page().closed[0]) == 0; ++i) std::this_thread::sleep_for(1ms);
  }
  group[2].propose({Cause::aborted, 2, 0, Field::none, 9}, 0);
  CHECK(group.cause().cause == Cause::aborted);
  for (int r = 1; r < 3; ++r)
    for (ControlFrame heard{}; ::recv(group.control(0, r), &heard, sizeof heard, MSG_DONTWAIT) == sizeof heard;)
      CHECK(heard.kind != Kind::propose);
}

void test_the_reason_of_an_abort_travels_and_is_cut() {
  for (const size_t length : {size_t{0}, size_t{10}, size_t{95}, size_t{96}, size_t{1000}}) {
    Group group(3);
    const std::string reason(length, 'x');
    group[2].propose({Cause::aborted, 2, 0, Field::none, 4}, 0, reason);
    CHECK(group.cause().cause == Cause::aborted);
    for (int r = 0; r < 3; ++r) CHECK(group[r].page().reason[2] == reason.substr(0, 95));
    group[0].propose({Cause::aborted, 2, 0, Field::none, 4}, 0, "too late");
    CHECK(group.cause().cause == Cause::aborted && group[1].page().reason[2] == reason.substr(0, 95));
  }
}

// ---- nonsense -------------------------------------------------------------------------------------------------------

void test_nonsense_names_who_sent_it() {
  using Spoil = std::function<void(ControlFrame&)>;
  const auto failure_of = [](const Spoil& spoil) {
    Group group(3, 4);
    ControlFrame frame = frame_of(Kind::propose, {Cause::timeout, 2, 0, Field::none, 3}, 2);
    spoil(frame);
    const char* const bytes = reinterpret_cast<const char*>(&frame);
    for (size_t i = 0; i < sizeof frame; i += 16) {  // in pieces
      CHECK(say(group.control(2, 1), bytes + i, 16));
      if (i == 64) std::this_thread::sleep_for(2ms);
    }
    return group.cause();
  };
  CHECK(failure_of([](ControlFrame&) {}).cause == Cause::timeout);  // the negative control
  const Spoil spoils[] = {
      [](ControlFrame& f) { f.magic ^= 1; },
      [](ControlFrame& f) { f.kind = Kind(0); },
      [](ControlFrame& f) { f.kind = Kind(4); },
      [](ControlFrame& f) { f.failure = 0; },
      [](ControlFrame& f) { f.failure = pack({Cause(7), 0, 0, Field::none, 0}); },
      [](ControlFrame& f) { f.failure = pack({Cause::timeout, 3, 0, Field::none, 0}); },
      [](ControlFrame& f) { f.failure = pack({Cause::mismatch, 0, 200, Field::none, 0}); },
      [](ControlFrame& f) { f.failure = pack({Cause::mismatch, 0, 1, Field(10), 0}); },
      [](ControlFrame& f) { f.failure = pack({Cause::peer_closed, 1, 0, Field::none, 0}); },
      [](ControlFrame& f) { f.blamed = 8; },
      [](ControlFrame& f) { f.reason[95] = 'x'; },
      [](ControlFrame& f) { f.kind = Kind::goodbye; },
      [](ControlFrame& f) { f = frame_of(Kind::goodbye, {}); },
      [](ControlFrame& f) { std::memset(&f, 0x55, sizeof f); },
  };
  for (const Spoil& spoil : spoils) {
    const Failure f = failure_of(spoil);
    CHECK(f.cause == Cause::internal && f.rank == 2);
  }
}

void test_half_a_frame_and_a_hang_up_is_a_death() {
  Group group(3, 4);
  const ControlFrame goodbye = frame_of(Kind::goodbye, {}, 0, 1);
  CHECK(say(group.control(2, 1), &goodbye, sizeof goodbye - 1));
  group.kill(2);
  CHECK(group.cause().cause == Cause::peer_died);
}

}  // namespace

std::vector<Test> planes::tests_of_causes() {
  return {
      TEST(test_proposals_at_once_end_in_one_cause),
      TEST(test_processes_that_propose_at_once_end_in_one_cause),
      TEST(test_a_stopped_arbiter_is_passed_over),
      TEST(test_who_has_waited_in_vain_is_not_to_blame),
      TEST(test_ranks_that_wait_for_each_other_are_named),
      TEST(test_a_stopped_arbiter_that_goes_on_looks_before_it_decides),
      TEST(test_what_a_dying_arbiter_told_one_rank_holds_for_all),
      TEST(test_a_new_arbiter_hears_all_who_live),
      TEST(test_the_first_decision_stands),
      TEST(test_who_has_said_goodbye_does_not_decide),
      TEST(test_the_reason_of_an_abort_travels_and_is_cut),
      TEST(test_nonsense_names_who_sent_it),
      TEST(test_half_a_frame_and_a_hang_up_is_a_death),
  };
}
