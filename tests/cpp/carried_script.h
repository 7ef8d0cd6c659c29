// Sequences of calls (core_steps.h) on a communicator of carried_group.h, compared bit for bit with core_reference.h.
#pragma once
#include "carried_group.h"
#include "core_steps.h"

namespace carried {

using Round = steps::Step;  // one call of all ranks

inline Call call_of(Round& step, int rank, bool open) {
  Call call;
  const Bucket bucket = step.bucket(rank);
  for (int64_t s = 0; s < bucket.count; ++s) {
    call.addresses.push_back(bucket.segments[s].data);
    call.counts.push_back(bucket.segments[s].elems);
  }
  call.dtype = step.dtype, call.op = step.op, call.codec = step.codec;
  // Which stands for two levels where there are some, else for direct or oneshot, whose bits are the same.
  const bool as_open = step.hosts.empty() ? step.algorithm != Algorithm::ring : step.algorithm == Algorithm::two_level;
  call.algorithm = open && as_open ? Algorithm::automatic : step.algorithm;
  return call;
}

// All ranks have the same guard bytes, so that what one must hold all must.
inline void compare(Round& step, size_t number) {
  const steps::Buffer want = step.result(0);
  for (size_t r = 0; r < step.memory.size(); ++r) {
    const steps::Buffer& have = step.memory[r];
    if (CHECK(have == want)) continue;
    const auto at = std::mismatch(have.begin(), have.end(), want.begin()).first - have.begin();
    std::fprintf(stderr, "  rank %zu/%zu, step %zu: algorithm %d codec %d dtype %d op %d, byte %td of %zu\n", r,
                 step.memory.size(), number, int(step.algorithm), int(step.codec), int(step.dtype), int(step.op), at,
                 want.size());
  }
}

// Every third call is synchronous, behind asynchronous ones.
inline void play(Group& group, std::vector<Round>& script) {
  std::vector<int64_t> before;
  for (int r = 0; r < group.size(); ++r) before.push_back(group.board.sent_bytes(r));
  group.all([&](int r) {
    std::vector<std::shared_ptr<Job>> jobs;
    try {
      for (size_t i = 0; i < script.size(); ++i) {
        const Call call = call_of(script[i], r, i % 5 == 0);
        if (i % 3 == 0)
          group.queue(r).run(call);
        else
          jobs.push_back(group.queue(r).submit(call));
      }
      for (const auto& job : jobs) {
        if (!CHECK(job->wait(patience_s))) return;
        if (job->error()) std::rethrow_exception(job->error());
      }
    } catch (const Error& error) {
      CHECK(!"calls succeed");
      std::fprintf(stderr, "  %s\n", error.what());
    }
    const Stats stats = group.engine(r).stats(true);
    CHECK(stats.calls == int64_t(script.size()));
    CHECK(stats.wire_bytes == group.board.sent_bytes(r) - before[size_t(r)]);
    CHECK(group.engine(r).stats(false).wire_bytes == 0);
    CHECK(group.engine(r).describe().sequence == uint64_t(script.size()));
  });
  for (size_t i = 0; i < script.size(); ++i) compare(script[i], i);
}

}  // namespace carried
