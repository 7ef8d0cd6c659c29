// The control plane: ranks that share no memory exchange headers and end with one first cause, whoever dies, stops,
// leaves or talks nonsense. A machine-made stop after 120 s ends whatever hangs.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/wait.h>

#include <atomic>
#include <filesystem>
#include <future>
#include <random>

#include "../../csrc/host/watchdog.h"
#include "control_plane_group.h"

using namespace planes;
using namespace std::chrono_literals;

namespace {

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
constexpr int kSlow = 4;
#else
constexpr int kSlow = 1;
#endif

using Clock = std::chrono::steady_clock;

double since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

int open_descriptors() {
  const std::filesystem::directory_iterator begin("/proc/self/fd"), end;
  return int(std::distance(begin, end));
}

bool exchange(ControlPlane& plane, const Header& mine, double timeout_s = kPatience) {
  std::vector<Header> all;
  return plane.exchange_headers(mine, all, timeout_s, nullptr);
}

// Ranks get out of step.
struct Jitter {
  explicit Jitter(int seed) : random(unsigned(seed)) {}
  void operator()(int most_us) {
    if (const int us = int(random() % unsigned(most_us + 1)); us > most_us / 2)
      std::this_thread::sleep_for(std::chrono::microseconds(us));
  }
  std::minstd_rand random;
};

// ---- headers --------------------------------------------------------------------------------------------------------

// Behind what is compared there is room for a mark: all 64 bytes arrive, and from the right rank.
Header marked(uint64_t sequence, int rank) {
  Header h = header_of_call(sequence);
  const uint64_t mark = sequence * 100 + uint64_t(rank);
  std::memcpy(reinterpret_cast<char*>(&h) + 56, &mark, sizeof mark);
  return h;
}

void test_headers_of_many_rounds_arrive_in_order() {
  for (const auto& [nranks, tcp, rounds] :
       {std::tuple{2, false, 2000}, {2, true, 2000}, {3, true, 600}, {8, true, 60}}) {
    Group group(nranks, 0, tcp);
    group.all([&, rounds = rounds](int rank, ControlPlane& plane) {
      Jitter jitter(rank);
      std::vector<Header> all;
      bool well = true;
      for (uint64_t i = 1; well && i <= uint64_t(rounds / kSlow); ++i) {
        well = plane.exchange_headers(marked(i, rank), all, kPatience, nullptr) && all.size() == size_t(group.size());
        for (int r = 0; well && r < group.size(); ++r) {
          const Header expected = marked(i, r);
          well = r == rank || std::memcmp(&all[size_t(r)], &expected, sizeof expected) == 0;
        }
        if (i % 4 == 0) jitter(200);
      }
      CHECK(well && plane.failure() == 0);
      CHECK(plane.last_sequence((rank + 1) % group.size()) == uint64_t(rounds / kSlow));
    });
  }
}

void test_a_peer_a_call_ahead_and_headers_in_pieces() {
  Group group(2, 1);
  const Header first = header_of_call(1), second = header_of_call(2);
  CHECK(say(group.headers(0, 1), &first, 64) && say(group.headers(0, 1), &second, 10));  // a call ahead
  CHECK(exchange(group[1], first) && group[1].last_sequence(0) == 1);
  std::thread rest([&] {
    for (size_t i = 10; i < 64; ++i) {
      if (i % 10 == 0) std::this_thread::sleep_for(5ms);
      CHECK(say(group.headers(0, 1), reinterpret_cast<const char*>(&second) + i, 1));
    }
  });
  CHECK(exchange(group[1], second) && group[1].last_sequence(0) == 2);
  rest.join();
  Header both[2];  // what a slower rank 0 would find
  CHECK(::recv(group.headers(0, 1), both, sizeof both, MSG_WAITALL) == sizeof both);
  CHECK(both[0].sequence == 1 && both[1].sequence == 2);
  group.kill(0);
}

void test_a_mismatch_is_one_cause_and_both_values_are_known() {
  for (int repeat = 0; repeat < 20 / kSlow; ++repeat) {
    Group group(4);
    group.all([&](int rank, ControlPlane& plane) {
      Jitter jitter(repeat * 4 + rank);
      for (uint64_t i = 1; i <= 3; ++i) CHECK(exchange(plane, header_of_call(i)));  // the negative control: no mismatch
      Header h = header_of_call(4);
      if (rank >= 2) h.numel = 1000 + rank;
      jitter(1000);
      CHECK(!exchange(plane, h));
    });
    const Failure f = group.cause();
    CHECK(f.cause == Cause::mismatch && f.rank == 0 && f.other == 2 && f.field == Field::numel && f.sequence == 4);
    for (int r = 0; r < 4; ++r) {
      Header a{}, b{};
      CHECK(group[r].header(0, 4, &a) && group[r].header(2, 4, &b) && a.numel == 1000 && b.numel == 1002);
      CHECK(group[r].header(2, 3, &b) && b.numel == 1000);
      CHECK(!group[r].header(2, 2, &b) && !group[r].header(2, 5, &b));  // two are kept
    }
  }
}

// Others may have noticed before all headers are here; the text of the error needs them.
void test_headers_of_a_mismatch_are_awaited() {
  Group group(3, 3);
  const Header right = header_of_call(1);
  const ControlFrame decided = frame_of(Kind::decided, {Cause::mismatch, 0, 2, Field::numel, 1});
  CHECK(say(group.headers(1, 2), &right, 64));
  std::promise<void> looked;
  std::thread late([&] {
    looked.get_future().wait();
    CHECK(say(group.control(1, 2), &decided, sizeof decided));
    CHECK(group[2].wait_failed(kPatience));
    std::this_thread::sleep_for(120ms);  // the exchange has seen the failure within 100 ms, and waits on
    CHECK(say(group.headers(0, 2), &right, 64));
  });
  std::vector<Header> all;
  Header h{};
  const auto look = [&, first = true]() mutable {  // asked just before a sleep of 100 ms
    if (std::exchange(first, false)) looked.set_value();
    return false;
  };
  CHECK(!group[2].exchange_headers(right, all, kPatience, look));
  late.join();
  CHECK(group[2].header(0, 1, &h) && h.numel == 1000);
}

void test_interrupts_and_local_proposals_end_the_wait() {
  Group group(3, 1);  // whoever should decide never answers
  std::vector<Header> all;
  int asked = 0;
  auto start = Clock::now();
  CHECK(!group[1].exchange_headers(header_of_call(1), all, kPatience, [&] { return ++asked == 2; }));
  CHECK(asked == 2 && since(start) < 0.2 + 0.5 && group[1].failure() == 0);
  start = Clock::now();
  std::thread aborting([&] {
    std::this_thread::sleep_for(50ms);
    group[2].propose({Cause::aborted, 2, 0, Field::none, 1}, 0, "enough");
  });
  CHECK(!exchange(group[2], header_of_call(1)));
  CHECK(since(start) < 0.15 + 0.5);
  aborting.join();
  CHECK(group.cause().cause == Cause::aborted);
}

// ---- death, goodbyes, time ------------------------------------------------------------------------------------------

void test_a_hang_up_is_a_death_within_a_second() {
  for (const auto& [nranks, dead] : {std::pair{2, 0}, {2, 1}, {3, 0}, {3, 2}, {8, 0}, {8, 5}}) {
    for (const bool inside : {false, true}) {
      Group group(nranks, uint64_t{1} << dead, nranks == 3);
      const auto start = Clock::now();
      std::thread killer([&, dead = dead] {
        std::this_thread::sleep_for(20ms);
        group.kill(dead);
      });
      if (inside) group.all([](int, ControlPlane& plane) { CHECK(!exchange(plane, header_of_call(7))); });
      const Failure f = group.cause();
      CHECK(since(start) < 1 && f.cause == Cause::peer_died && f.rank == dead);
      killer.join();
    }
  }
}

void test_a_lost_header_socket_is_a_death_after_a_second() {
  Group group(3, 4);
  for (auto& peer : group.mesh[2]) peer.headers.reset();
  const double took = group.all([](int, ControlPlane& plane) { CHECK(!exchange(plane, header_of_call(1))); });
  const Failure f = group.cause();
  CHECK(f.cause == Cause::peer_died && f.rank == 2 && took > 0.9 && took < 3);
}

void test_a_goodbye_fails_only_calls_beyond_it() {
  for (const int leaver : {0, 2}) {
    Group group(3, 0, true);
    group.all([&](int rank, ControlPlane& plane) {
      CHECK(exchange(plane, header_of_call(1)) && exchange(plane, header_of_call(2)));
      if (rank == leaver) plane.close(2);
    });
    CHECK(!group[1].wait_failed(0.05));
    const double took = group.all([](int, ControlPlane& plane) { CHECK(!exchange(plane, header_of_call(3))); });
    group.ranks[size_t(leaver)].reset();
    const Failure f = group.cause();
    CHECK(f.cause == Cause::peer_closed && f.rank == leaver && f.sequence == 3 && took < 1);
    for (const int r : {1, 2 - leaver}) CHECK(group[r].page().closed[leaver] == 3);
  }
}

// A goodbye may overtake the header of a call that its sender did take part in.
void test_a_goodbye_does_not_hide_a_header_on_its_way() {
  Group group(2, 1);
  const Header header = header_of_call(2);
  const ControlFrame goodbye = frame_of(Kind::goodbye, {}, 0, 1 + 2);
  CHECK(say(group.control(0, 1), &goodbye, sizeof goodbye));
  std::thread late([&] {
    std::this_thread::sleep_for(250ms);
    CHECK(say(group.headers(0, 1), &header, 64));
  });
  CHECK(exchange(group[1], header));
  late.join();
}

// The leaver takes part in call 2 while the others have not begun it, and is gone when they do.
void test_who_took_part_before_leaving_is_not_missed() {
  for (const int leaver : {0, 2}) {
    for (const bool tcp : {false, true}) {
      Group group(3, uint64_t{1} << leaver, tcp);
      const ControlFrame goodbye = frame_of(Kind::goodbye, {}, 0, 1 + 2);
      for (int r = 0; r < 3; ++r) {
        const Header first = header_of_call(1), second = header_of_call(2);
        if (r == leaver) continue;
        CHECK(say(group.headers(leaver, r), &first, 64) && say(group.headers(leaver, r), &second, 64));
        CHECK(say(group.control(leaver, r), &goodbye, sizeof goodbye));
      }
      for (auto& peer : group.mesh[size_t(leaver)])
        for (UniqueFd* fd : {&peer.control, &peer.headers}) ::shutdown(fd->get(), SHUT_WR);
      std::this_thread::sleep_for(20ms);
      group.all([](int, ControlPlane& plane) {
        CHECK(exchange(plane, header_of_call(1)) && exchange(plane, header_of_call(2)));
      });
      CHECK(!group[1].wait_failed(0.05) && load_acquire(&group[1].page().closed[leaver]) == 3);
      const double took = group.all([](int, ControlPlane& plane) { CHECK(!exchange(plane, header_of_call(3))); });
      const Failure f = group.cause();
      CHECK(f.cause == Cause::peer_closed && f.rank == leaver && f.sequence == 3 && took < 1);
      for (const int r : {1, 2 - leaver}) CHECK(group[r].page().closed[leaver] == 3);
    }
  }
}

void test_a_timeout_names_the_late_on_all_ranks() {
  for (const uint64_t late : {uint64_t{1}, uint64_t{4}, uint64_t{5}}) {
    for (const bool stopped : {false, true}) {
      Group group(4, stopped ? late : 0);
      const double took =
          group.all([](int, ControlPlane& plane) { CHECK(!exchange(plane, header_of_call(3), 0.2)); }, late);
      CHECK(took >= 0.2 && took < 1.5);
      const Failure f = group.cause();
      CHECK(f.cause == Cause::timeout && (late >> f.rank & 1) == 0 && f.sequence == 3);
      for (auto& rank : group.ranks) {
        if (!rank) continue;
        CHECK(rank->page().waiting_for[f.rank] == late);
        CHECK(!exchange(*rank, header_of_call(3)));
      }
    }
  }
}

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
      CHECK(plane.wait_failed(kPatience));
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
      CHECK(since(start) >= (blamed ? ControlPlane::kDecideBlamedS : ControlPlane::kDecideS));
      CHECK(since(start) < levels * (ControlPlane::kDecideS + 0.1) + 0.5);
      // Going on after all, they find the decision behind the question.
      for (int r = 0; r < 2; ++r)
        if (stopped >> r & 1) group.wake(r);
      CHECK(group.cause().rank == 3);
    }
  }
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
    CHECK(since(start) < 1);  // it may be stopped: there is a limit
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
  const auto start = Clock::now();
  group[2].propose({Cause::aborted, 2, 0, Field::none, 9}, 0);
  CHECK(group.cause().cause == Cause::aborted && since(start) < ControlPlane::kDecideS);
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

