"""dpcomm beside Open MPI, MPICH, oneCCL and two yardsticks, from C++: one report from one interleaved run.

All contenders' processes are started once and asked in turns, so that a machine that changes while it is measured
changes for all of them. Times are of the slowest rank; "hot": calls back to back on one buffer, "cold": after the
buffer has been flushed from the caches. Yardsticks: `floor`, a copy of the buffer by all ranks at once, and `probe`, a
hand-written all-reduce without checks. cpp/contenders.py says how to get the rivals; those that are missing are named.

Exit status: 0, 1 where a result was wrong or a contender failed, 2 where it could not run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from cpp import contenders
from cpp.group import Contender, ContenderError, Group
from cpp.report import CACHES, Report, Row, columns_of, compare, summary, table_head, table_line, wrong_rows
from environment import describe_environment
from tqdm import tqdm

SIZES = "256,1K,4K,16K,64K,256K,1M,4M,8M,25M,100M,256M"
SIZE_STEP = 64  # bytes: a whole number of the probe's vectors
ROUNDS = 8
MIN_CALLS = 5  # of a variant at one size, hot and cold, however long they take
LEAST_TURN_CALLS, MOST_TURN_CALLS = 3, 2000  # each turn has an untimed call and a fill as well
SLOW_CALL_S = 3.0  # a contender whose call takes longer is not asked for larger sizes
DEADLINE_S = 90.0  # for one turn, and for the start
MEMORY_SHARE = 0.9  # of the memory that is available


@dataclasses.dataclass
class Cell:
    """The times of one contender's variant at one size, hot or cold."""

    group: Group
    variant: str
    cache: str
    wrong: int
    seconds_a_call: float  # everything around it included
    times_ns: list[int] = dataclasses.field(default_factory=list)  # of the slowest rank


# ---- measuring ---------------------------------------------------------------------------------------------------
def start(present: list[Contender], ranks: int, pin: bool, report: Report, deadline_s: float) -> list[Group]:
    """Starts everybody; who does not start is in the report."""
    groups = []
    for contender in present:
        try:
            groups.append(Group(contender, ranks, pin, deadline_s))
        except ContenderError as error:
            report.failed[contender.name] = f"did not start: {error}"
    return groups


def turn(cell: Cell, size: int, calls: int, deadline_s: float) -> None:
    """Some calls of one contender: adds their times, and learns how long they take."""
    begin = time.monotonic()
    answers = cell.group.ask(f"run {cell.variant} {size // 4} {calls} {cell.cache} 1", deadline_s)
    cell.seconds_a_call = (time.monotonic() - begin) / calls
    cell.times_ns += slowest(answers)


def slowest(answers: list[list[str]]) -> list[int]:
    """Of each call, the time of the rank that took longest."""
    return [max(int(time_ns) for time_ns in call) for call in zip(*answers, strict=True)]


def turn_calls(seconds_a_call: float, turn_s: float) -> int:
    """How many calls fit into a turn."""
    return max(LEAST_TURN_CALLS, min(MOST_TURN_CALLS, int(turn_s / max(seconds_a_call, 1e-9))))


def measure_size(
    groups: list[Group], size: int, budget_s: float, report: Report, deadline_s: float, advance: Callable[[], object]
) -> list[Row]:
    """Checks, then times everybody at one size. Who fails leaves `groups`."""

    def attempt(group: Group, action: Callable[[], object]) -> None:
        if group in groups:
            try:
                action()
            except ContenderError as error:
                report.failed[group.contender.name] = f"at {size} bytes: {error}"
                groups.remove(group)

    cells: list[Cell] = []
    for group in list(groups):
        attempt(group, partial(check, group, size, cells, deadline_s))
    begin = time.monotonic()
    turn_s = budget_s / (ROUNDS * max(1, len(cells)))
    for number in range(ROUNDS):
        first = number % max(1, len(cells))
        for cell in cells[first:] + cells[:first]:  # nobody has the same neighbour in every round
            late = time.monotonic() - begin > budget_s
            if not late or len(cell.times_ns) < MIN_CALLS:
                calls = turn_calls(cell.seconds_a_call, turn_s)
                attempt(cell.group, partial(turn, cell, size, calls, deadline_s))
            advance()
    return compare([row_of(cell, size) for cell in cells if cell.times_ns])


def check(group: Group, size: int, cells: list[Cell], deadline_s: float) -> None:
    """One call of each variant, compared with the exact sum; adds a cell for each variant and state of the cache."""
    for variant in group.contender.variants:
        begin = time.monotonic()
        if group.contender.sums:
            wrong = sum(int(words[0]) for words in group.ask(f"check {variant} {size // 4} 5", deadline_s))
        else:
            group.ask(f"run {variant} {size // 4} 1 hot 1", deadline_s)
            wrong = 0
        seconds = time.monotonic() - begin  # too much, which the first turn corrects
        cells += [Cell(group, variant, cache, wrong, seconds) for cache in CACHES]


def drop_slow(groups: list[Group], rows: list[Row], size: int, report: Report) -> None:
    """Stops who is too slow to be asked for larger sizes."""
    for group in list(groups):
        slowest_us = max((row.median_us for row in rows if row.contender == group.contender.name), default=0.0)
        if slowest_us > SLOW_CALL_S * 1e6:
            report.dropped[group.contender.name] = f"above {size} bytes: a call took {slowest_us / 1e6:.1f} s there"
            groups.remove(group)
            group.stop()


