"""What the benchmark beside stock NCCL measures: flags, sizes, contestants, rows, table, JSON. It measures nothing.

Flags and columns are those of nccl-tests, where those have them.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from allreduce import parse_size
from measure import percentile
from network_plan import sent_plainly

KIB, MIB = 1 << 10, 1 << 20
DTYPES = {"float": 4, "half": 2, "bfloat16": 2}  # nccl-tests' names, and bytes of an element
# Codec and algorithm of dpcomm's contestants; those whose codes NCCL adds up are of engine nccl only.
CODINGS = (("none", "direct"), ("none", "ring"), ("fp16", "direct"), ("fp16", "ring"), ("none", "auto"))
NATIVE = (("fp16", "native"), ("bf16", "native"))
LEAST_ROUNDS, MOST_TURN_CALLS = (
    5,
    10,
)  # repeated sums of unit Gaussians stay finite in float32: 64 ranks reach 64^11 = 2^66
REHEARSAL = "cpu rehearsal"
NOTHING_TO_MOVE = "one rank: nothing to move"


class Contest(NamedTuple):
    """Who stands for whom: on GPUs, and on the CPU, where all but the links and kernels are rehearsed."""

    stock: str  # torch's backend
    engines: tuple[str, str]  # of dpcomm: within a host, and between any
    marked: str  # in every output

    def names(self) -> list[str]:
        """All contestants, in the order of the table."""
        ours = [name for engine in self.engines for name in codings(engine)]
        return [self.stock, f"{self.stock} bf16", "fp16_compress_hook", *SYMMETRIC, *ours]


def codings(engine: str) -> dict[str, tuple[str, str]]:
    """Codec and algorithm of the contestants of one engine, by name."""
    taken = (*CODINGS, *NATIVE) if engine == "nccl" else CODINGS
    return {f"dpcomm {engine} {codec}/{algorithm}": (codec, algorithm) for codec, algorithm in taken}


SYMMETRIC = tuple(f"symm_mem {variant}" for variant in ("one_shot", "two_shot", "multimem"))
CONTESTS = {"cuda": Contest("nccl", ("p2p", "nccl"), ""), "cpu": Contest("gloo", ("shm", "gloo"), REHEARSAL)}


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="nccl.py", description="dpcomm beside stock NCCL; start it with torchrun, one process a GPU."
    )
    add = parser.add_argument
    add("-b", dest="begin", type=parse_size, default=64 * KIB, metavar="BYTES", help="smallest size (default: 64K)")
    add("-e", dest="end", type=parse_size, default=256 * MIB, metavar="BYTES", help="largest size (default: 256M)")
    add("-f", dest="factor", type=float, help="each size is the one before times this (default: 4)")
    add("-i", dest="step", type=parse_size, metavar="BYTES", help="instead of -f: plus this")
    add("-n", dest="iterations", type=int, default=50, help="timed calls of a size, at least (default: 50)")
    add("-w", dest="warmup", type=int, default=10, help="untimed calls before them, at least (default: 10)")
    add("-c", dest="check", type=int, choices=[0, 1], default=1, help="1: verify each size (default), 0: do not")
    add("-d", dest="dtype", choices=list(DTYPES), default="float", help="of the tensors (default: float)")
    add("--device", choices=list(CONTESTS), default="cuda", help="cpu: a rehearsal, with gloo as NCCL (default: cuda)")
    add("--only", metavar="TEXT", help="contestants whose name contains this, and the stock all-reduce")
    add("--virtual-ranks", type=int, default=2, metavar="N", help="of one process alone (default: 2)")
    add("--json", type=Path, metavar="FILE", help="write rows and a description of the machine")
    add("--plot", type=Path, metavar="FILE", help="write a PNG: time against size")
    add("--corrupt", metavar="NAME", help=argparse.SUPPRESS)  # spoils a contestant's results: must be noticed
    arguments = parser.parse_args(argv)
    if arguments.iterations < 1 or arguments.warmup < 0:
        parser.error("-n must be at least 1, -w at least 0")
    if arguments.factor is not None and arguments.step is not None:
        parser.error("-f and -i exclude each other")
    if arguments.factor is not None and arguments.factor <= 1:
        parser.error("-f must be greater than 1")
    if arguments.end < arguments.begin:
        parser.error("-b must not be greater than -e")
    if arguments.virtual_ranks < 2:
        parser.error("--virtual-ranks must be at least 2")
    if arguments.corrupt and not arguments.check:
        parser.error("--corrupt shows nothing with -c 0")
    arguments.sizes = sizes_of(arguments)
    return arguments


def sizes_of(arguments: argparse.Namespace) -> list[int]:
    """Bytes, each rounded up to whole elements."""
    elem, found, size = DTYPES[arguments.dtype], [], float(arguments.begin)
    while size <= arguments.end:
        found.append(-(-int(size) // elem) * elem)
        size = size + arguments.step if arguments.step else size * (arguments.factor or 4.0)
    return found


class Turns(NamedTuple):
    """Calls of one contestant at one size: `calls` of them make a turn, and everyone has a turn in each round."""

    calls: int
    warm: int  # rounds that do not count
    timed: int


def turns_for(iterations: int, warmup: int) -> Turns:
    """At least five rounds where there are as many calls: the median is over rounds."""
    calls = max(1, min(MOST_TURN_CALLS, iterations // LEAST_ROUNDS))
    return Turns(calls, -(-warmup // calls), -(-iterations // calls))


@dataclasses.dataclass(frozen=True)
class Row:
    """One contestant at one size. Times are of the slowest rank."""

    contestant: str
    size_bytes: int
    count: int
    type: str
    redop: str
    ranks: int
    time_us: float | None  # None: there was nothing to time; `note` says why
    p95_us: float | None
    host_us: float | None  # of the slowest rank's host, to enqueue a call
    algbw_gb_s: float | None
    busbw_gb_s: float | None  # None where no bus is crossed
    wire_bytes: float | None  # that the busiest rank sends; None: unknown
    wrong: int | None  # None: not checked
    error: float | None  # relative L2 against fp64
    note: str


class Timing(NamedTuple):
    """Of the slowest rank, in microseconds a call: one for each turn."""

    device_us: list[float]
    host_us: list[float]


class Subject(NamedTuple):
    """Whom a row is about, and what was found besides times."""

    contestant: str
    size_bytes: int
    dtype: str
    ranks: int
    on_a_bus: bool
    wire_bytes: float | None
    wrong: int | None
    error: float | None
    note: str


def row_of(subject: Subject, timing: Timing | None) -> Row:
    """The figures of a line."""
    us = statistics.median(timing.device_us) if timing else None
    algbw = subject.size_bytes / us / 1e3 if us else None
    bus = sent_plainly(1, subject.ranks) if subject.on_a_bus and subject.ranks > 1 else None
    return Row(
        contestant=subject.contestant,
        size_bytes=subject.size_bytes,
        count=subject.size_bytes // DTYPES[subject.dtype],
        type=subject.dtype,
        redop="sum",
        ranks=subject.ranks,
        time_us=us,
        p95_us=percentile(timing.device_us, 95) if timing else None,
        host_us=statistics.median(timing.host_us) if timing else None,
        algbw_gb_s=algbw,
        busbw_gb_s=algbw * bus if algbw is not None and bus is not None else None,
        wire_bytes=subject.wire_bytes,
        wrong=subject.wrong,
        error=subject.error,
        note=subject.note,
    )


# --- table and JSON --------------------------------------------------------------------------------------------------

HEADS = [
    ("size(B)", 11),
    ("count", 10),
    ("type", 8),
    ("redop", 5),
    ("time(us)", 10),
    ("algbw(GB/s)", 11),
    ("busbw(GB/s)", 11),
    ("#wrong", 7),
    ("wire(B)", 11),
    ("contestant", -26),
    ("note", 0),
]


def setting(contest: Contest, ranks: int, virtual: int) -> list[str]:
    """What has to stand above and beside every figure of a run."""
    found = []
    if contest.marked:
        found.append(f"{contest.marked}: {contest.stock} in the place of NCCL, no figure of a GPU")
    if ranks == 1:
        found.append(
            f"one process, one device: dpcomm {contest.engines[0]} has {virtual} virtual ranks that share it; the "
            "others have one rank. Nothing crosses a link: not a network figure"
        )
    return found


def header(remarks: Sequence[str], environment: dict[str, Any], ranks: int) -> str:
    """What the table begins with."""
    where = environment.get("gpu") or environment["cpu"]
    versions = ", ".join(f"{key} {environment[key]}" for key in ("driver", "cuda", "nccl") if environment.get(key))
    return "\n".join(
        [
            *(f"# {remark}" for remark in remarks),
            f"# {ranks} rank(s) on {where}; torch {environment['torch']}{', ' + versions if versions else ''}",
            "# in place; time: median over rounds, of the slowest rank; wire: sent by the busiest rank in a call;",
            "# #wrong: off the fp64 sum by more than the codec allows, or other bits than rank 0 has",
            " ".join(_cell(name, width) for name, width in HEADS).rstrip(),
        ]
    )


def line(row: Row) -> str:
    """One row of the table."""

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    cells = [
        str(row.size_bytes),
        str(row.count),
        row.type,
        row.redop,
        number(row.time_us, ".1f"),
        number(row.algbw_gb_s, ".2f"),
        number(row.busbw_gb_s, ".2f"),
        number(row.wrong, "d"),
        number(row.wire_bytes, ".0f"),
        row.contestant,
        row.note,
    ]
    return " ".join(_cell(cell, width) for cell, (_, width) in zip(cells, HEADS, strict=True)).rstrip()


def _cell(text: str, width: int) -> str:
    return text.rjust(width) if width > 0 else text.ljust(-width)


def document(
    settings: dict[str, Any],
    environment: dict[str, Any],
    remarks: Sequence[str],
    absent: dict[str, str],
    rows: Sequence[Row],
) -> dict[str, Any]:
    """What --json writes."""
    return {
        "benchmark": "nccl",
        **settings,
        "remarks": list(remarks),
        "environment": environment,
        "absent": absent,
        "rows": [dataclasses.asdict(row) for row in rows],
    }
