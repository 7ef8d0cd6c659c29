// The choice between plain and streaming stores, on times that are made up.
#include "check.h"
#include "cpu/store_policy.h"

using namespace dpcomm;

namespace {

constexpr int64_t kMiB = 1 << 20;

// A machine on which a slice takes so many ns with each kind of store.
struct Machine {
  int64_t plain, streaming;
};

// Plays one call; returns how many of its slices were streaming.
int play(StorePolicy& policy, const Machine& machine, int64_t bytes, int slices, int64_t wait_ns = 0) {
  StoreTurns turns = policy.begin(bytes, slices);
  Tally tally;
  int streaming = 0;
  for (int i = 0; i < slices; ++i) {
    const Store store = turns.next(tally);
    streaming += store == Store::streaming;
    tally.ns[int(Phase::put)] += store == Store::streaming ? machine.streaming : machine.plain;
    tally.ns[int(Phase::wait)] += i % 2 ? wait_ns : 0;
  }
  policy.end(turns, tally);
  return streaming;
}

void play_bytes(StorePolicy& policy, const Machine& machine, int64_t bytes, int64_t call, int slices) {
  for (int64_t done = 0; done < bytes; done += call) play(policy, machine, call, slices);
}

const Machine kTogether{100, 200}, kApart{500, 100};

void test_it_follows_the_machine_within_some_calls() {
  for (const int slices : {1, 4, 8, 9, 16, 400}) {
    StorePolicy policy;
    const int64_t call = slices * kMiB / 16;
    for (int moves = 0; moves < 4; ++moves) {
      const bool apart = moves % 2 == 0;
      play_bytes(policy, apart ? kApart : kTogether, StorePolicy::kLastInterval + 8 * call, call, slices);
      CHECK(policy.chosen() == (apart ? Store::streaming : Store::plain));
    }
  }
}

void test_most_calls_use_what_was_chosen() {
  StorePolicy policy;
  policy.choose(Store::streaming);
  int64_t slices = 0, streaming = 0;
  for (int i = 0; i < 2000; ++i) slices += 16, streaming += play(policy, kApart, kMiB, 16);
  CHECK(policy.chosen() == Store::streaming);
  CHECK(streaming < slices);               // it does look
  CHECK(streaming * 1000 > slices * 995);  // but rarely
}

void test_what_is_nearly_even_changes_nothing() {
  for (const Store store : {Store::plain, Store::streaming}) {
    StorePolicy policy;
    policy.choose(store);
    play_bytes(policy, {105, 100}, 2 * StorePolicy::kLastInterval, kMiB, 16);
    CHECK(policy.chosen() == store);
  }
}

void test_one_disturbed_trial_decides_nothing() {
  StorePolicy policy;
  play_bytes(policy, kTogether, StorePolicy::kLastInterval - kMiB, kMiB, 16);
  play(policy, kApart, kMiB, 16);  // the first of two
  play_bytes(policy, kTogether, StorePolicy::kLastInterval / 2, kMiB, 16);
  CHECK(policy.chosen() == Store::plain);
}

void test_waiting_for_a_late_peer_says_nothing_about_stores() {
  StorePolicy policy;
  for (int i = 0; i < 600; ++i) play(policy, kTogether, kMiB, 16, i % 3 * 100000);
  CHECK(policy.chosen() == Store::plain);
}

void test_small_calls_are_left_alone() {
  StorePolicy policy;
  int streaming = 0;
  for (int64_t done = 0; done < 2 * StorePolicy::kLastInterval; done += 4096)
    streaming += play(policy, kApart, 4096, 1);
  CHECK(streaming == 0 && policy.chosen() == Store::plain);
}

// All ranks try at the same time, whatever each has concluded.
void test_trials_follow_from_the_calls_alone() {
  StorePolicy a, b;
  b.choose(Store::streaming);
  for (int i = 0; i < 1000; ++i) {
    const int64_t bytes = (i % 7 + 1) * kMiB / 4;
    const int slices = int(bytes * 16 / kMiB);
    const bool a_tries = play(a, kTogether, bytes, slices) > 0;    // always plain but for trials
    const bool b_tries = play(b, kApart, bytes, slices) < slices;  // always streaming but for trials
    CHECK(a_tries == b_tries || slices < StoreTurns::kSlices);     // a pair's calls are one of each
  }
}

}  // namespace

int main() {
  test_it_follows_the_machine_within_some_calls();
  test_most_calls_use_what_was_chosen();
  test_what_is_nearly_even_changes_nothing();
  test_one_disturbed_trial_decides_nothing();
  test_waiting_for_a_late_peer_says_nothing_about_stores();
  test_small_calls_are_left_alone();
  test_trials_follow_from_the_calls_alone();
  return finish();
}