// ---- closing --------------------------------------------------------------------------------------------------------

void test_close_ends_all_waits() {
  Group group(3, 1);
  for (int r = 1; r < 3; ++r) {
    ControlPlane& plane = group[r];
    std::vector<std::thread> threads;
    std::atomic<int> ended{0};
    threads.emplace_back([&] { ended += !plane.wait_failed(kPatience); });
    threads.emplace_back([&] { ended += !exchange(plane, header_of_call(1)); });
    std::this_thread::sleep_for(30ms);
    CHECK(ended == 0);
    const auto start = Clock::now();
    std::thread again([&] { plane.close(7); });
    if (r == 1) plane.close(7);
    if (r == 2) group.ranks[2].reset();  // waits for the others to leave
    again.join();
    for (std::thread& thread : threads) thread.join();
    CHECK(ended == 2 && since(start) < 0.1 + 0.5);
    ControlFrame heard{};
    CHECK(::recv(group.control(0, r), &heard, sizeof heard, MSG_WAITALL) == sizeof heard);
    CHECK(well_formed(heard, 3) && heard.kind == Kind::goodbye && (r == 2 || heard.closed == 8));
    CHECK(::recv(group.control(0, r), &heard, sizeof heard, 0) == 0);
  }
  group[1].close(9);
  CHECK(!group[1].wait_failed(kPatience) && !exchange(group[1], header_of_call(1)) && group[1].failure() == 0);
  group[1].propose({Cause::aborted, 1, 0, Field::none, 4}, 0, "too late");
}

