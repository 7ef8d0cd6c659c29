"""What `make bench-network` measures: hosts, rates of their links, sizes, contestants; and what a line allows at best.

It measures nothing and knows neither torch nor dpcomm.
"""

import argparse
from typing import Any, NamedTuple

from goals import KIB, MIB

HOSTS = (2, 3)
RATES = (0.1, 1.0, 5.0, None)  # Gb/s that each link carries each way; None: nothing limits it
SIZES = (64 * KIB, 256 * KIB, MIB, 4 * MIB, 25 * MIB, 100 * MIB)
QUICK_SIZES = (64 * KIB, MIB)
UNSHAPED = "unshaped"
LONGEST_CALL_S = 10.0  # what takes longer on the line in fp32 is not measured
PLAIN = ("gloo", "fp16_compress_hook")
SECONDS_PER_SIZE, QUICK_SECONDS = 8.0, 0.4
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
    """One number of hosts at one rate: processes that measure the sizes and end."""

    hosts: int
    gbit: float | None
    sizes: tuple[int, ...]
    skipped: tuple[int, ...]  # because a call would take too long


def runs(hosts: list[int], rates: list[float | None], sizes: list[int]) -> list[Run]:
    """One for each number of hosts and rate."""
    found = []
    for nranks in hosts:
        for gbit in rates:
            long = tuple(size for size in sizes if line_s(sent_plainly(size, nranks), gbit) > LONGEST_CALL_S)
            found.append(Run(nranks, gbit, tuple(sorted(set(sizes) - set(long))), long))
    return found


def skipped_rows(planned: list[Run]) -> list[dict[str, Any]]:
    """What is not measured, and the seconds that a call in fp32 would take on the line."""
    return [
        {"hosts": r.hosts, "gbit": r.gbit, "size_bytes": s, "line_s": line_s(sent_plainly(s, r.hosts), r.gbit)}
        for r in planned
        for s in r.skipped
    ]


def sent_plainly(size: float, nranks: int) -> float:
    """Bytes that a rank sends in the all-reduce of `size` bytes that sends least: (N-1)/N to add up, as many to give
    the result away."""
    return 2 * (nranks - 1) / nranks * size


def line_s(sent: float, gbit: float | None) -> float:
    """Seconds that so many bytes take on the line; 0 where nothing limits it."""
    return 0.0 if gbit is None else 8 * sent / (gbit * 1e9)


def line_share(sent: float, seconds: float, gbit: float | None) -> float | None:
    """How much of what the line carries in that time was used for these bytes."""
    return None if gbit is None else line_s(sent, gbit) / seconds


def train_s(plan: TrainPlan) -> float:
    """Seconds that the training takes at least, roughly: turns of five steps and the communication alone, of three or
    four contestants; steps before; models that are sent to all."""
    gradients = 4 * plan.layers * plan.width * (plan.width + 1)
    return 4 * (6 * plan.turns + 5) * plan.seeds * line_s(gradients, plan.gbit)


def rate_text(gbit: float | None) -> str:
    return UNSHAPED if gbit is None else f"{gbit:g} Gb/s"


def parse_rates(text: str) -> list[float | None]:
    """ "0.1,unshaped" as [0.1, None]."""
    try:
        rates = [None if part == UNSHAPED else float(part) for part in text.split(",")]
    except ValueError:
        rates = [0.0]
    if not all(rate is None or 0.001 <= rate <= 1000 for rate in rates):
        raise argparse.ArgumentTypeError(f"{text!r}: expected Gb/s, 0.001 to 1000, or {UNSHAPED}, with commas")
    return list(dict.fromkeys(rates))


def parse_contestants(text: str, codecs: list[str]) -> list[tuple[str, str]]:
    """Names and variants: of PLAIN ones, of "dpcomm" (each codec, algorithm auto) and of "dpcomm:CODEC/ALGORITHM".

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
        elif name == "dpcomm" and codec in codecs and slash and algorithm:
            found.append((name, variant))
        else:
            raise ValueError(f"unknown contestant {part!r}: expected {', '.join(PLAIN)}, dpcomm or dpcomm:fp16/ring")
    if ("gloo", "") not in found:
        raise ValueError("gloo has to take part: the others are compared with it")
    return list(dict.fromkeys(found))
