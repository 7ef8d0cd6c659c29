"""What the loop-back benchmark times, how many bytes a call moves, and what follows from the times. It needs no GPU.

All ranks are virtual: they share one GPU, so nothing here is a network figure.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from gpu_clock import Times
from gpu_goals import Outcome

from dpcomm import _native
from dpcomm.plan.counts import Traffic
from dpcomm.plan.counts import traffic as traffic

ELEM_BYTES = 4  # float32
ALGORITHMS = ("direct", "oneshot", "ring")
MOST_ONESHOT_BYTES = 256 << 10  # beyond, it reads N - 1 whole buckets for nothing
SWEEP = (1, 2, 4, 8, 16, 32, 64)  # CTAs of one rank
ROUNDS = 5
GOAL_BYTES, GOAL_RANKS, GOAL_US = 4096, 2, 8.0
TIMING_US, LEAST_CALLS, MOST_CALLS = 3000.0, 3, 100  # of one timing; so many calls fit into a stream's queue


@dataclasses.dataclass(frozen=True)
class Cell:
    """One kind of call."""

    size_bytes: int
    codec: str
    algorithm: str

    def traffic(self, nranks: int, pinned: bool) -> Traffic:
        """What a call of it moves."""
        dtype, codec = _native.DTYPES["float32"], _native.CODECS[self.codec]
        wire = _native.wire_bytes(self.size_bytes // ELEM_BYTES, dtype, codec)
        return traffic(self.algorithm, self.codec, nranks, self.size_bytes, wire, pinned)


class Yardsticks(NamedTuple):
    """Of the same run, in 10^9 bytes per second."""

    copy_gb_s: float  # a copy kernel with as many CTAs as all ranks have, read + written
    link_gb_s: float  # the slower of copies from and to pinned host memory


@dataclasses.dataclass(frozen=True)
class Row:
    """One cell with one number of CTAs. Times are of all ranks together: they share the GPU."""

    size_bytes: int
    codec: str
    algorithm: str
    arena: str  # where messages lie: "device" or "pinned"
    ctas: int  # of one rank, at most
    median_us: float
    p95_us: float
    host_us: float
    algbw_gb_s: float
    moved_bytes: int
    moved_gb_s: float
    of_copy: float  # time of a copy kernel for as many bytes, over the call's
    bus_bytes: int | None  # pinned: in the busier direction
    of_link: float | None  # pinned: time of a copy for as many bytes, over the call's
    over_none: float | None  # time of codec none over that of this codec
    wrong: int  # elements whose bits differ from the CPU engine's or between ranks


TimeCalls = Callable[[Cell, int], Times]
Check = Callable[[Cell], int]
Advance = Callable[[], object]


def cells_of(sizes: Sequence[int], codecs: Sequence[str], algorithm: str) -> list[Cell]:
    """What is timed. "auto" is all algorithms, oneshot for small sizes only."""
    found = []
    for size in sizes:
        for name in ALGORITHMS if algorithm == "auto" else (algorithm,):
            if algorithm != "auto" or name != "oneshot" or size <= MOST_ONESHOT_BYTES:
                found += [Cell(size, codec, name) for codec in codecs]
    return found


def sweep_of(asked: Sequence[int] | None, nranks: int, multiprocessors: int) -> list[int]:
    """Numbers of CTAs of a rank: all ranks together have at most one on each multiprocessor."""
    return [ctas for ctas in asked or SWEEP if ctas * nranks <= multiprocessors]


def calls_for(us: float) -> int:
    """How many calls make a timing, from the time of one."""
    return max(LEAST_CALLS, min(MOST_CALLS, math.ceil(TIMING_US / us))) if us > 0 else MOST_CALLS


def measure(
    cells: Sequence[Cell], rounds: int, time_calls: TimeCalls, check: Check, advance: Advance
) -> tuple[dict[Cell, list[Times]], dict[Cell, int]]:
    """Checks each cell, then times all in turns, in an order that rotates.

    Returns:
        Times of each cell, one a round; and how many elements were wrong.
    """
    every = list(cells)
    wrong = {cell: check(cell) for cell in every}
    calls = {cell: calls_for(time_calls(cell, LEAST_CALLS).gpu_us) for cell in every}
    times: dict[Cell, list[Times]] = {cell: [] for cell in every}
    for number in range(rounds):
        first = number * len(every) // rounds
        for cell in every[first:] + every[:first]:
            times[cell].append(time_calls(cell, calls[cell]))
            advance()
    return times, wrong


def rows_of(
    nranks: int, arena: str, ctas: int, measured: dict[Cell, list[Times]], wrong: dict[Cell, int], sticks: Yardsticks
) -> list[Row]:
    """The figures of one number of CTAs."""
    median = {cell: statistics.median(each.gpu_us for each in times) for cell, times in measured.items()}
    rows = []
    for cell, times in measured.items():
        us, moved = median[cell], cell.traffic(nranks, arena == "pinned")
        ordered = sorted(each.gpu_us for each in times)
        none = median.get(Cell(cell.size_bytes, "none", cell.algorithm))
        bus = moved.busier_way if arena == "pinned" else None
        rows.append(
            Row(
                size_bytes=cell.size_bytes,
                codec=cell.codec,
                algorithm=cell.algorithm,
                arena=arena,
                ctas=ctas,
                median_us=us,
                p95_us=ordered[-(-len(ordered) * 95 // 100) - 1],
                host_us=statistics.median(each.host_us for each in times),
                algbw_gb_s=cell.size_bytes / us / 1e3,
                moved_bytes=round(moved.total),
                moved_gb_s=moved.total / us / 1e3,
                of_copy=moved.total / us / 1e3 / sticks.copy_gb_s,
                bus_bytes=None if bus is None else round(bus),
                of_link=None if bus is None else bus / us / 1e3 / sticks.link_gb_s,
                over_none=none / us if none is not None and cell.codec != "none" else None,
                wrong=wrong[cell],
            )
        )
    return rows


def outcome_of(nranks: int, rows: Sequence[Row]) -> Outcome:
    """The goal for small calls: codec none by the algorithm that "auto" takes, messages in device memory."""
    goal = (
        f"a call of {GOAL_BYTES // 1024} KiB between {GOAL_RANKS} virtual ranks in less than {GOAL_US:g} us on the GPU"
    )
    times = [
        (row.median_us, row.ctas)
        for row in rows
        if (row.size_bytes, row.codec, row.algorithm, row.arena) == (GOAL_BYTES, "none", "oneshot", "device")
    ]
    if nranks != GOAL_RANKS or not times:
        return Outcome(goal, "", None)
    us, ctas = min(times)
    return Outcome(goal, f"{us:.1f} us with {ctas} CTAs a rank", us < GOAL_US)


# --- table -----------------------------------------------------------------------------------------------------------

HEADS = [
    ("size(B)", 10),
    ("codec", 6),
    ("algorithm", 9),
    ("arena", 6),
    ("ctas", 4),
    ("time(us)", 10),
    ("p95(us)", 10),
    ("host(us)", 8),
    ("algbw(GB/s)", 11),
    ("moved(GB/s)", 11),
    ("of copy", 7),
    ("of link", 7),
    ("/none", 6),
    ("#wrong", 6),
]


def header(nranks: int, environment: dict[str, Any], sticks: Yardsticks) -> str:
    """What every table begins with."""
    return "\n".join(
        [
            f"# loop-back: {nranks} virtual ranks on one GPU; not a network figure",
            f"# {environment['gpu']}, {environment['multiprocessors']} SMs, driver {environment['driver']}, "
            f"torch {environment['torch']}; copy kernel {sticks.copy_gb_s:.1f} GB/s, pinned copies "
            f"{sticks.link_gb_s:.1f} GB/s",
            "# time: of a call on the device; host: to enqueue it; moved: read and written by all ranks",
            "# of copy: a copy kernel's time for these bytes, with as many CTAs; of link: a pinned copy's time for",
            "# what crosses the bus in its busier direction; /none: codec none's time over this",
            "  ".join(name.rjust(width) for name, width in HEADS),
        ]
    )


def line(row: Row) -> str:
    """One row of the table."""
    cells = [
        str(row.size_bytes),
        row.codec,
        row.algorithm,
        row.arena,
        str(row.ctas),
        f"{row.median_us:.1f}",
        f"{row.p95_us:.1f}",
        f"{row.host_us:.1f}",
        f"{row.algbw_gb_s:.2f}",
        f"{row.moved_gb_s:.1f}",
        f"{row.of_copy:.1%}",
        "-" if row.of_link is None else f"{row.of_link:.1%}",
        "-" if row.over_none is None else f"{row.over_none:.2f}",
        str(row.wrong),
    ]
    return "  ".join(cell.rjust(width) for cell, (_, width) in zip(cells, HEADS, strict=True))
