"""How fast the fused passes of dpcomm's kernels move bytes on one GPU, beside copies and PyTorch's fp16 hook.

Each pass runs alone (csrc/cuda/passes.h): no ranks, no waits. Exit status: 0, 1 where a pass gave wrong bits, 2 where
there is no GPU. What is timed and what bytes count: gpu_passes_plan.py.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gpu_environment import describe_gpu_environment, why_no_gpu
from gpu_passes_plan import DEFAULT_CTAS, DEFAULT_SIZES, MIB, Row, measure_size, outcomes, subjects
from tqdm import tqdm

ROUNDS, QUICK_ROUNDS = 9, 3
QUICK_SIZES, QUICK_CTAS = (MIB, 25 * MIB), (8,)
HEADS = [
    ("size(B)", 10),
    ("pass", 7),
    ("codec", 6),
    ("type", 9),
    ("tensors", 8),
    ("ctas", 5),
    ("time(us)", 10),
    ("moved(B)", 11),
    ("GB/s", 8),
    ("of memcpy", 10),
    ("of copy", 8),
    ("correct", 8),
]


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--sizes", type=whole_numbers, metavar="MIB,MIB", help="tensor bytes in MiB (default: 1,25,64,256)")
    add("--ctas", type=whole_numbers, metavar="N,N", help="numbers of CTAs (default: 1,2,4,...,64 and one for each SM)")
    add("--rounds", type=int, help=f"timings of each, of which the median counts (default: {ROUNDS})")
    add("--hot", action="store_true", help="one set of buffers: small sizes stay in the L2 cache")
    add("--quick", action="store_true", help="1 and 25 MiB, few CTAs, few rounds: under a minute")
    add("--json", type=Path, metavar="FILE", help="write the rows and a description of the machine")
    add("--plot", type=Path, metavar="FILE", help="write a PNG: bandwidth against CTAs")
    arguments = parser.parse_args(argv)
    if arguments.rounds is not None and arguments.rounds < 1:
        parser.error("--rounds must be at least 1")
    return arguments


def whole_numbers(text: str) -> list[int]:
    """ "1,25" as [1, 25]."""
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}: expected whole numbers above 0, with commas between them")
    return [int(part) for part in parts]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one run measures."""

    sizes: tuple[int, ...]  # bytes
    ctas: tuple[int, ...]
    rounds: int
    hot: bool

    @property
    def timings(self) -> int:
        """How often a measurement advances."""
        return len(self.sizes) * self.rounds * len(subjects(self.ctas))


def plan_of(arguments: argparse.Namespace, multiprocessors: int) -> Plan:
    """The plan that the arguments ask for on a GPU with so many multiprocessors. Its CTAs are all resident at once."""
    sizes = tuple(mib * MIB for mib in arguments.sizes or ()) or (QUICK_SIZES if arguments.quick else DEFAULT_SIZES)
    usual = (*(QUICK_CTAS if arguments.quick else DEFAULT_CTAS), multiprocessors)
    ctas = tuple(sorted({number for number in arguments.ctas or usual if number <= multiprocessors}))
    if not ctas:
        raise SystemExit(f"gpu_kernels: this GPU has {multiprocessors} multiprocessors; ask for at most as many CTAs")
    return Plan(sizes, ctas, arguments.rounds or (QUICK_ROUNDS if arguments.quick else ROUNDS), arguments.hot)


def header(environment: dict[str, Any], plan: Plan) -> str:
    """What was measured where, and the names of the columns."""
    cache = "hot: one set of buffers" if plan.hot else "cold: buffers rotate, nothing is in the L2 cache"
    return "\n".join(
        [
            f"# {environment['gpu']}, {environment['multiprocessors']} SMs, driver {environment['driver']}, "
            f"CUDA {environment['cuda']}, torch {environment['torch']}",
            f"# each pass alone on one GPU, not a network figure; {cache}",
            "# time: median by the device's clock, launches back to back; moved: bytes that must be read and written; "
            "of memcpy, of copy: that bandwidth",
            "# over the one of cudaMemcpyAsync, and of a copy kernel with as many CTAs, in the same run",
            "  ".join(name.rjust(width) for name, width in HEADS),
        ]
    )


