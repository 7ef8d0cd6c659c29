"""Writes the tables of docs/plan.md and two pictures: `python benchmarks/plan_page.py`.

Predicted beside measured, for every row of benchmarks/results that the model speaks of; and for each rate of the links,
and each shape, with constants that were fitted without it. Everything else of the page is by hand.

`--against FOLDER` writes nothing: how far the rows there, of another run, are from those in benchmarks/results.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import plan_fit
import plan_rows as measured
from goals import size_text
from model import filled
from network_plan import UNSHAPED, rate_text, shape_text
from plan_rows import Measured
from render import table

from dpcomm import __main__ as command
from dpcomm.plan import constants as plan_constants
from dpcomm.plan.cpu import Gloo, Shm
from dpcomm.plan.picture import draw
from dpcomm.plan.question import Question

ROOT = Path(__file__).resolve().parent.parent
PAGE, RESULTS = ROOT / "docs" / "plan.md", ROOT / "benchmarks" / "results"
EXAMPLES = {
    "example": "--hosts 16 --ranks-per-host 8 --link 50GB/s --network 400Gb/s --params 7e9 --dtype bf16 --codec fp16",
    "example on cpu": "--hosts 2 --network 1Gb/s --size 25MiB",
}
PICTURES = {
    "plan.png": Question(2, 8, 7 * 10**9, "float32", "fp16", "cuda", 50e9, 50e9, 25 << 20),
    "plan-cpu.png": Question(2, 1, 25 << 18, "float32", "fp16", "cpu", None, 1.25e9),
}
Kinds = dict[str, Callable[[Measured], bool]]
KINDS: Kinds = {
    "shaped, from 4 MiB on": lambda row: row.shaped and row.large,
    "shaped, smaller": lambda row: row.shaped and not row.large,
    UNSHAPED: lambda row: not row.shaped,
}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="of another run's network*.json; writes nothing")
    arguments = parser.parse_args(argv)
    if arguments.against:
        print(again_table(measured.between_hosts(), measured.between_hosts(arguments.against)))
        return 0
    PAGE.write_text(page(PAGE.read_text()))
    for name, question in PICTURES.items():
        draw(question, RESULTS / name)
    print(f"wrote {PAGE.relative_to(ROOT)} and {', '.join(PICTURES)}")
    return 0


def page(text: str) -> str:
    """The page with every block as it is computed now.

    Raises:
        ValueError: A marker is missing.
    """
    return filled(text, "plan", blocks(), PAGE.name)


def blocks() -> dict[str, str]:
    """By the name of its markers."""
    rows = measured.between_hosts()
    one, several = [row for row in rows if row.place.ranks == 1], [row for row in rows if row.place.ranks > 1]
    found = {
        "errors": errors_table(rows, plan_constants.GLOO),
        "held out": held_out_table(rows),
        "shm": shm_table(),
        "shaped": rows_table([row for row in one if row.shaped]),
        "unshaped": rows_table([row for row in one if not row.shaped]),
        "several": rows_table(several) if several else "None has been measured.",
    }
    return found | {name: printed(arguments) for name, arguments in EXAMPLES.items()}


def gbit(row: Measured) -> float | None:
    return None if row.place.network is None else 8 * row.place.network / 1e9


def shape_of(row: Measured) -> str:
    return shape_text(row.place.hosts, row.place.ranks)


def shapes(rows: list[Measured]) -> list[str]:
    """Those with a rank a host first."""
    found = sorted({(row.place.ranks, row.place.hosts) for row in rows})
    return [shape_text(hosts, ranks) for ranks, hosts in found]


def errors_table(rows: list[Measured], fitted: Gloo | Shm) -> str:
    """A line for each kind of rows and shape, one rank a host first."""
    lines = []
    for name, kind in KINDS.items():
        for shape in shapes(rows):
            chosen = [row for row in rows if kind(row) and shape_of(row) == shape]
            lines.append([f"{name}, {shape}", *error_cells(chosen, fitted)])
    return table(["", *HEADS], lines)


HEADS = ["rows", "median", "nine tenths within", "largest", "beyond 15 %"]


def error_cells(rows: list[Measured], fitted: Gloo | Shm) -> list[str]:
    found = measured.errors(rows, fitted)
    return [str(found.rows), *(f"{share:.1%}" for share in found[1:4]), str(found.beyond)]


def held_out_table(rows: list[Measured]) -> str:
    """For each rate of the links, and each shape: shaped rows of it, with constants that know only the others."""
    rates = sorted({gbit(row) for row in rows if row.shaped}, key=lambda rate: rate or 0.0)
    left_out: Kinds = {rate_text(rate): lambda row, rate=rate: gbit(row) == rate for rate in rates}  # type: ignore[misc]
    left_out |= {shape: lambda row, shape=shape: shape_of(row) == shape for shape in shapes(rows)}  # type: ignore[misc]
    lines = []
    for name, left in left_out.items():
        fitted = plan_fit.fit([row for row in rows if not left(row)], plan_fit.FIRST_GLOO)
        for kind in list(KINDS)[:2]:
            chosen = [row for row in rows if left(row) and KINDS[kind](row)]
            lines.append([f"{name}, {kind}", *error_cells(chosen, fitted)])
    return table(["left out of the fit", *HEADS], lines)


def again_table(rows: list[Measured], others: list[Measured]) -> str:
    """How far the same contestants at the same place were from each other in two runs, two levels by themselves."""
    theirs = {(row.name, row.place, row.load): row.us for row in others}
    lines = []
    for kind, chosen in KINDS.items():
        for of, two_levels in (("two levels", True), ("others", False)):
            pairs = [
                row.us / theirs[key] - 1
                for row in rows
                if (key := (row.name, row.place, row.load)) in theirs
                and chosen(row)
                and (row.algorithm == "two_level") == two_levels
            ]
            beyond = sum(abs(off) > measured.WISHED for off in pairs)
            lines.append([f"{kind}, {of}", str(len(pairs)), str(beyond)])
    return table(["", "rows of both", "beyond 15 %"], lines)


def shm_table() -> str:
    """Engine shm: the rows that were fitted, and those of other runs."""
    lines = []
    for pattern in (plan_fit.FITTED_WITHIN, *plan_fit.TRIED_WITHIN):
        rows = measured.within_a_host(pattern)
        for file in sorted({row.file for row in rows}):
            own = [row for row in rows if row.file == file]
            for name, chosen in (
                ("smaller", [r for r in own if not r.large]),
                ("4 MiB on", [r for r in own if r.large]),
            ):
                lines.append([f"{file}, {name}", *error_cells(chosen, plan_constants.SHM)])
    return table(["", *HEADS], lines)


def rows_table(rows: list[Measured]) -> str:
    """Measured, predicted and how far off, in ms, of every row: a line for each size, a column for each contestant."""
    names = list(dict.fromkeys(row.name for row in rows))
    lines = []
    for place in dict.fromkeys((row.place, row.load.plain) for row in rows):
        here = {row.name: row for row in rows if (row.place, row.load.plain) == place}
        first = next(iter(here.values()))
        where = f"{shape_of(first)}, {rate_text(gbit(first))}, {size_text(place[1])}"
        lines.append([where, *(cell(here[name]) if name in here else "-" for name in names)])
    return table(["measured > predicted, ms", *names], lines)


def cell(row: Measured) -> str:
    """ "35.1 > 35.2 (+0 %)"; bold beyond 15 %."""
    off = measured.off(row, plan_constants.GLOO)
    text = f"{ms(row.us)} > {ms(measured.predicted_us(row, plan_constants.GLOO))} ({off:+.0%})"
    return f"**{text}**" if abs(off) > measured.WISHED else text


def ms(us: float) -> str:
    """Three digits, or all of those before the point."""
    return f"{us / 1e3:.3g}" if us < 1e6 else f"{us / 1e3:.0f}"


def printed(arguments: str) -> str:
    """A command and what it prints."""
    out = io.StringIO()
    with mock.patch.object(sys, "argv", ["dpcomm", "plan", *arguments.split()]), contextlib.redirect_stdout(out):
        command.main()
    return f"```text\n$ python -m dpcomm plan {arguments}\n{out.getvalue()}```"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
