"""`make bench-smoke`: is this build about as fast as the committed results say? Information, never a verdict.

Two ranks, a few sizes, hot buffers, under a minute. The ratio to gloo stands beside the committed one, since absolute
times of two machines, or of one at two times, cannot be compared. Exit status: 0, 1 where a result was wrong, 2 where
it could not run. How fast anything was does not change it.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from analysis import CODECS, Document, ratios, rows_of
from goals import size_text
from launch import LaunchError
from render import read
from report import RESULTS, measure, parse_arguments, plan_of, wrong_rows

SIZES = "4K,64K,1M,25M"
CONTESTANTS = "gloo,dpcomm:none/auto,dpcomm:fp16/auto"
HEADS = ["size", "codec", "us", "gloo us", "ratio", "committed", "now / committed"]


def table(now: Document, committed: Document | None) -> str:
    """A line for each size and codec."""
    lines = [HEADS]
    for codec in CODECS:
        ours, gloo = rows_of(now, "dpcomm", f"{codec}/auto"), rows_of(now, "gloo")
        before = ratios(rows_of(committed, "gloo"), rows_of(committed, "dpcomm", f"{codec}/auto")) if committed else {}
        for size, ratio in ratios(gloo, ours).items():
            cells = [size_text(size), codec, f"{ours[size]['median_us']:.1f}", f"{gloo[size]['median_us']:.1f}"]
            known = [f"{before[size]:.2f}", f"{ratio / before[size]:.2f}"] if size in before else ["-", "-"]
            lines.append([*cells, f"{ratio:.2f}", *known])
    widths = [max(len(cells[column]) for cells in lines) for column in range(len(HEADS))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)) for cells in lines)


def smoke_plan(sizes: str, seconds_per_size: float, corrupt: str | None) -> dict[str, Any]:
    arguments = ["--ranks", "2", "--sizes", sizes, "--contestants", CONTESTANTS]
    arguments += ["--seconds-per-size", str(seconds_per_size), *(["--corrupt", corrupt] if corrupt else [])]
    return plan_of(parse_arguments(arguments), 2, {}) | {"caches": ["hot"]}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", default=SIZES, help=f"bytes, with commas (default: {SIZES})")
    parser.add_argument("--seconds-per-size", type=float, default=5.0, help="for all contestants (default: 5)")
    parser.add_argument("--committed", type=Path, default=RESULTS, metavar="FOLDER", help="results to stand beside")
    parser.add_argument("--corrupt", metavar="NAME", help=argparse.SUPPRESS)  # must be noticed
    arguments = parser.parse_args(argv)
    try:
        now = measure(smoke_plan(arguments.sizes, arguments.seconds_per_size, arguments.corrupt), {})
    except LaunchError as error:
        print(error, file=sys.stderr)
        return 2
    print(table(now, read(arguments.committed).get(("python", 2))))
    print("Ratios to gloo, as information: they vary by half and more between machines and runs.")
    wrong = wrong_rows([now])
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
