"""What `make bench-network` measures: hosts, rates of their links, sizes, contestants; and what a line allows at best.

It measures nothing and knows neither torch nor dpcomm.
"""

import argparse
from typing import Any, NamedTuple

from goals import KIB, MIB

SHAPES = ((2, 1), (3, 1), (2, 2), (3, 2))  # hosts, ranks on each
RATES = (0.1, 1.0, 5.0, None)  # Gb/s that each link carries each way; None: nothing limits it
SIZES = (64 * KIB, 256 * KIB, MIB, 4 * MIB, 25 * MIB, 100 * MIB)
SEVERAL_SIZES = (64 * KIB, MIB, 4 * MIB, 25 * MIB)  # with several ranks a host
LARGEST, LARGEST_GBIT = 100 * MIB, 1.0  # that they add on links at least as fast
QUICK_SHAPES, QUICK_RATES, QUICK_SIZES = ((2, 1), (2, 2)), (1.0,), (64 * KIB, MIB)
UNSHAPED = "unshaped"
LONGEST_CALL_S = 10.0  # what takes longer on the line in fp32 is not measured
PLAIN = ("gloo", "fp16_compress_hook")
FLOAT32, BFLOAT16 = "float32", "bfloat16"  # of the tensors
FLAT = "flat"  # dpcomm with engine gloo, where auto would take two levels
SECONDS_PER_SIZE, QUICK_SECONDS = 6.0, 0.4
# A turn is calls of one contestant, a round a turn of each. Of a size at least LEAST_ROUNDS, whatever they take.
LEAST_ROUNDS, MOST_ROUNDS, MOST_TURN_CALLS = 3, 12, 200


class TrainPlan(NamedTuple):
    """The training across two hosts. Communication has to be at least three quarters of the stock step, or the line
    would not be what is measured: few samples a step, 34 MB of gradients."""

    gbit: float = 1.0
    layers: int = 8
    width: int = 1024
    batch: int = 8
    bucket_cap_mb: float = 25.0
    turns: int = 6  # of train_measure.TURN_STEPS timed steps
    seeds: int = 5


QUICK_TRAIN = TrainPlan(layers=4, width=256, turns=1, seeds=2)


class Run(NamedTuple):
    """One shape at one rate: processes that measure the sizes and end."""

    hosts: int
    ranks_per_host: int
    gbit: float | None
    sizes: tuple[int, ...]
    skipped: tuple[int, ...]  # because a call would take too long

    @property
    def nranks(self) -> int:
        return self.hosts * self.ranks_per_host


def runs(shapes: list[tuple[int, int]], rates: list[float | None], asked: list[int]) -> list[Run]:
    """One for each shape and rate; with no sizes asked for, those of `default_sizes`."""
    found = []
    for hosts, each in shapes:
        for gbit in rates:
            sizes = asked or default_sizes(each, gbit)
            long = tuple(size for size in sizes if line_s(longest(size, hosts, each), gbit) > LONGEST_CALL_S)
            found.append(Run(hosts, each, gbit, tuple(sorted(set(sizes) - set(long))), long))
    return found


def default_sizes(ranks_per_host: int, gbit: float | None) -> tuple[int, ...]:
    """Fewer where there are more contestants, so that all of it ends in little more than half an hour."""
    if ranks_per_host == 1:
        return SIZES
    return (*SEVERAL_SIZES, LARGEST) if gbit is None or gbit >= LARGEST_GBIT else SEVERAL_SIZES


def skipped_rows(planned: list[Run]) -> list[dict[str, Any]]:
    """What is not measured, and the seconds that the longest call would take on the line."""
    return [
        {
            "hosts": run.hosts,
            "ranks_per_host": run.ranks_per_host,
            "gbit": run.gbit,
            "size_bytes": size,
            "line_s": line_s(longest(size, run.hosts, run.ranks_per_host), run.gbit),
        }
        for run in planned
        for size in run.skipped
    ]


def sent_plainly(size: float, nranks: int) -> float:
    """Bytes that a rank sends in the all-reduce of `size` bytes that sends least: (N-1)/N to add up, as many to give
    the result away. In a ring whose neighbours share hosts as far as they can one rank of each host sends that over the
    host's line, whatever the number of ranks on it."""
    return 2 * (nranks - 1) / nranks * size


def longest(size: float, hosts: int, ranks_per_host: int) -> float:
    """Bytes on a host's line, each way, of the contestant that sends most: gloo's ring; or, with several ranks on a
    host, flat dpcomm: each of R ranks gives N-R others a chunk of 1/N and its own result, 2 R (N-R)/N, N = HR. What
    flat sends of bfloat16, which gloo does not add for it, is twice that: up to 1.6 times what this returns."""
    nranks = hosts * ranks_per_host
    flat = 2 * ranks_per_host * (nranks - ranks_per_host) / nranks * size if ranks_per_host > 1 else 0.0
    return max(sent_plainly(size, nranks), flat / 2)  # with fp16; what no codec encodes goes as gloo's ring


def gain_at_line_rate(hosts: int, ranks_per_host: int, codec: str = "none") -> float:
    """How much sooner two levels end than a flat ring in fp32 where only the lines between hosts count.

    The ring has 2(N-1)/N buckets on a host's line each way (`sent_plainly`). In two levels hosts reduce among them:
    each of R owners has a shard of 1/R bucket, sends (H-1)/H of it to be added and as much of results, together
    2(H-1)/H. The quotient is (N-1)/N * H/(H-1), N = HR: 1.5 for 2 x 2, 1.25 for 3 x 2. With fp16 two levels send for
    1024 bytes 512 and a scale.
    """
    nranks = hosts * ranks_per_host
    return (nranks - 1) / nranks * hosts / (hosts - 1) * {"none": 1.0, "fp16": 1024 / 513}[codec]