def line(row: Row) -> str:
    """One row of the table."""
    cells = [
        str(row.size_bytes),
        row.kind,
        row.codec,
        row.dtype,
        str(row.tensors),
        str(row.ctas) if row.ctas else "-",
        f"{row.median_us:.1f}",
        str(row.moved_bytes),
        f"{row.gb_s:.1f}",
        "-" if row.of_memcpy is None else f"{row.of_memcpy:.1%}",
        "-" if row.of_copy is None else f"{row.of_copy:.1%}",
        {True: "yes", False: "NO", None: "-"}[row.correct],
    ]
    return "  ".join(cell.rjust(width) for cell, (_, width) in zip(cells, HEADS, strict=True))


def document(environment: dict[str, Any], plan: Plan, rows: Sequence[Row]) -> dict[str, Any]:
    """What --json writes."""
    return {
        "benchmark": "gpu_kernels",
        "environment": environment,
        "plan": dataclasses.asdict(plan),
        "rows": [dataclasses.asdict(row) for row in rows],
        "goals": [dataclasses.asdict(outcome) for outcome in outcomes(rows)],
    }


def draw(rows: Sequence[Row], gpu: str, png_file: Path) -> None:
    """A panel for each size: bandwidth of each pass of float32, one tensor, against CTAs.

    Raises:
        OSError: the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sizes = sorted({row.size_bytes for row in rows})
    figure, panels = pyplot.subplots(
        1, len(sizes), figsize=(5 * len(sizes), 4.5), squeeze=False, constrained_layout=True
    )
    figure.suptitle(f"Passes alone on one {gpu}, float32; not a network figure")
    for size, panel in zip(sizes, panels[0], strict=True):
        here = [row for row in rows if row.size_bytes == size and row.dtype == "float32" and row.tensors == 1]
        for kind, codec in dict.fromkeys((row.kind, row.codec) for row in here if row.ctas and row.kind != "empty"):
            points = sorted((row.ctas, row.gb_s) for row in here if (row.kind, row.codec) == (kind, codec))
            style = "k:" if kind == "copy" else "o-" if codec == "none" else "s--"
            name = "copy kernel" if kind == "copy" else f"{kind} {codec}"
            panel.plot([x for x, _ in points], [y for _, y in points], style, label=name, markersize=4)
        for row in here:
            if row.kind == "memcpy":
                panel.axhline(row.gb_s, color="black", linewidth=0.8, label="cudaMemcpyAsync")
        panel.set(
            title=f"{size / MIB:g} MiB", xlabel="CTAs", ylabel="GB/s, read and written", xscale="log", yscale="log"
        )
        panel.legend(fontsize=7)
    png_file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png_file, dpi=120)
    pyplot.close(figure)


def measure(plan: Plan, done: Callable[[list[Row], list[Row]], object]) -> list[Row]:
    """All rows. done(new, all): told of them after each size, so that little is lost where time runs out."""
    from gpu_passes_device import Passes

    rows: list[Row] = []
    with tqdm(total=plan.timings, unit="timing", leave=False, disable=None) as bar:
        for size in plan.sizes:
            bar.set_description(f"{size / MIB:g} MiB")
            device = Passes(size, list(plan.ctas), plan.hot)
            new = measure_size(size, plan.ctas, plan.rounds, device.time, device.correct, bar.update)
            rows += new
            done(new, rows)
    return rows


def main(argv: Sequence[str]) -> int:
    arguments = parse_arguments(argv)
    if reason := why_no_gpu():
        print(f"gpu_kernels: there is no GPU to measure on here ({reason}).", file=sys.stderr)
        return 2
    environment = describe_gpu_environment()
    plan = plan_of(arguments, environment["multiprocessors"])
    print(header(environment, plan), flush=True)

    def show(new: list[Row], rows: list[Row]) -> None:
        tqdm.write("\n".join(map(line, new)), file=sys.stdout)
        if arguments.json is not None:
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            arguments.json.write_text(json.dumps(document(environment, plan, rows), indent=2) + "\n")

    rows = measure(plan, show)
    for outcome in outcomes(rows):
        print(f"# {outcome}")
    if arguments.json is not None:
        print(f"wrote {arguments.json}")
    if arguments.plot is not None:
        draw(rows, environment["gpu"], arguments.plot)
        print(f"wrote {arguments.plot}")
    wrong = sum(row.correct is False for row in rows)
    if wrong:
        print(f"{wrong} passes gave other bits than the reference", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
