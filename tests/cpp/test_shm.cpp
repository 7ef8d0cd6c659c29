// Engine shm and the queue in front of it: ranks that are threads, calls and faults from many threads at once. Run
// under a race detector and an address checker. A stop after 120 s ends whatever hangs.
#include <unistd.h>

#include "cpu/shm_builder.h"
#include "thread_ranks.h"

using namespace thread_ranks;
using namespace std::chrono_literals;

namespace {

constexpr int64_t kArena = 1 << 20;

// One communicator: a queue per rank.
struct Group {
  explicit Group(int nranks, double timeout_s = patience_s, int channels = 1) {
    Wish wish{kArena};
    if (channels > 1) {
      wish.arena_bytes = channels * 8 * kArena;
      wish.channels = channels;
      wish.slice_bytes = 1024;  // one group: small calls use all channels
    }
    for (auto& engine : local_engines(nranks, wish, timeout_s, "portable", "abcd"))
      rank.push_back(std::make_unique<Queue>(std::move(engine)));
  }
  void all(const std::function<void(int)>& body) const { in_threads(int(rank.size()), body); }
  std::vector<std::unique_ptr<Queue>> rank;
};

float sum_of_ranks(int n) { return float(n * (n + 1) / 2); }

// ---- calls -------------------------------------------------------------------------------------------------------

// Synchronous calls, asynchronous ones, and somebody who looks on, on every rank.
void use(const Group& group, int rounds) {
  const int n = int(group.rank.size());
  group.all([&](int r) {
    Queue& queue = *group.rank[size_t(r)];
    std::atomic<bool> done{false};
    std::thread onlooker([&] {
      while (!done) {
        queue.engine().check();
        CHECK(queue.engine().stats(false).calls >= 0);
        CHECK(queue.engine().describe().slots >= 4);
        std::this_thread::yield();
      }
    });
    std::vector<std::unique_ptr<Data>> data;
    std::vector<std::shared_ptr<Job>> jobs;
    for (int i = 0; i < rounds; ++i) {
      for (const int64_t elems : {1, 1000, 40000}) {
        data.push_back(std::make_unique<Data>(elems, r));
        data.back()->call.codec = i % 2 ? CodecKind::fp16 : CodecKind::none;
        data.back()->call.algorithm = Algorithm(i % 4);
        jobs.push_back(queue.submit(data.back()->call));
      }
      data.push_back(std::make_unique<Data>(i, r));
      queue.run(data.back()->call);
    }
    for (const auto& job : jobs) CHECK(job->wait(patience_s) && !job->error());
    for (const auto& d : data) CHECK(d->all(sum_of_ranks(n)));
    done = true;
    onlooker.join();
    const Stats stats = queue.engine().stats(true);
    const int counted = n == 1 ? 0 : 4 * rounds;  // alone there is nothing to do
    CHECK(stats.calls == counted && stats.nonfinite_groups == 0);
    CHECK(queue.engine().stats(false).calls == 0);
    CHECK(queue.engine().describe().sequence == uint64_t(counted));
  });
}

void test_several_communicators_at_once() {
  in_threads(3, [](int i) {
    const int n = i + 1;
    const Group group(n, patience_s, n);
    CHECK(n == 1 || group.rank[0]->engine().describe().channels == n);
    use(group, 8);
    group.all([&](int r) { group.rank[size_t(r)]->close(1); });
  });
}

void test_two_threads_share_a_communicator() {
  const Group group(2);
  group.all([&](int r) {
    in_threads(2, [&](int t) {  // equal calls: it does not matter which pairs with which
      for (int i = 0; i < 10; ++i) {
        Data d(3000, r);
        if (t == 0)
          group.rank[size_t(r)]->run(d.call);
        else
          CHECK(group.rank[size_t(r)]->submit(d.call)->wait(patience_s));
        CHECK(d.all(3));
      }
    });
  });
}

// A rank may leave as soon as its own last call is done: the others must still finish theirs.
void test_leaving_after_the_last_call_disturbs_nobody() {
  for (int i = 0; i < 10; ++i) {
    const Group group(3);
    group.all([&](int r) {
      Data d(i % 2 ? 5 : 20000, r);
      group.rank[size_t(r)]->run(d.call);
      group.rank[size_t(r)]->close(0);
      CHECK(d.all(6));
    });
  }
}

// Every rank's calls play on two channels; a call that is aborted leaves none of them behind.
void test_an_abort_ends_all_channels() {
  for (const Algorithm algorithm : {Algorithm::direct, Algorithm::oneshot, Algorithm::ring}) {
    const Group group(3, patience_s, 2);
    group.all([&](int r) {
      Queue& queue = *group.rank[size_t(r)];
      if (r == 2) {
        std::this_thread::sleep_for(20ms);
        queue.engine().abort("enough");
        return;
      }
      Data d(50000, r);
      d.call.algorithm = algorithm;
      const Error error = error_of([&] { queue.run(d.call); });
      CHECK(is(error, Code::aborted) && says(error, "enough"));
      CHECK(d.all(float(r + 1)));  // nothing was written: rank 2 never said what it wants
    });
  }
}

// Rank 1 stops in the middle of a ring: rank 3 waits for rank 2, who is innocent.
void test_a_ring_names_the_rank_that_stopped() {
  const Group group(4, kShortS);
  std::atomic<int> blamed{0};
  std::atomic<bool> asked{false}, stop{false};
  group.all([&](int r) {
    Data d(200000, r);
    d.call.algorithm = Algorithm::ring;
    // Asked only while rank 1 waits: it then holds its call up until the others have given up.
    if (r == 1)
      d.call.interrupted = [&] {
        asked = true;
        while (!stop) std::this_thread::sleep_for(1ms);
        return false;
      };
    while (r == 0 && !asked) std::this_thread::sleep_for(1ms);
    const Error error = error_of([&] { group.rank[size_t(r)]->run(d.call); }, 4 * kShortS);
    if (error.code == Code::timeout) {
      CHECK(error.waiting_for == std::vector<int>{1});
      ++blamed;
    }
    stop = true;
  });
  CHECK(blamed >= 1);
}

void test_channels_find_a_mismatch_in_time() {
  const Group group(2, patience_s, 2);
  group.all([&](int r) {
    Data d(r == 0 ? 50000 : 5, r);  // two channels there, one here
    const Error error = error_of([&] { group.rank[size_t(r)]->run(d.call); }, 1);
    CHECK(is(error, Code::mismatch) && says(error, "numel: rank 0 has 50000, rank 1 has 5"));
    CHECK(d.all(float(r + 1)));
  });
}

// ---- faults ------------------------------------------------------------------------------------------------------

void test_a_rank_that_never_calls_is_named() {
  const Group group(3, kShortS);
  std::atomic<int> timeouts{0};
  group.all([&](int r) {
    if (r == 2) return;
    Data d(5, r);
    const Error error = error_of([&] { group.rank[size_t(r)]->run(d.call); }, 2 * kShortS);
    CHECK(is(error, Code::timeout) && says(error, "rank 2 (pid ") && says(error, "last seq 0"));
    CHECK(error.waiting_for == std::vector<int>{2});
    CHECK(d.all(float(r + 1)));
    ++timeouts;
  });
  CHECK(timeouts == 2);
  Data late(5, 2);
  CHECK(is(error_of([&] { group.rank[2]->run(late.call); }), Code::aborted));
  CHECK(is(error_of([&] { group.rank[0]->engine().check(); }), Code::timeout));
}

void test_mismatches_are_told_to_all_within_a_second() {
  for (const Mismatch& mismatch : kMismatches) {
    const Group group(3);
    group.all([&](int r) {
      Disagreeing d(mismatch, r);
      const Error error = error_of([&] { group.rank[size_t(r)]->run(d.call); }, 1);
      CHECK(is(error, Code::mismatch) && says(error, mismatch.text));
      Data poisoned(8, r);
      CHECK(is(error_of([&] { group.rank[size_t(r)]->run(poisoned.call); }), Code::aborted));
      CHECK(d.all(float(r + 1)) && poisoned.all(float(r + 1)));
    });
  }
}

void test_abort_ends_calls_in_flight_on_all_ranks() {
  const Group group(3);
  std::thread aborter([&] {
    std::this_thread::sleep_for(20ms);
    in_threads(2, [&](int) { group.rank[2]->engine().abort("enough"); });  // the first cause wins
  });
  group.all([&](int r) {
    if (r == 2) return;
    Data d(40000, r), queued(5, r);
    const auto first = group.rank[size_t(r)]->submit(d.call), second = group.rank[size_t(r)]->submit(queued.call);
    const Error error = error_of(first, 1);
    CHECK(is(error, Code::aborted) && says(error, "rank 2 gave up") && says(error, "enough"));
    CHECK(is(error_of(second), Code::aborted));
    CHECK(queued.all(float(r + 1)));
  });
  aborter.join();
}

void test_an_interrupted_caller_aborts() {
  const Group group(2);
  std::atomic<bool> interrupted{false};
  std::thread signal([&] {
    std::this_thread::sleep_for(20ms);
    interrupted = true;
  });
  Data d(5, 0), peer(5, 1);
  d.call.interrupted = [&] { return interrupted.load(); };
  CHECK(is(error_of([&] { group.rank[0]->run(d.call); }, 1), Code::aborted));
  CHECK(is(error_of([&] { group.rank[1]->run(peer.call); }), Code::aborted));
  signal.join();
}

void test_close_ends_what_is_in_flight() {
  const Group group(2);
  Data d(40000, 0), later(5, 0), peer(5, 1);
  const auto job = group.rank[0]->submit(d.call);
  const auto queued = group.rank[0]->submit(later.call);
  const auto start = Clock::now();
  std::thread twice([&] { group.rank[0]->close(0.05); });  // idempotent, from two threads
  group.rank[0]->close(0.05);
  twice.join();
  CHECK(seconds_since(start) < 1);
  CHECK(is(error_of(job), Code::aborted) && is(error_of(queued), Code::aborted));
  CHECK(d.all(1) && later.all(1));
  CHECK(is(error_of([&] { group.rank[0]->run(later.call); }), Code::aborted));
  CHECK(is(error_of([&] { group.rank[1]->run(peer.call); }), Code::aborted));
}

void test_a_peer_that_closes_early_is_lost() {
  const Group group(3);
  std::thread leaver([&] {
    std::this_thread::sleep_for(20ms);
    group.rank[1]->close(1);
  });
  group.all([&](int r) {
    if (r == 1) return;
    Data d(40000, r);
    const Error error = error_of([&] { group.rank[size_t(r)]->run(d.call); }, 1);
    CHECK(is(error, Code::peer_lost) && error.rank == 1 && says(error, "clean shutdown"));
  });
  leaver.join();
}

void test_destruction_closes() {
  std::shared_ptr<Job> job;
  Data d(5, 0);
  {
    const Group group(2);
    job = group.rank[0]->submit(d.call);
  }
  CHECK(job->done() && is(error_of(job), Code::aborted));
}

}  // namespace

int main() {
  ::alarm(120);
  test_several_communicators_at_once();
  test_two_threads_share_a_communicator();
  test_leaving_after_the_last_call_disturbs_nobody();
  test_an_abort_ends_all_channels();
  test_a_ring_names_the_rank_that_stopped();
  test_channels_find_a_mismatch_in_time();
  test_a_rank_that_never_calls_is_named();
  test_mismatches_are_told_to_all_within_a_second();
  test_abort_ends_calls_in_flight_on_all_ranks();
  test_an_interrupted_caller_aborts();
  test_close_ends_what_is_in_flight();
  test_a_peer_that_closes_early_is_lost();
  test_destruction_closes();
  return finish();
}