def leaving_share(algorithm: str, hosts: int, ranks_per_host: int) -> float:
    """Of what the ranks of a host send to other ranks, the part that goes to other hosts. A ring has one such edge for
    each host; in the other flat algorithms each rank sends as much to each other one."""
    nranks = hosts * ranks_per_host
    return 1 / ranks_per_host if algorithm in ("ring", "native") else (nranks - ranks_per_host) / (nranks - 1)


def line_s(sent: float, gbit: float | None) -> float:
    """Seconds that so many bytes take on the line; 0 where nothing limits it."""
    return 0.0 if gbit is None else 8 * sent / (gbit * 1e9)


def line_share(sent: float, seconds: float, gbit: float | None) -> float | None:
    """How much of what the line carries in that time was used for these bytes."""
    return None if gbit is None else line_s(sent, gbit) / seconds


def planned_s(run: Run, seconds_per_size: float) -> float:
    """Seconds that the calls of a run take at least, roughly: a size its budget or, where the line is slow,
    LEAST_ROUNDS and the call that is checked of each of four contestants, or six; half of them have a codec and take
    half as long."""
    contestants = 4 if run.ranks_per_host == 1 else 6
    calls = 0.75 * contestants * (LEAST_ROUNDS + 1)
    longest_s = [line_s(longest(size, run.hosts, run.ranks_per_host), run.gbit) for size in run.sizes]
    return sum(max(seconds_per_size, calls * each) for each in longest_s)


def train_s(plan: TrainPlan) -> float:
    """Seconds that the training takes at least, roughly: turns of five steps and the communication alone, of three or
    four contestants; steps before; models that are sent to all."""
    gradients = 4 * plan.layers * plan.width * (plan.width + 1)
    return 4 * (6 * plan.turns + 5) * plan.seeds * line_s(gradients, plan.gbit)


def rate_text(gbit: float | None) -> str:
    return UNSHAPED if gbit is None else f"{gbit:g} Gb/s"


def shape_of(row: dict[str, Any]) -> tuple[int, int]:
    """Hosts and ranks on each, of a row of results or of what was skipped; older ones have one rank a host."""
    return row["hosts"], row.get("ranks_per_host", 1)


def shape_text(hosts: int, ranks_per_host: int) -> str:
    return f"{hosts} hosts" if ranks_per_host == 1 else f"{hosts} hosts x {ranks_per_host} ranks"


def parse_shapes(text: str) -> list[tuple[int, int]]:
    """ "2x1,3x2" as [(2, 1), (3, 2)]: hosts, ranks on each."""
    found = []
    for part in text.split(","):
        hosts, _, each = part.partition("x")
        if not (hosts in ("2", "3", "4") and each in ("1", "2", "3", "4")):
            raise argparse.ArgumentTypeError(f"{part!r}: expected hosts x ranks on each, such as 2x2; 2 to 4, 1 to 4")
        found.append((int(hosts), int(each)))
    return list(dict.fromkeys(found))


def parse_rates(text: str) -> list[float | None]:
    """ "0.1,unshaped" as [0.1, None]."""
    try:
        rates = [None if part == UNSHAPED else float(part) for part in text.split(",")]
    except ValueError:
        rates = [0.0]
    if not all(rate is None or 0.001 <= rate <= 1000 for rate in rates):
        raise argparse.ArgumentTypeError(f"{text!r}: expected Gb/s, 0.001 to 1000, or {UNSHAPED}, with commas")
    return list(dict.fromkeys(rates))


def contestants_of(dtype: str) -> str:
    """Who takes part where nobody is asked for. Codecs and the hook make 16 bits of 32."""
    return f"{','.join(PLAIN)},dpcomm,{FLAT}" if dtype == FLOAT32 else f"{PLAIN[0]},dpcomm:none/auto,{FLAT}:none/auto"


def parse_contestants(text: str, codecs: list[str]) -> list[tuple[str, str]]:
    """Names and variants: of PLAIN ones, of "dpcomm" (each codec, algorithm auto; "flat": between all ranks, as if
    each had a host of its own), and of "dpcomm:CODEC/ALGORITHM" and "flat:CODEC/ALGORITHM".

    Raises:
        ValueError: There is no such contestant, or gloo, which all are compared with, does not take part.
    """
    found: list[tuple[str, str]] = []
    for part in text.split(","):
        name, _, variant = part.partition(":")
        codec, slash, algorithm = variant.partition("/")
        if part in PLAIN:
            found.append((part, ""))
        elif part == "dpcomm":
            found += [("dpcomm", f"{each}/auto") for each in codecs]
        elif part == FLAT:
            found += [(FLAT, f"{each}/auto") for each in codecs]
        elif name in ("dpcomm", FLAT) and codec in codecs and slash and algorithm:
            found.append((name, variant))
        else:
            raise ValueError(
                f"unknown contestant {part!r}: expected {', '.join(PLAIN)}, dpcomm, {FLAT} or dpcomm:fp16/ring"
            )
    if ("gloo", "") not in found:
        raise ValueError("gloo has to take part: the others are compared with it")
    return list(dict.fromkeys(found))
