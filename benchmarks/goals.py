"""The goals that the project set itself, and whether a set of results reaches them. Medians, hot buffers."""

import math
import statistics
from collections.abc import Mapping
from typing import NamedTuple

from analysis import CODECS, RIVALS, Document, best_rival, ratios, rows_of

KIB, MIB = 1 << 10, 1 << 20
OVER_GLOO = {4 * KIB: 40.0, 64 * KIB: 18.0, MIB: 9.0, 25 * MIB: 6.0, 100 * MIB: 4.5}
LARGEST = 100 * MIB  # of the goals in C++
MOST_US_4KIB = 12.0
PROBE_WIRES = {"none": "fp32", "fp16": "fp16"}


class Outcome(NamedTuple):
    """One goal. reached: None where the results do not say."""

    level: str
    ranks: int
    goal: str
    measured: str
    reached: bool | None


Documents = Mapping[tuple[str, int], Document]  # by level and rank count


def outcomes(documents: Documents) -> list[Outcome]:
    """All goals, in order."""
    two = documents.get(("python", 2))
    found = _python_two(two)
    for ranks in (4, 8):
        document = documents.get(("python", ranks))
        for name, text, bound in (("gloo", "gloo", 3.0), ("openmpi", "Open MPI (mpi4py)", 1.0)):
            values = _over(document, name, "none/auto")
            found.append(_least("python", ranks, f"none at least {bound:g}x {text} at every size", values, bound))
    return found + _cpp(documents.get(("rivals", 2)))


def _python_two(document: Document | None) -> list[Outcome]:
    over_gloo = _over(document, "gloo", "none/auto")
    found = [
        _least("python", 2, f"none at least {bound:g}x gloo at {size_text(size)}", _only(over_gloo, size, size), bound)
        for size, bound in OVER_GLOO.items()
    ]
    over_mpi = _only(_over(document, "openmpi", "none/auto"), 64 * KIB)
    found.append(_least("python", 2, "none at least 1.2x Open MPI (mpi4py) from 64 KiB on", over_mpi, 1.2))
    row = rows_of(document, "dpcomm", "none/auto").get(4 * KIB) if document else None
    us = row["median_us"] if row else math.nan
    goal = f"a call of 4 KiB under {MOST_US_4KIB:g} us"
    found.append(Outcome("python", 2, goal, f"{us:.1f} us" if row else "", us < MOST_US_4KIB if row else None))
    return found


def _cpp(document: Document | None) -> list[Outcome]:
    found = []
    missing = [name for name in RIVALS["rivals"] if document and not rows_of(document, name)]
    without = f" (without {', '.join(missing)})" if missing else ""
    for codec, bound, begin in (("none", 1.3, 4 * KIB), ("fp16", 1.5, 64 * KIB)):
        ours = rows_of(document, "dpcomm", f"{codec}/auto") if document else {}
        values = _only(ratios(best_rival(document), ours) if document else {}, begin, LARGEST)
        span = f"{size_text(begin)} to {size_text(LARGEST)}"
        goal = f"{codec} at least {bound:g}x the fastest rival at each size, {span}{without}"
        found.append(_least("rivals", 2, goal, values, bound))
        if codec == "none":
            mean = statistics.geometric_mean(values.values()) if values else math.nan
            goal, text = f"{codec} 2x the fastest rival in the geometric mean, {span}{without}", f"{mean:.2f}x"
            found.append(Outcome("rivals", 2, goal, text if values else "", mean >= 2 if values else None))
    for codec in CODECS:
        ours = rows_of(document, "dpcomm", f"{codec}/auto") if document else {}
        wire = PROBE_WIRES[codec]
        probe = ratios(rows_of(document, "probe", wire), ours) if document else {}
        goal = f"{codec} at least 80 % of the speed of the fastest probe ({wire} wire) from 1 MiB on"
        found.append(_least("rivals", 2, goal, _only(probe, MIB), 0.8))
        floor = ratios(rows_of(document, "floor"), ours) if document else {}
        goal = f"{codec} at least 75 % of the memory-traffic floor from 8 MiB on"
        found.append(_least("rivals", 2, goal, _only(floor, 8 * MIB), 0.75))
    return found


def _over(document: Document | None, name: str, variant: str) -> dict[int, float]:
    return ratios(rows_of(document, name), rows_of(document, "dpcomm", variant)) if document else {}


def _only(values: dict[int, float], begin: int, end: int | None = None) -> dict[int, float]:
    return {size: value for size, value in values.items() if begin <= size and (end is None or size <= end)}


def _least(level: str, ranks: int, goal: str, values: dict[int, float], bound: float) -> Outcome:
    """Reached where the smallest of the values by size is at least `bound`."""
    if not values:
        return Outcome(level, ranks, goal, "", None)
    size = min(values, key=lambda each: values[each])
    where = "" if len(values) == 1 else f", least of {len(values)} sizes, at {size_text(size)}"
    return Outcome(level, ranks, goal, f"{values[size]:.2f}{where}", values[size] >= bound)


def size_text(size: int) -> str:
    """ "4 KiB", "25 MiB"; bytes where that is not a whole number."""
    for unit, name in ((MIB, "MiB"), (KIB, "KiB")):
        if size >= unit and size % unit == 0:
            return f"{size // unit} {name}"
    return f"{size} B"
