// What the kernels of engine nccl do, with the lanes that play them: threads of a GPU, or in tests host lanes.
#pragma once
#include "../core/local.h"
#include "launches.h"

namespace dpcomm {
inline namespace DPCOMM_ISA {

// play(step) for each step of a launch. A rank's neighbour comes first, as in core/direct.h.
template <class Play>
DPCOMM_HD void each_step(const StepLaunch& launch, Play play) {
  const Team& t = launch.team;
  for (int i = 0; i < launch.count; ++i) {
    Step step = launch.steps[i].step;
    const uint64_t peers = launch.steps[i].peers;
    if (peers == 0) play(step);
    for (int k = 1; k <= t.nranks && peers != 0; ++k) {
      step.peer = (t.rank + k) % t.nranks;
      if (peers >> step.peer & 1) play(step);
    }
  }
}

template <class Codec, Algorithm algorithm, class Lanes>
DPCOMM_HD void run_steps(Lanes& lanes, const StepLaunch& launch) {
  const Bucket bucket = bucket_of(launch.bucket);
  each_step(launch, [&](const Step& step) {
    if constexpr (algorithm == Algorithm::direct) direct_step<Codec>(lanes, launch.team, bucket, launch.header, step);
    if constexpr (algorithm == Algorithm::oneshot) oneshot_step<Codec>(lanes, launch.team, bucket, launch.header, step);
    if constexpr (algorithm == Algorithm::ring) ring_step<Codec>(lanes, launch.team, bucket, launch.header, step);
  });
}

template <class Codec, class Lanes>
DPCOMM_HD void run_inside(Lanes& lanes, const InsideLaunch& launch) {
  const Bucket bucket = bucket_of(launch.bucket);
  Team team{};
  team.rank = launch.rank, team.nranks = launch.size;
  for (int i = 0; i < launch.count; ++i) {
    const InsideMove& move = launch.moves[i];
    const Range range = launch.shards.range(move.owner, launch.slice, launch.part, launch.number);
    const auto in = [&](int r) { return Message<Codec>{move.message + r * launch.stride, range.groups}; };
    switch (move.kind) {
      case InsideMove::Kind::put:
        put<Codec>(lanes, bucket, range, in(0));
        break;
      case InsideMove::Kind::add:
        add_here<Codec>(lanes, team, bucket, launch.op, range, in);
        break;
      case InsideMove::Kind::get:
        get<Codec>(lanes, bucket, range, in(0));
        break;
    }
  }
}

// By one lane.
DPCOMM_HD void begin_call(const BeginLaunch& launch) {
  store_release(&launch.state->begun, load_acquire(&launch.state->begun) + 1);  // its only writers follow each other
}

template <class Bits, class Lanes>
DPCOMM_HD void fill(const Lanes& lanes, const Bucket& bucket, Bits value) {
  for (int64_t s = 0; s < bucket.count; ++s) {
    Bits* const x = reinterpret_cast<Bits*>(bucket.segments[s].data);
    for (int64_t i = lanes.index(); i < bucket.segments[s].elems; i += lanes.count()) x[i] = value;
  }
}

// Whole numbers have no NaN: theirs are undefined.
template <class Lanes>
DPCOMM_HD void fill_with_nan(const Lanes& lanes, const Bucket& bucket, Dtype dtype) {
  switch (dtype) {
    case Dtype::float32:
      return fill<uint32_t>(lanes, bucket, 0x7fc00000);
    case Dtype::float64:
      return fill<uint64_t>(lanes, bucket, 0x7ff8000000000000);
    case Dtype::float16:
      return fill<uint16_t>(lanes, bucket, 0x7e00);
    case Dtype::bfloat16:
      return fill<uint16_t>(lanes, bucket, 0x7fc0);
    case Dtype::int32:
    case Dtype::int64:
      return;
  }
}

// By one CTA: its lanes meet in sync(), and one of them waits. What ends the wait is the host: it says that all ranks
// have announced the call, or, after timeout_s at the latest, that the communicator has failed.
template <class Lanes>
DPCOMM_HD void end_call(const Lanes& lanes, const EndLaunch& launch) {
  CallState& state = *launch.state;
  bool good = true;
  if (lanes.index() == 0) {
    while (load_acquire(&state.agreed) < launch.sequence && load_acquire(&state.failure) == 0) lanes.yield();
    good = load_acquire(&state.failure) == 0;  // pairs with the store in NcclEngine::fail_on_device
  }
  if (!lanes.sync(good)) fill_with_nan(lanes, bucket_of(launch.bucket), launch.dtype);
  lanes.sync(true);
  if (lanes.index() != 0) return;
  store_release(&state.nonfinite_groups, *launch.nonfinite_groups);
  store_release(&state.ended, load_acquire(&state.ended) + 1);
}

}  // namespace DPCOMM_ISA
}  // namespace dpcomm
