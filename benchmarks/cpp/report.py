"""What the comparison found: its rows, how they compare, and the table. It does not know how they were measured."""

from __future__ import annotations

import dataclasses
import math
import statistics

from cpp.contenders import RIVALS
from cpp.group import Contender

CACHES = ("hot", "cold")


@dataclasses.dataclass
class Row:
    """A line of the JSON. Ratios are over 1 where dpcomm is faster; None where there is nothing to compare with."""

    contender: str
    variant: str
    size_bytes: int
    cache: str
    calls: int
    median_us: float
    p95_us: float
    algbw_gb_s: float
    wrong: int
    floor_us: float | None = None
    floor_fraction: float | None = None  # of the floor's speed that was reached
    rival: str = ""
    rival_ratio: float | None = None  # the fastest rival's median over this one
    probe_fraction: float | None = None  # the fastest probe's median over this one


@dataclasses.dataclass
class Report:
    """What came out, and who did not take part in all of it."""

    rows: list[Row] = dataclasses.field(default_factory=list)
    absent: dict[str, str] = dataclasses.field(default_factory=dict)
    failed: dict[str, str] = dataclasses.field(default_factory=dict)
    dropped: dict[str, str] = dataclasses.field(default_factory=dict)


def compare(rows: list[Row]) -> list[Row]:
    """Fills in the ratios of rows of one size."""
    for cache in CACHES:
        here = [row for row in rows if row.cache == cache]
        floor = _fastest(here, "floor")
        probe = _fastest(here, "probe")
        rival = _fastest(here, *RIVALS)
        for row in here:
            row.floor_us = floor.median_us if floor else None
            row.floor_fraction = floor.median_us / row.median_us if floor else None
            row.probe_fraction = probe.median_us / row.median_us if probe else None
            row.rival, row.rival_ratio = (rival.contender, rival.median_us / row.median_us) if rival else ("", None)
    return rows


def _fastest(rows: list[Row], *names: str) -> Row | None:
    return min((row for row in rows if row.contender in names), key=lambda row: row.median_us, default=None)


def columns_of(present: list[Contender]) -> list[tuple[str, str, str]]:
    """Title, contender and beginning of the variant, of each column of medians; the probe has one for each wire."""
    columns = []
    for contender in present:
        prefixes = dict.fromkeys(v.split("/")[0] for v in contender.variants) if contender.name == "probe" else {}
        for variant in prefixes or contender.variants:
            title = contender.name if len(contender.variants) == 1 else f"{contender.name} {variant}"
            columns.append((title, contender.name, variant))
    return columns


def table_head(columns: list[tuple[str, str, str]]) -> str:
    titles = [title.rjust(max(9, len(title))) for title, _, _ in columns]
    return "  ".join(["   size(B)", "cache", *titles, "  [x rival, of probe, of floor] of each dpcomm"])


def table_line(rows: list[Row], columns: list[tuple[str, str, str]]) -> str:
    """Medians in microseconds of rows of one size and cache."""
    cells = [f"{rows[0].size_bytes:10d}", rows[0].cache.rjust(5)]
    for title, name, prefix in columns:
        matching = [row for row in rows if row.contender == name and row.variant.startswith(prefix)]
        best = _fastest(matching, name)
        text = "-" if best is None else f"{best.median_us:.1f}" + ("!" if any(r.wrong for r in matching) else "")
        cells.append(text.rjust(max(9, len(title))))
    for row in rows:
        if row.contender == "dpcomm":
            parts = [(row.rival_ratio, "x"), (row.probe_fraction, ""), (row.floor_fraction, "")]
            cells.append("[" + " ".join("-" if v is None else f"{v:.2f}{unit}" for v, unit in parts) + "]")
    return "  ".join(cells)


def summary(report: Report) -> list[str]:
    """Who was missing, and dpcomm's geometric means over the fastest rival, 4 KiB to 100 MiB."""
    lines = [f"absent: {name}: {' '.join(reason.split())}" for name, reason in report.absent.items()]
    lines += [f"FAILED: {name}: {reason}" for name, reason in report.failed.items()]
    lines += [f"dropped: {name} {reason}" for name, reason in report.dropped.items()]
    lines += [f"WRONG: {r.contender} {r.variant}, {r.size_bytes} bytes: {r.wrong} elements" for r in wrong_rows(report)]
    ours = [r for r in report.rows if r.contender == "dpcomm" and r.rival_ratio and 4096 <= r.size_bytes <= 100 << 20]
    for variant, cache in dict.fromkeys((row.variant, row.cache) for row in ours):
        ratios = [row.rival_ratio or 1.0 for row in ours if (row.variant, row.cache) == (variant, cache)]
        mean = math.exp(statistics.fmean(map(math.log, ratios)))
        lines.append(
            f"dpcomm {variant}, {cache}: {mean:.2f}x the fastest rival (geometric mean), least {min(ratios):.2f}x"
        )
    return lines


def wrong_rows(report: Report) -> list[Row]:
    return [row for row in report.rows if row.wrong and row.cache == CACHES[0]]  # both states share one check