def row_of(cell: Cell, size: int) -> Row:
    times = sorted(cell.times_ns)
    median = statistics.median(times) / 1e3
    p95 = times[-(-len(times) * 95 // 100) - 1] / 1e3
    name = cell.group.contender.name
    return Row(name, cell.variant, size, cell.cache, len(times), median, p95, size / median / 1e3, cell.wrong)


def fitting(sizes: list[int], nbuffers: int, available: int) -> list[int]:
    """The sizes for which all contenders' buffers fit into memory at once."""
    return [size for size in sizes if size * nbuffers <= available * MEMORY_SHARE]


# ---- the machine -------------------------------------------------------------------------------------------------
def cache_facts() -> dict[str, str]:
    """What lscpu says about caches: "L3": "32 MiB (1 instance)"; empty where there is no lscpu."""
    try:
        done = subprocess.run(["lscpu", "--json"], capture_output=True, text=True, timeout=30, check=False)
        fields = json.loads(done.stdout)["lscpu"]
    except (OSError, ValueError, KeyError):
        return {}
    flat = [*fields, *(child for field in fields for child in field.get("children", []))]
    flat += [child for field in flat for child in field.get("children", [])]
    return {f["field"].split()[0]: f["data"] for f in flat if f["field"].startswith("L") and "cache" in f["field"]}


def available_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# ---- the program -------------------------------------------------------------------------------------------------
def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    usual = ",".join(name for name in contenders.VARIANTS if name != "floor")
    add("--ranks", type=int, default=2, help="rank processes of each contender (default: 2)")
    add("--sizes", default=SIZES, help=f"with commas (default: {SIZES})")
    add("--seconds-per-size", type=float, default=25.0, help="time for all contenders together (default: 25)")
    add("--contenders", default=usual, help="NAME or NAME:VARIANT, as dpcomm:none/ring (default: %(default)s)")
    add("--oneccl", metavar="DIR", help="environment with oneCCL's wheel (default: CCL_ROOT, or this Python's)")
    add("--unpinned", action="store_true", help="let the scheduler place ranks; else rank r stays on processor r")
    add("--json", type=Path, metavar="FILE", help="write the rows and a description of the machine")
    arguments = parser.parse_args(argv)
    try:
        arguments.sizes = [parse_size(text) for text in arguments.sizes.split(",")]
        arguments.selected = contenders.select(arguments.contenders.split(","))
    except ValueError as error:
        parser.error(str(error))
    if arguments.ranks < 1 or arguments.seconds_per_size <= 0:
        parser.error("--ranks must be at least 1, --seconds-per-size more than 0")
    return arguments


def parse_size(text: str) -> int:
    """Bytes of "512", "4K", "25M" or "1G", rounded up to what the probe can handle."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    number = text[:-1] if text[-1:].upper() in units else text
    if not number.isdecimal() or int(number) == 0:
        raise ValueError(f"{text!r} is not a size: write a number, with K, M or G after it")
    return -(-int(number) * units.get(text[-1:].upper(), 1) // SIZE_STEP) * SIZE_STEP


def measure_all(
    present: list[Contender],
    sizes: list[int],
    ranks: int,
    budget_s: float,
    pin: bool,
    report: Report,
    deadline_s: float = DEADLINE_S,
) -> dict[str, str]:
    """Runs everything and prints the table. Returns each contender's version."""
    columns = columns_of(present)
    # Every rank has a buffer, the floor's two, and the one whose turn it is perhaps a temporary one.
    fit = fitting(sizes, ranks * (len(present) + 2), available_memory())
    for size in set(sizes) - set(fit):
        report.dropped["everybody"] = f"at {size} bytes and more: not enough memory for all contenders at once"
    groups = start(present, ranks, pin, report, deadline_s)
    versions = {group.contender.name: group.version for group in groups}
    print(f"# {ranks} ranks, float32; medians in us\n{table_head(columns)}", flush=True)
    turns = ROUNDS * len(CACHES) * sum(len(group.contender.variants) for group in groups)
    try:
        with tqdm(total=turns * len(fit), unit="turn", leave=False, disable=None) as bar:
            for size in fit:
                bar.set_description(f"{size} bytes")
                new = measure_size(groups, size, budget_s, report, deadline_s, bar.update)
                report.rows += new
                for cache in CACHES:
                    rows = [row for row in new if row.cache == cache]
                    if rows:
                        bar.write(table_line(rows, columns), file=sys.stdout)
                sys.stdout.flush()
                if size != fit[-1]:
                    drop_slow(groups, new, size, report)
    finally:
        for group in groups:
            group.stop()
    print("\n".join(summary(report)), flush=True)
    return versions


def main(argv: list[str]) -> int:
    arguments = parse_arguments(argv)
    environment = describe_environment() | {"caches": cache_facts()}
    try:
        present, absent = contenders.build(
            arguments.selected, contenders.oneccl_root(arguments.oneccl), arguments.ranks
        )
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 2
    report = Report(absent=absent)
    pin = not arguments.unpinned and arguments.ranks <= len(os.sched_getaffinity(0))
    versions = measure_all(present, arguments.sizes, arguments.ranks, arguments.seconds_per_size, pin, report)
    if arguments.json is not None:
        document = {
            "benchmark": "rivals",
            "ranks": arguments.ranks,
            "pinned": pin,
            "environment": environment | {"versions": versions},
            **dataclasses.asdict(report),
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(document, indent=2, default=str) + "\n")
        print(f"wrote {arguments.json}")
    return 1 if wrong_rows(report) or report.failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