void test_nothing_is_left_of_planes_that_are_closed() {
  const int before = open_descriptors();
  for (int i = 0; i < 200; ++i) {
    Group group(3);
    if (i % 2) group.all([&](int, ControlPlane& plane) { plane.close(uint64_t(i)); });
    if (i % 5 == 0) group[0].propose({Cause::aborted, 0, 0, Field::none, 4}, 0);
  }
  CHECK(open_descriptors() == before);
}

// ---- the watchdog's part --------------------------------------------------------------------------------------------

void test_a_watch_of_bytes_is_called_until_it_is_false() {
  const auto [a, b] = unix_pair();
  UniqueFd mine(a), theirs(b);
  std::atomic<int> calls{0};
  std::promise<void> ended;
  const uint64_t id = Watchdog::instance().watch_bytes(mine.get(), [&] {
    ++calls;
    char byte;
    if (::recv(mine.get(), &byte, 1, MSG_DONTWAIT) == 1) return true;
    ended.set_value();
    return false;
  });
  std::this_thread::sleep_for(20ms);
  CHECK(calls == 0);
  CHECK(say(theirs.get(), "three", 3));
  for (int i = 0; i < 1000 && calls < 3; ++i) std::this_thread::sleep_for(1ms);
  CHECK(calls == 3);
  theirs.reset();
  CHECK(ended.get_future().wait_for(1s) == std::future_status::ready);
  std::this_thread::sleep_for(20ms);
  CHECK(calls == 4);  // the end is still there, but nobody looks
  Watchdog::instance().forget(id);
}

