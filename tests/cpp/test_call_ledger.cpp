// The call ledger: agreement, lag, differences, peers that leave or are none, closing. A machine-made stop after 120 s
// ends whatever hangs.
#include <sys/resource.h>
#include <sys/wait.h>

#include "call_ledger_group.h"

using namespace ledgers;

// A child of a program with threads destroys a ledger here.
extern "C" const char* __tsan_default_options() { return "die_after_fork=0"; }

namespace {

// ---- agreement ------------------------------------------------------------------------------------------------------

void test_calls_are_agreed_in_order_once_all_have_announced_them() {
  for (const auto& [nranks, tcp] : {std::pair{2, false}, {2, true}, {3, false}, {3, true}, {5, true}}) {
    const uint64_t calls = 3000 / kSlow;
    std::vector<std::atomic<uint64_t>> begun(static_cast<size_t>(nranks));
    Ledgers group(nranks, (uint64_t{1} << nranks) - 1, tcp);
    const auto none_early = [&](uint64_t call) {
      for (const auto& one : begun)
        if (one < call) CHECK(!"agreed before all have announced it");
    };
    for (int r = 0; r < nranks; ++r) group.wake(r, CallLedger::kMostAhead, none_early);
    in_threads(nranks, [&, tcp = tcp](int r) {
      Jitter jitter(r + 8 * int(tcp));
      for (uint64_t i = 1; i <= calls; ++i) {
        begun[size_t(r)] = i;
        group[r].post(i);
        if (i % 16 == 0) jitter(i % 64 == 0 ? 3000 : 100);
        if (i % 3 == uint64_t(r)) group.ledger(r).poll();
      }
    });
    CHECK(group.all_heard(calls));
    for (int r = 0; r < nranks; ++r) {
      CHECK(group.ledger(r).agreed() == calls && group.ledger(r).all_sent() && group.ledger(r).missing(calls) == 0);
      CHECK(group.ledger(r).last_sequence((r + 1) % nranks) == calls);
      CHECK(group.ledger(r).missing(calls + 1) == (uint64_t{1} << nranks) - 1);
      group[r].close();
      CHECK(group[r].heard_all(calls) && group[r].failed() == 0);
    }
  }
}

void test_a_rank_thousands_of_calls_ahead_never_waits() {
  constexpr uint64_t kCalls = 5000;
  for (const bool tcp : {false, true}) {
    for (const bool others_are_there : {false, true}) {
      Ledgers group(3, others_are_there ? 0 : 6, tcp, 65536);
      const auto start = Clock::now();
      for (uint64_t i = 1; i <= kCalls; ++i) group[0].post(i);
      CHECK(seconds_since(start) < 2 * kSlow);
      CHECK(group.ledger(0).agreed() == 0 && group.ledger(0).missing(1) == 6 && group[0].heard().empty());
      if (!others_are_there) {
        CHECK(tcp || !group.ledger(0).all_sent());  // the sockets are full, or this would test nothing
        group.wake(1), group.wake(2);
      }
      // Nobody posts: the watchdog sends the rest.
      CHECK(eventually([&] { return group.ledger(0).all_sent() && group.ledger(2).last_sequence(0) == kCalls; }));
      CHECK(group.ledger(2).missing(kCalls) == 6 && group.ledger(2).agreed() == 0);
      in_threads(2, [&](int i) {
        for (uint64_t call = 1; call <= kCalls; ++call) group[i + 1].post(call);
      });
      CHECK(group.all_heard(kCalls));
      for (int r = 0; r < 3; ++r) CHECK(group[r].heard_all(kCalls) && group[r].failed() == 0);
    }
  }
}

void test_post_and_poll_do_without_the_watchdog() {
  Ledgers group(3, 4, false, 4608);
  const WatchdogBusy busy;
  const auto say_call = [&](uint64_t call) {
    const Header header = marked(call, 2);
    CHECK(say(group.socket(2, 0), &header, 64) && say(group.socket(2, 1), &header, 64));
  };
  say_call(1);
  group[0].post(1);
  group[1].post(1);
  CHECK(group[1].heard_all(1) && group.ledger(0).agreed() == 0);  // nobody has looked
  group.ledger(0).poll();
  CHECK(group[0].heard_all(1));
  // A puppet that reads late: what was kept is sent by the next post.
  uint64_t call = 1;
  while (group.ledger(0).all_sent() && call < 100000) group[0].post(++call);
  Header got{};
  bool well = true;
  for (uint64_t i = 1; i <= 20 * call && i == (got.sequence + 1); ++i) {
    if (::recv(group.socket(2, 0), &got, sizeof got, MSG_WAITALL | MSG_DONTWAIT) != sizeof got) break;
    well = well && same(got, marked(i, 0));
  }
  CHECK(well && got.sequence > 0 && got.sequence < call);
  const uint64_t before = got.sequence;
  group[0].post(++call);
  CHECK(::recv(group.socket(2, 0), &got, sizeof got, MSG_DONTWAIT) == sizeof got && same(got, marked(before + 1, 0)));
}

void test_headers_in_pieces() {
  Ledgers group(2, 1);
  group[1].post(1);
  const Header header = marked(1, 0);
  for (size_t i = 0; i < 64; ++i) {
    if (i % 10 == 0) std::this_thread::sleep_for(3ms);
    CHECK(group.ledger(1).agreed() == 0 && group.ledger(1).missing(1) == 1);
    CHECK(say(group.socket(0, 1), reinterpret_cast<const char*>(&header) + i, 1));
  }
  Header got{};
  CHECK(eventually([&] { return group[1].heard_all(1); }) && group.ledger(1).header(0, 1, &got) && same(got, header));
}

// The small socket takes two pieces of 2286 bytes, so parts of headers; the watchdog sends the rest.
void test_what_a_full_socket_does_not_take_follows_in_order() {
  for (const auto& [tcp, send_bytes, calls] : {std::tuple{true, 16384, uint64_t{8000}}, {false, 2350, uint64_t{600}}}) {
    Ledgers group(2, 1, tcp, send_bytes);
    for (uint64_t call = 1; call <= calls; ++call) group[1].post(call);
    CHECK(!group.ledger(1).all_sent());
    const timeval limit{5, 0};
    CHECK(::setsockopt(group.socket(0, 1), SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit) == 0);
    bool well = true;
    for (uint64_t call = 1; well && call <= calls; ++call) {
      Header got{};
      well = ::recv(group.socket(0, 1), &got, sizeof got, MSG_WAITALL) == sizeof got && same(got, marked(call, 1));
    }
    CHECK(well && group.ledger(1).all_sent());
  }
}

void test_headers_of_the_last_calls_are_known() {
  Ledgers group(3);
  Header got{};
  CHECK(!group.ledger(0).header(0, 1, &got) && group.ledger(0).last_sequence(1) == 0);
  for (uint64_t call = 1; call <= 40; ++call)
    for (int r = 0; r < 3; ++r) group[r].post(call);
  CHECK(group.all_heard(40));
  for (uint64_t call = 41; call <= 60; ++call) group[0].post(call);
  group[1].post(41);
  CHECK(eventually([&] { return group.ledger(2).last_sequence(0) == 60 && group.ledger(2).missing(41) == 4; }));
  CHECK(eventually([&] { return group.ledger(0).missing(41) == 4; }) && group.ledger(0).missing(42) == 6);
  for (uint32_t call = 0; call <= 61; ++call)
    for (int r = 0; r < 3; ++r) {
      const bool known = call > 40 - CallLedger::kKept && call <= (r == 0 ? 60 : r == 1 ? 41 : 40);
      CHECK(group.ledger(2).header(r, call, &got) == known);
      CHECK(!known || same(got, marked(call, r)));
    }
  CHECK(group.ledger(2).last_sequence(1) == 41 && group.ledger(2).last_sequence(2) == 40);
}

// ---- what differs ---------------------------------------------------------------------------------------------------

void (*const kChanges[])(Header&) = {
    [](Header&) {},  // Field::none: the negative control
    [](Header& h) { h.sequence = 9; },
    [](Header& h) { h.bucket = 3; },
    [](Header& h) { h.dtype ^= 1; },
    [](Header& h) { h.op ^= 1; },
    [](Header& h) { h.codec ^= 1; },
    [](Header& h) { h.algorithm ^= 1; },
    [](Header& h) { h.numel = 7; },
    [](Header& h) { h.tensors = 2; },
    [](Header& h) { h.layout = 5; },
};
static_assert(std::size(kChanges) == size_t(Field::layout) + 1);

void check_mismatch(Ledgers& group, const Failure& expected, int odd) {
  for (int r = 0; r < group.size(); ++r) {
    CHECK(eventually([&] { return group[r].failed() > 0; }));
    group.ledger(r).poll();
    group[r].close();  // nothing comes after it
    CHECK(group[r].heard_all(3) && group.ledger(r).agreed() == 3);
    if (!CHECK(group[r].failures == std::vector<std::pair<uint64_t, uint64_t>>{{pack(expected), 0}})) continue;
    Header a{}, b{};
    CHECK(group.ledger(r).header(0, expected.sequence, &a) && group.ledger(r).header(odd, expected.sequence, &b));
    CHECK(difference(a, b) == expected.field || expected.other != odd);
  }
}

void test_a_difference_is_found_alike_by_all_and_ends_agreement() {
  for (size_t field = 0; field < std::size(kChanges); ++field) {
    for (int odd = 0; odd < 3; ++odd) {
      Ledgers group(3);
      in_threads(3, [&](int r) {
        Jitter jitter(r + int(field));
        for (uint64_t call = 1; call <= 6; ++call) {
          Header mine = marked(call, r);
          if (call == 4 && r == odd) kChanges[field](mine);
          group.ledger(r).post(mine);
          jitter(300);
        }
      });
      if (field == 0) {
        CHECK(group.all_heard(6));
        for (int r = 0; r < 3; ++r) CHECK(group[r].heard_all(6) && group[r].failed() == 0);
        continue;
      }
      const uint32_t sequence = odd == 0 && Field(field) == Field::sequence ? 9 : 4;
      check_mismatch(group, {Cause::mismatch, 0, uint8_t(odd == 0 ? 1 : odd), Field(field), sequence}, odd);
    }
  }
}

void test_of_several_differences_the_first_call_and_the_lowest_rank_count() {
  Ledgers group(4);
  for (int r = 3; r >= 0; --r)
    for (uint64_t call = 1; call <= 6; ++call) {
      Header mine = marked(call, r);
      if (call == 4 && r == 2) mine.layout = 5;
      if (call == 4 && r == 3) mine.dtype = 5;
      if (call == 5 && r == 1) mine.bucket = 5;
      group.ledger(r).post(mine);
    }
  check_mismatch(group, {Cause::mismatch, 0, 2, Field::layout, 4}, 2);
}

// ---- who is missing, broken, or no rank at all
// ------------------------------------------------------------------------

double processor_s() {
  rusage used{};
  CHECK(::getrusage(RUSAGE_SELF, &used) == 0);
  return double(used.ru_utime.tv_sec + used.ru_stime.tv_sec) +
         1e-6 * double(used.ru_utime.tv_usec + used.ru_stime.tv_usec);
}

void test_a_peer_that_leaves_is_missing_and_nothing_else() {
  for (const bool tcp : {false, true}) {
    for (const size_t half : {size_t{0}, size_t{30}}) {  // bytes of a header that never gets whole
      Ledgers group(3, 1, tcp);
      for (int r = 1; r < 3; ++r) {
        const Header both[2] = {marked(1, 0), marked(2, 0)};
        CHECK(say(group.socket(0, r), both, sizeof both) && say(group.socket(0, r), both, half));
      }
      group.mesh[0].clear();
      for (uint64_t call = 1; call <= 100; ++call)
        for (int r = 1; r < 3; ++r) group[r].post(call);
      for (int r = 1; r < 3; ++r) {
        CHECK(eventually([&] { return group[r].heard_all(2) && group.ledger(r).missing(100) == 1; }));
        CHECK(group.ledger(r).last_sequence(0) == 2 && group.ledger(r).missing(2) == 0);
      }
      const double before = processor_s();
      std::this_thread::sleep_for(200ms);
      CHECK(processor_s() - before < 0.1);  // nobody looks at the end again and again
      for (int r = 1; r < 3; ++r) {
        group[r].post(101);
        CHECK(group.ledger(r).agreed() == 2 && group[r].failed() == 0 && group.ledger(r).all_sent());
      }
    }
  }
}

void test_who_is_too_far_ahead_names_those_it_misses() {
  constexpr uint64_t kAhead = 100;
  Ledgers group(3, 7);
  group.wake(0, kAhead), group.wake(1, kAhead);
  const Header header = marked(1, 2);
  CHECK(say(group.socket(2, 0), &header, 64) && say(group.socket(2, 1), &header, 64));
  group[1].post(1), group[1].post(2);
  group[0].post(1);
  CHECK(eventually([&] { return group[0].heard_all(1) && group.ledger(0).missing(2) == 5; }));
  for (uint64_t call = 2; call <= kAhead; ++call) group[0].post(call);
  CHECK(group[0].failed() == 0);
  for (uint64_t call = kAhead + 1; call <= kAhead + 9; ++call) group[0].post(call);
  CHECK(eventually([&] { return group[0].failed() == 1; }));
  group[0].close();
  const Failure expected{Cause::timeout, 0, 0, Field::none, 2};
  CHECK(group[0].failures == std::vector<std::pair<uint64_t, uint64_t>>{{pack(expected), 4}});
  CHECK(group.ledger(0).last_sequence(0) == kAhead + 1 && group[1].failed() == 0);
  CHECK(eventually([&] { return group.ledger(1).last_sequence(0) == kAhead + 1; }));
}

void test_who_says_more_than_a_rank_may_is_not_heard() {
  constexpr uint64_t kAhead = 100;
  Ledgers group(2, 3);
  group.wake(1, kAhead);
  group[1].post(1);
  for (uint64_t call = 1; call <= kAhead + 30; ++call) {
    const Header header = marked(call, 0);
    CHECK(say(group.socket(0, 1), &header, 64));
  }
  CHECK(eventually([&] { return group.ledger(1).last_sequence(0) >= kAhead + 2 && group[1].heard_all(1); }));
  std::this_thread::sleep_for(20ms);
  group.ledger(1).poll();
  CHECK(group.ledger(1).last_sequence(0) == kAhead + 2 && group[1].failed() == 0);
}

// ---- listeners and ends ---------------------------------------------------------------------------------------------

void test_a_listener_may_post() {
  for (const bool tcp : {false, true}) {
    constexpr uint64_t kCalls = 500;
    Ledgers group(2, 3, tcp);
    for (int r = 0; r < 2; ++r)
      group.wake(r, CallLedger::kMostAhead, [&group, r](uint64_t call) {
        if (call < kCalls) group[r].post(call + 1);
      });
    group[0].post(1), group[1].post(1);
    CHECK(group.all_heard(kCalls) && group[0].heard_all(kCalls) && group[1].heard_all(kCalls));
    group[0].close(), group[1].close();
  }
}

void test_close_waits_for_the_listener_that_runs_and_no_more_follow() {
  Ledgers group(2, 3);
  std::promise<void> inside;
  std::atomic<bool> ended{false};
  group.wake(0);
  group.wake(1, CallLedger::kMostAhead, [&](uint64_t call) {
    if (call > 1) return;
    group[1].post(2), group[1].post(3);
    CHECK(group.ledger(1).agreed() == 3);  // there is news that must not be told any more
    inside.set_value();
    std::this_thread::sleep_for(50ms);
    ended = true;
  });
  for (uint64_t call = 1; call <= 3; ++call) group[0].post(call);
  std::thread posting([&] { group[1].post(1); });
  inside.get_future().wait();
  in_threads(2, [&](int) {
    group[1].close();
    CHECK(ended);
  });
  posting.join();
  group[1].close();
  group[1].post(4);
  group.ledger(1).poll();
  CHECK(group[1].heard_all(1));
}

void test_close_in_the_middle_of_traffic() {
  uint64_t heard = 0;
  for (int repeat = 0; repeat < 60 / kSlow; ++repeat) {
    Ledgers group(3, 0, repeat % 2 == 1);
    std::vector<std::thread> threads;
    std::atomic<bool> over{false};
    for (int r = 0; r < 3; ++r) {
      threads.emplace_back([&, r] {
        for (uint64_t call = 1; !over; ++call) group[r].post(call);
      });
      threads.emplace_back([&, r] {
        Header header{};
        for (; !over; std::this_thread::yield()) {
          group.ledger(r).poll();
          group.ledger(r).header(0, uint32_t(group.ledger(r).agreed()), &header);
        }
      });
    }
    if (repeat == 0) CHECK(eventually([&] { return group.ledger(0).agreed() > 0; }));
    std::this_thread::sleep_for(std::chrono::microseconds(repeat % 8 * 300));
    std::thread closing([&] { group[1].close(); });
    group[repeat % 2].close();  // another one, or the same at once
    closing.join();
    over = true;
    for (std::thread& thread : threads) thread.join();
    if (repeat % 3 == 0) group.ranks[2].reset();
    for (int r = 0; r < 2; ++r) {
      heard += group[r].heard().size();
      CHECK(group[r].heard_all(group[r].heard().size()) && group[r].failed() == 0);
    }
  }
  CHECK(heard > 0);
}

void test_nothing_is_left_of_ledgers_that_are_closed() {
  const int before = open_descriptors();
  for (int i = 0; i < 100; ++i) {
    Ledgers group(3);
    for (int r = 0; r < i % 4 && r < 3; ++r) group[r].post(1);
    if (i % 2) group[1].close();
    if (i % 2) CHECK(group.ledger(0).agreed() <= 1);
  }
  CHECK(descriptors_settle_at(before));
}

void test_what_closes_has_sent_all_that_its_sockets_took() {
  for (const bool tcp : {false, true}) {
    Ledgers group(2, 1, tcp);
    const Header theirs = marked(1, 0);
    CHECK(say(group.socket(0, 1), &theirs, 64));  // unread it would become a reset
    for (uint64_t call = 1; call <= 50; ++call) group[1].post(call);
    CHECK(say(group.socket(0, 1), &theirs, 64) && group.ledger(1).all_sent());
    group.ranks[1].reset();
    for (uint64_t call = 1; call <= 50; ++call) {
      Header got{};
      CHECK(::recv(group.socket(0, 1), &got, sizeof got, MSG_WAITALL) == sizeof got && same(got, marked(call, 1)));
    }
    char byte;
    CHECK(::recv(group.socket(0, 1), &byte, 1, 0) == 0);
  }
}

// It is forked while another thread, which it does not have, is inside a listener.
void test_a_forked_child_ends_nothing_and_waits_for_nobody() {
  Ledgers group(2, 3);
  std::promise<void> inside, go_on;
  group.wake(0);
  group.wake(1, CallLedger::kMostAhead, [&](uint64_t call) {
    if (call > 1) return;
    inside.set_value();
    go_on.get_future().wait();
  });
  group[0].post(1);
  std::thread posting([&] { group[1].post(1); });
  inside.get_future().wait();
  std::fflush(nullptr);
  const pid_t child = ::fork();
  if (child == 0) {
    ::alarm(20);
    for (auto& rank : group.ranks) {
      rank->post(2);
      rank->ledger->poll();
      rank->ledger->close();
      rank->ledger.reset();
    }
    ::_exit(0);
  }
  int status = -1;
  CHECK(::waitpid(child, &status, 0) == child && status == 0);
  go_on.set_value();
  posting.join();
  CHECK(group.ledger(0).last_sequence(1) <= 1 && group.ledger(1).last_sequence(0) == 1);
  group[0].post(2), group[1].post(2);
  CHECK(group.all_heard(2));
}

}  // namespace

