"""Times contestants of one size in turns, within a budget of time. It knows no command line and prints nothing.

All contestants run in the same processes on the same buffer. A turn is some calls of one contestant; the order of turns
rotates. "hot": calls back to back on one buffer, without a barrier. "cold": before each call every rank streams
through another buffer, larger than the caches, and the ranks meet in tiny calls of the same contestant. The library's
memory for large calls is cold then, too.

The slowest rank's time of a call counts. The floor's is from the first rank's start to the last one's end, since its
ranks do not wait for each other: with more ranks than processors each one's own copy would look too fast.
"""

import dataclasses
import os
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from contestants import Contestant

ELEM_BYTES = 4  # float32
CACHES = ("hot", "cold")
ROUNDS = 8
MIN_CALLS, MOST_TURN_CALLS = 3, 2000  # of a contestant and state of the cache; at least, and in one turn at most
REFILL_CALLS = 10  # few enough that repeated sums of unit Gaussians stay finite: 64 ranks reach 64^11 = 2^66
MEET_ELEMS = 64
MEETS = 3  # after the first, ranks that slept meanwhile are awake, but not yet at the same point
WARM_ELEMS = 1 << 20  # that the untimed call of a turn is about: the library's own memory is warm after these
Advance = Callable[[], object]  # told of every turn


class Plan(NamedTuple):
    """How one size is measured."""

    budget_s: float  # for all contestants together; MIN_CALLS may take longer
    caches: tuple[str, ...] = CACHES
    rounds: int = ROUNDS


@dataclasses.dataclass
class Cell:
    """One contestant, hot or cold, with its calls on this rank."""

    contestant: Contestant
    cache: str
    seconds_a_call: float = 0.0  # refills and flushes included; the same on all ranks
    seconds_a_turn: float = 0.0  # beyond its calls
    starts_ns: list[int] = dataclasses.field(default_factory=list)
    ends_ns: list[int] = dataclasses.field(default_factory=list)


class Buffers:
    """A rank's memory for all sizes: the buffer that is reduced, what fills it, and what flushes the caches."""

    def __init__(self, elems: int, dtype: torch.dtype = torch.float32) -> None:
        self.source = torch.randn(elems, generator=torch.Generator().manual_seed(dist.get_rank())).to(dtype)
        self.x = torch.empty_like(self.source)
        self.zeros = torch.zeros(MEET_ELEMS)
        self.other = torch.zeros(flush_bytes() // ELEM_BYTES)

    def flush(self) -> None:
        """Streams through the other buffer; writing, so that nothing remains that the cache would rather keep."""
        self.other.add_(1)


def flush_bytes() -> int:
    """Twice the last cache, as the kernel reports it; at least 64 MiB: a virtual machine may say too little."""
    names = ("SC_LEVEL2_CACHE_SIZE", "SC_LEVEL3_CACHE_SIZE", "SC_LEVEL4_CACHE_SIZE")
    sizes = [os.sysconf(name) for name in names if name in os.sysconf_names]
    return max([64 << 20, *(2 * size for size in sizes)])


def time_in_turns(
    contestants: list[Contestant], elems: int, plan: Plan, buffers: Buffers, advance: Advance
) -> list[tuple[Cell, list[float]]]:
    """Each contestant's times in microseconds at one size, hot and cold. Collective.

    All ranks decide alike how many calls a turn has, from the slowest rank's time of the turn before.
    """
    cells = [Cell(contestant, cache) for cache in plan.caches for contestant in contestants]
    for cell in cells:  # one call to learn from, not counted
        spent_on(cell, elems, 1, buffers)
        cell.starts_ns.clear()
        cell.ends_ns.clear()
    spent, turn_s = 0.0, plan.budget_s / (plan.rounds * len(cells))
    for number in range(plan.rounds):
        first = number % len(cells)
        for cell in cells[first:] + cells[:first]:  # nobody has the same neighbour in every round
            if spent < plan.budget_s or len(cell.starts_ns) < MIN_CALLS:
                calling_s = max(turn_s - cell.seconds_a_turn, turn_s / 2)
                calls = max(1, min(MOST_TURN_CALLS, int(calling_s / cell.seconds_a_call)))
                spent += spent_on(cell, elems, calls, buffers)
            advance()
    return [(cell, over_all_ranks(cell)) for cell in cells]


def spent_on(cell: Cell, elems: int, calls: int, buffers: Buffers) -> float:
    """Runs one turn. Returns the seconds that the slowest rank needed. Collective."""
    begin = time.perf_counter()
    calling_s = run_turn(cell, elems, calls, buffers)
    seconds = torch.tensor([time.perf_counter() - begin, calling_s], dtype=torch.float64)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    total, calling = seconds.tolist()
    cell.seconds_a_call, cell.seconds_a_turn = calling / calls, total - calling
    return float(total)


def run_turn(cell: Cell, elems: int, calls: int, buffers: Buffers) -> float:
    """`calls` calls of one contestant on this rank, after one that is not timed. Returns the seconds they took."""
    x, source, zeros, cold = buffers.x[:elems], buffers.source[:elems], buffers.zeros, cell.cache == "cold"
    allreduce, meet, meet_always = cell.contestant.allreduce, cell.contestant.meet, cold or not cell.contestant.sums
    clock = time.perf_counter_ns  # on Linux the same clock in all processes
    x.copy_(source)
    allreduce(x[:WARM_ELEMS])
    begin = clock()
    for call in range(calls):
        if call > 0 and call % REFILL_CALLS == 0:
            x.copy_(source)
        if cold:
            buffers.flush()
        if meet_always or call == 0:
            for _ in range(MEETS):
                meet(zeros)
        start = clock()
        allreduce(x)
        cell.ends_ns.append(clock())
        cell.starts_ns.append(start)
    return (clock() - begin) / 1e9


def over_all_ranks(cell: Cell) -> list[float]:
    """Microseconds of each call. Collective."""
    starts, ends = (torch.tensor(times, dtype=torch.int64) for times in (cell.starts_ns, cell.ends_ns))
    if cell.contestant.sums:
        slowest = ends - starts
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
    else:
        dist.all_reduce(starts, dist.ReduceOp.MIN)
        dist.all_reduce(ends, dist.ReduceOp.MAX)
        slowest = ends - starts
    return (slowest / 1e3).tolist()