void test_what_a_callback_holds_is_gone_with_its_watch() {
  for (const bool inside : {false, true}) {
    const auto [a, b] = unix_pair();
    UniqueFd mine(a), theirs(b);
    const auto held = std::make_shared<int>(1);
    std::promise<uint64_t> id;
    std::promise<void> called;
    auto known = id.get_future().share();
    id.set_value(Watchdog::instance().watch_bytes(mine.get(), [&, held, inside, first = true]() mutable {
      char byte;
      static_cast<void>(::recv(mine.get(), &byte, 1, MSG_DONTWAIT));
      if (inside) Watchdog::instance().forget(known.get());
      if (std::exchange(first, false)) called.set_value();
      return true;
    }));
    CHECK(say(theirs.get(), "x", 1));
    CHECK(called.get_future().wait_for(1s) == std::future_status::ready);
    Watchdog::instance().forget(known.get());
    CHECK(held.use_count() == 1);
  }
}

}  // namespace

int main() {
  ::alarm(120);
  const int before = open_descriptors();
  const std::pair<const char*, void (*)()> tests[] = {
#define TEST(name) {#name, name}
      TEST(test_headers_of_many_rounds_arrive_in_order),
      TEST(test_a_peer_a_call_ahead_and_headers_in_pieces),
      TEST(test_a_mismatch_is_one_cause_and_both_values_are_known),
      TEST(test_headers_of_a_mismatch_are_awaited),
      TEST(test_interrupts_and_local_proposals_end_the_wait),
      TEST(test_a_hang_up_is_a_death_within_a_second),
      TEST(test_a_lost_header_socket_is_a_death_after_a_second),
      TEST(test_a_goodbye_fails_only_calls_beyond_it),
      TEST(test_a_goodbye_does_not_hide_a_header_on_its_way),
      TEST(test_who_took_part_before_leaving_is_not_missed),
      TEST(test_a_timeout_names_the_late_on_all_ranks),
      TEST(test_proposals_at_once_end_in_one_cause),
      TEST(test_processes_that_propose_at_once_end_in_one_cause),
      TEST(test_a_stopped_arbiter_is_passed_over),
      TEST(test_a_stopped_arbiter_that_goes_on_looks_before_it_decides),
      TEST(test_what_a_dying_arbiter_told_one_rank_holds_for_all),
      TEST(test_a_new_arbiter_hears_all_who_live),
      TEST(test_the_first_decision_stands),
      TEST(test_who_has_said_goodbye_does_not_decide),
      TEST(test_the_reason_of_an_abort_travels_and_is_cut),
      TEST(test_nonsense_names_who_sent_it),
      TEST(test_half_a_frame_and_a_hang_up_is_a_death),
      TEST(test_close_ends_all_waits),
      TEST(test_nothing_is_left_of_planes_that_are_closed),
      TEST(test_a_watch_of_bytes_is_called_until_it_is_false),
      TEST(test_what_a_callback_holds_is_gone_with_its_watch),
  };
  for (const auto& [name, test] : tests) {
    const auto start = Clock::now();
    const int failed = Checks::failed;
    test();
    if (Checks::failed != failed) std::fprintf(stderr, "^ %s\n", name);
    if (since(start) > 1) std::printf("%-64s %.1f s\n", name, since(start));
  }
  CHECK(open_descriptors() == before);
  return finish();
}
