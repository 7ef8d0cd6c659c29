// The control plane: ranks that share no memory exchange headers, here, and end with one first cause, whoever dies,
// stops, leaves or talks nonsense: control_plane_ends.cpp, control_plane_causes.cpp. A machine-made stop after 120 s
// ends whatever hangs.
#include <future>

#include "control_plane_tests.h"

using namespace planes;
using namespace std::chrono_literals;

namespace {

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
        well = plane.exchange_headers(marked(i, rank), all, patience_s, nullptr) && all.size() == size_t(group.size());
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
    CHECK(group[2].wait_failed(patience_s));
    std::this_thread::sleep_for(120ms);  // the exchange has seen the failure within 100 ms, and waits on
    CHECK(say(group.headers(0, 2), &right, 64));
  });
  std::vector<Header> all;
  Header h{};
  const auto look = [&, first = true]() mutable {  // asked just before a sleep of 100 ms
    if (std::exchange(first, false)) looked.set_value();
    return false;
  };
  CHECK(!group[2].exchange_headers(right, all, patience_s, look));
  late.join();
  CHECK(group[2].header(0, 1, &h) && h.numel == 1000);
}

void test_interrupts_and_local_proposals_end_the_wait() {
  Group group(3, 1);  // whoever should decide never answers
  std::vector<Header> all;
  int asked = 0;
  auto start = Clock::now();
  CHECK(!group[1].exchange_headers(header_of_call(1), all, patience_s, [&] { return ++asked == 2; }));
  CHECK(asked == 2 && seconds_since(start) < 0.2 + 1 && group[1].failure() == 0);
  start = Clock::now();
  std::thread aborting([&] {
    std::this_thread::sleep_for(50ms);
    group[2].propose({Cause::aborted, 2, 0, Field::none, 1}, 0, "enough");
  });
  CHECK(!exchange(group[2], header_of_call(1)));
  CHECK(seconds_since(start) < 0.15 + 1);
  aborting.join();
  CHECK(group.cause().cause == Cause::aborted);
}

}  // namespace

int main() {
  ::alarm(120);
  const int before = open_descriptors();
  std::vector<Test> tests = {
      TEST(test_headers_of_many_rounds_arrive_in_order),
      TEST(test_a_peer_a_call_ahead_and_headers_in_pieces),
      TEST(test_a_mismatch_is_one_cause_and_both_values_are_known),
      TEST(test_headers_of_a_mismatch_are_awaited),
      TEST(test_interrupts_and_local_proposals_end_the_wait),
  };
  for (const auto& more : {tests_of_ends(), tests_of_causes()}) tests.insert(tests.end(), more.begin(), more.end());
  for (const auto& [name, run] : tests) {
    const auto start = Clock::now();
    const int failed = Checks::failed;
    run();
    if (Checks::failed != failed) std::fprintf(stderr, "^ %s\n", name);
    if (seconds_since(start) > 1) std::printf("%-64s %.1f s\n", name, seconds_since(start));
  }
  CHECK(descriptors_settle_at(before));
  return finish();
}
