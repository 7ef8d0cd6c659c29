#include "store_policy.h"

#include <algorithm>

#include "wait.h"

namespace dpcomm {

void Tally::enter(Phase next) {
  const int64_t now = now_ns();
  ns[int(current)] += now - since;
  since = now;
  current = next;
}

StoreTurns StoreTurns::trial(Store store) {
  StoreTurns turns(store);
  turns.trial_ = true;
  return turns;
}

// Slices 2-4 are plain, 5-7 streaming. The first of each is not timed: three slices are on their way at once.
Store StoreTurns::next(const Tally& tally) {
  if (!trial_) return store_;
  ++slice_;
  if (slice_ == 3 || slice_ == 5 || slice_ == 6 || slice_ == 8) at_[marks_++] = tally.busy_ns();
  if (slice_ < 2 || slice_ >= 8) return store_;
  return slice_ < 5 ? Store::plain : Store::streaming;
}

StoreTurns StorePolicy::begin(int64_t bytes, int64_t slices) {
  since_trial_ += bytes;
  role_ = Role::usual;
  if (since_trial_ < interval_ || bytes < kLeastBytes) return StoreTurns(store_);
  if (slices >= StoreTurns::kSlices) {
    role_ = Role::slices;
    return StoreTurns::trial(store_);
  }
  if (pair_bytes_ == 0) {
    role_ = Role::first_of_pair;
    pair_bytes_ = bytes;
    return StoreTurns(Store::plain);
  }
  if (bytes > 2 * pair_bytes_ || pair_bytes_ > 2 * bytes) {  // too different to compare: another time
    pair_bytes_ = since_trial_ = 0;
    return StoreTurns(store_);
  }
  role_ = Role::second_of_pair;
  pair_plain_ns_ = pair_plain_ns_ * bytes / pair_bytes_;
  pair_bytes_ = 0;
  return StoreTurns(Store::streaming);
}

void StorePolicy::end(const StoreTurns& turns, const Tally& tally) {
  if (role_ == Role::first_of_pair) pair_plain_ns_ = tally.busy_ns();
  if (role_ == Role::second_of_pair) vote(pair_plain_ns_, tally.busy_ns());
  if (role_ == Role::slices && turns.tried()) vote(turns.plain_ns(), turns.streaming_ns());
}

// One preempted slice decides nothing: both of two measurements must say the same, and clearly.
void StorePolicy::vote(int64_t plain_ns, int64_t streaming_ns) {
  const Store better = streaming_ns * 10 < plain_ns * 9   ? Store::streaming
                       : plain_ns * 10 < streaming_ns * 9 ? Store::plain
                                                          : store_;
  if (++votes_ == 1) {
    voted_ = better;
    return;
  }
  if (voted_ == better) store_ = better;
  votes_ = 0;
  since_trial_ = 0;
  interval_ = std::min(2 * interval_, kLastInterval);
}

}  // namespace dpcomm
