"""Verifies and times one size of all-reduce, dpcomm beside gloo. It knows no command line and prints nothing.

Both libraries run in the same processes on the same buffer, in turns. No barrier lies between the calls of a turn; its
first call is not timed, since it is where the ranks meet. The slowest rank's time counts.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from verification import Verdict, precision_of, verify

import dpcomm

ELEM_BYTES = 4  # float32
REFILL_CALLS = 10  # few enough that repeated sums of unit Gaussians stay finite: 64 ranks reach 64^11 = 2^66
# A turn of small calls is long enough (milliseconds) that what the other library's threads still do after its own turn
# does not fill it: with turns of 10 calls of 3 us each, ten times as much was measured.
TURN_BYTES, MOST_TURN_CALLS = 16 << 20, 250
Allreduce = Callable[[Tensor], object]
Advance = Callable[[int], object]  # told how many calls were made


@dataclasses.dataclass(frozen=True)
class Row:
    """One size with one codec, over all ranks. Times are of the slowest rank; bandwidths in 10^9 bytes per second."""

    size_bytes: int
    count: int
    type: str
    codec: str
    median_us: float
    p95_us: float
    algbw_gb_s: float
    busbw_gb_s: float
    wire_bytes: int  # that the busiest rank sends in one call
    wrong: int
    error: float
    gloo_median_us: float | None
    gloo_p95_us: float | None
    ratio: float | None  # gloo's median over dpcomm's


def turn_calls(elems: int) -> int:
    """How many calls of one size make a turn."""
    return max(REFILL_CALLS, min(MOST_TURN_CALLS, TURN_BYTES // (elems * ELEM_BYTES)))


def planned_calls(elems: int, iterations: int, warmup: int) -> int:
    """How many calls of one size time_in_turns() makes for each subject."""
    turn = turn_calls(elems)
    return (-(-warmup // turn) + -(-iterations // turn)) * turn


def time_turn(allreduce: Allreduce, x: Tensor, source: Tensor, calls: int) -> list[int]:
    """Nanoseconds of each of `calls` successive calls on this rank, after one untimed call."""
    x.copy_(source)
    allreduce(x)
    clock = time.perf_counter_ns
    times = []
    for call in range(calls):
        if call % REFILL_CALLS == 0:
            x.copy_(source)
        start = clock()
        allreduce(x)
        times.append(clock() - start)
    return times


def time_in_turns(
    subjects: dict[str, Allreduce], elems: int, iterations: int, warmup: int, advance: Advance
) -> dict[str, list[float]]:
    """Microseconds of each call of each subject, on the slowest rank. Collective; `advance` hears of calls made.

    Every subject makes at least `iterations` timed calls, in whole turns, after at least `warmup` untimed ones.
    """
    source = torch.randn(elems, generator=torch.Generator().manual_seed(dist.get_rank()))
    x = torch.empty_like(source)
    times: dict[str, list[int]] = {name: [] for name in subjects}
    turn = turn_calls(elems)
    warmup_turns, timed_turns = -(-warmup // turn), -(-iterations // turn)
    for done in range(-warmup_turns, timed_turns):
        for name, allreduce in subjects.items():
            measured = time_turn(allreduce, x, source, turn)
            if done >= 0:
                times[name] += measured
            advance(turn)
    slowest = {}
    for name, nanoseconds in times.items():
        timed = torch.tensor(nanoseconds, dtype=torch.int64)
        dist.all_reduce(timed, dist.ReduceOp.MAX)
        slowest[name] = (timed / 1e3).tolist()
    return slowest


def percentile(times: list[float], percent: int) -> float:
    """The smallest time that at least `percent` of all times do not exceed."""
    ordered = sorted(times)
    return ordered[-(-len(ordered) * percent // 100) - 1]


@dataclasses.dataclass(frozen=True)
class Subject:
    """One codec of one communicator, as something to verify and to time."""

    comm: dpcomm.Communicator
    codec: str

    def __call__(self, x: Tensor) -> None:
        self.comm.allreduce(x, "sum", codec=self.codec)

    def verify(self, elems: int, corrupt: str | None) -> tuple[Verdict, int]:
        """The verdict, and the bytes that the busiest rank sent for it. Collective."""
        before = self.comm.stats()["wire_bytes"]
        precision = precision_of(self.codec, self.comm.algorithm, self.comm.nranks)
        verdict = verify(self, elems, precision, corrupt)
        sent = torch.tensor([int(self.comm.stats()["wire_bytes"] - before)])
        dist.all_reduce(sent, dist.ReduceOp.MAX)
        return verdict, int(sent)


def measure_size(
    subjects: Sequence[Subject],
    versus_gloo: bool,
    elems: int,
    iterations: int,
    warmup: int,
    corrupt: str | None,
    advance: Advance,
) -> list[Row]:
    """Verifies, then times every subject at one size. Collective.

    Args:
        corrupt: as for verify().
        advance: called with the number of calls made, for a progress bar.
    """
    verdicts = [subject.verify(elems, corrupt) for subject in subjects]
    contestants: dict[str, Allreduce] = {subject.codec: subject for subject in subjects}
    if versus_gloo:
        contestants["gloo"] = dist.all_reduce
    times = time_in_turns(contestants, elems, iterations, warmup, advance)
    return [
        row_of(elems, subject.codec, verdict, sent, times[subject.codec], times.get("gloo"))
        for subject, (verdict, sent) in zip(subjects, verdicts, strict=True)
    ]


def row_of(
    elems: int, codec: str, verdict: Verdict, wire_bytes: int, times: list[float], gloo: list[float] | None
) -> Row:
    """The figures of one line of the table, from the times in microseconds."""
    size_bytes, nranks = elems * ELEM_BYTES, dist.get_world_size()
    median = statistics.median(times)
    algbw = size_bytes / median / 1e3  # bytes a us are 10^6 bytes a second
    gloo_median = statistics.median(gloo) if gloo else None
    return Row(
        size_bytes=size_bytes,
        count=elems,
        type="float32",
        codec=codec,
        median_us=median,
        p95_us=percentile(times, 95),
        algbw_gb_s=algbw,
        busbw_gb_s=algbw * 2 * (nranks - 1) / nranks,
        wire_bytes=wire_bytes,
        wrong=verdict.wrong,
        error=verdict.error,
        gloo_median_us=gloo_median,
        gloo_p95_us=percentile(gloo, 95) if gloo else None,
        ratio=gloo_median / median if gloo_median is not None else None,
    )
