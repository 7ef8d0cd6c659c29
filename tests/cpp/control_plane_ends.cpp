// The control plane when ranks end: death, goodbyes, time, closing; and the watchdog that hears of it.
#include <atomic>
#include <future>

#include "../../csrc/host/watchdog.h"
#include "control_plane_tests.h"

using namespace planes;
using namespace std::chrono_literals;

namespace {

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
      CHECK(seconds_since(start) < 1 && f.cause == Cause::peer_died && f.rank == dead);
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
      const uint64_t& closed = group[1].page().closed[leaver];
      for (int i = 0; i < 1000 * patience_s && load_acquire(&closed) == 0; ++i) std::this_thread::sleep_for(1ms);
      CHECK(!group[1].wait_failed(0.05) && load_acquire(&closed) == 3);
      const double took = group.all([](int, ControlPlane& plane) { CHECK(!exchange(plane, header_of_call(3))); });
      const Failure f = group.cause();
      CHECK(f.cause == Cause::peer_closed && f.rank == leaver && f.sequence == 3 && took < 1);
      for (const int r : {1, 2 - leaver}) CHECK(group[r].page().closed[leaver] == 3);
    }
  }
}

void test_a_timeout_names_the_late_on_all_ranks() {
  constexpr double kLate = 1;
  for (const uint64_t late : {uint64_t{1}, uint64_t{4}, uint64_t{5}}) {
    for (const bool stopped : {false, true}) {
      Group group(4, stopped ? late : 0);
      const double took =
          group.all([](int, ControlPlane& plane) { CHECK(!exchange(plane, header_of_call(3), kLate)); }, late);
      CHECK(took >= kLate && took < kLate + 1.3);
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

// ---- closing --------------------------------------------------------------------------------------------------------

void test_close_ends_all_waits() {
  Group group(3, 1);
  for (int r = 1; r < 3; ++r) {
    ControlPlane& plane = group[r];
    std::vector<std::thread> threads;
    std::atomic<int> begun{0}, ended{0};
    threads.emplace_back([&] { ++begun, ended += !plane.wait_failed(patience_s); });
    threads.emplace_back([&] { ++begun, ended += !exchange(plane, header_of_call(1)); });
    while (begun < 2) std::this_thread::sleep_for(1ms);
    std::this_thread::sleep_for(100ms);  // they are inside: nobody may enter what is about to go
    CHECK(ended == 0);
    const auto start = Clock::now();
    if (r == 1) in_threads(2, [&](int) { plane.close(7); });
    if (r == 2) group.ranks[2].reset();  // waits for the others to leave
    for (std::thread& thread : threads) thread.join();
    CHECK(ended == 2 && seconds_since(start) < 0.1 + 1);
    ControlFrame heard{};
    CHECK(::recv(group.control(0, r), &heard, sizeof heard, MSG_WAITALL) == sizeof heard);
    CHECK(well_formed(heard, 3) && heard.kind == Kind::goodbye && (r == 2 || heard.closed == 8));
    CHECK(::recv(group.control(0, r), &heard, sizeof heard, 0) == 0);
  }
  group[1].close(9);
  CHECK(!group[1].wait_failed(patience_s) && !exchange(group[1], header_of_call(1)) && group[1].failure() == 0);
  group[1].propose({Cause::aborted, 1, 0, Field::none, 4}, 0, "too late");
}

void test_nothing_is_left_of_planes_that_are_closed() {
  const int before = open_descriptors();
  for (int i = 0; i < 200; ++i) {
    Group group(3);
    if (i % 2) group.all([&](int, ControlPlane& plane) { plane.close(uint64_t(i)); });
    if (i % 5 == 0) group[0].propose({Cause::aborted, 0, 0, Field::none, 4}, 0);
  }
  CHECK(descriptors_settle_at(before));
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

std::vector<Test> planes::tests_of_ends() {
  return {
      TEST(test_a_hang_up_is_a_death_within_a_second),
      TEST(test_a_lost_header_socket_is_a_death_after_a_second),
      TEST(test_a_goodbye_fails_only_calls_beyond_it),
      TEST(test_a_goodbye_does_not_hide_a_header_on_its_way),
      TEST(test_who_took_part_before_leaving_is_not_missed),
      TEST(test_a_timeout_names_the_late_on_all_ranks),
      TEST(test_close_ends_all_waits),
      TEST(test_nothing_is_left_of_planes_that_are_closed),
      TEST(test_a_watch_of_bytes_is_called_until_it_is_false),
      TEST(test_what_a_callback_holds_is_gone_with_its_watch),
  };
}