int main() {
  ::alarm(120);
  const int before = open_descriptors();
  const Test tests[] = {
      TEST(test_calls_are_agreed_in_order_once_all_have_announced_them),
      TEST(test_a_rank_thousands_of_calls_ahead_never_waits),
      TEST(test_post_and_poll_do_without_the_watchdog),
      TEST(test_headers_in_pieces),
      TEST(test_what_a_full_socket_does_not_take_follows_in_order),
      TEST(test_headers_of_the_last_calls_are_known),
      TEST(test_a_difference_is_found_alike_by_all_and_ends_agreement),
      TEST(test_of_several_differences_the_first_call_and_the_lowest_rank_count),
      TEST(test_a_peer_that_leaves_is_missing_and_nothing_else),
      TEST(test_who_is_too_far_ahead_names_those_it_misses),
      TEST(test_who_says_more_than_a_rank_may_is_not_heard),
      TEST(test_a_listener_may_post),
      TEST(test_close_waits_for_the_listener_that_runs_and_no_more_follow),
      TEST(test_close_in_the_middle_of_traffic),
      TEST(test_nothing_is_left_of_ledgers_that_are_closed),
      TEST(test_what_closes_has_sent_all_that_its_sockets_took),
      TEST(test_a_forked_child_ends_nothing_and_waits_for_nobody),
  };
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
