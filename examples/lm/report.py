"""The report of one or more training runs: a table, report.json and report.png. It does not know how they came."""

import dataclasses
import json
import platform
import statistics
from pathlib import Path
from typing import Any

import torch

from .training import FINAL_STEPS, Result, Settings

LEGEND = """\
step        median step time, slowest rank
exposed     what a step pays for communication: a forward and backward with it minus the same pass without it
all-reduce  the step's gradient buckets reduced with nothing else to do
wire        bytes one rank sends in a step
identical   SHA-256 of all parameters, compared over the ranks"""


def table(results: list[Result]) -> str:
    """The results as aligned text, with what each column means below."""
    heads = ["run", "final loss", "step ms", "exposed ms", "all-reduce ms", "wire MB/step", "replicas identical"]
    rows = [
        [
            r.name,
            f"{r.final_loss:.4f}",
            f"{r.step_ms:.1f}",
            f"{r.exposed_ms:.1f}",
            f"{r.allreduce_ms:.2f}",
            f"{r.wire_bytes_per_step / 1e6:.2f}",
            "yes" if r.replicas_identical else "NO",
        ]
        for r in results
    ]
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    lines = [_line(row, widths) for row in [heads, ["-" * w for w in widths], *rows]]
    sentences = comparisons(results)
    return "\n".join([*lines, *([""] if sentences else []), *sentences, "", LEGEND])


def _line(cells: list[str], widths: list[int]) -> str:
    padded = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
    return "  ".join([cells[0].ljust(widths[0]), *padded])


def comparisons(results: list[Result]) -> list[str]:
    """One sentence for each run beside the first, the baseline."""
    sentences = []
    for other in results[1:]:
        base = results[0]
        if other.losses == base.losses and other.parameters_sha256 == base.parameters_sha256:
            bits = "every loss and the final parameters equal the first run's to the last bit"
        else:
            largest = max(abs(a - b) for a, b in zip(other.losses, base.losses, strict=True))
            bits = f"losses differ from the first run's by {largest:.1e} at most"
        faster = base.allreduce_ms / other.allreduce_ms
        sentences.append(f"{other.name}: all-reduce {faster:.1f}x the speed of {base.name}; {bits}.")
    return sentences


def document(results: list[Result], settings: Settings, nranks: int, command: str) -> dict[str, Any]:
    """The content of report.json."""
    return {
        "command": command,
        "ranks": nranks,
        "settings": dataclasses.asdict(settings),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "columns": LEGEND.splitlines(),
        "runs": [dataclasses.asdict(r) for r in results],
    }


def write(results: list[Result], settings: Settings, nranks: int, command: str, folder: Path) -> list[Path]:
    """Writes report.json and report.png.

    Returns:
        The two paths.
    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    json_file, png_file = folder / "report.json", folder / "report.png"
    json_file.write_text(json.dumps(document(results, settings, nranks, command), indent=2) + "\n")
    draw(results, nranks, png_file)
    return [json_file, png_file]


def running_mean(values: list[float]) -> list[float]:
    """Each value's mean with the FINAL_STEPS - 1 before it, so that the curve ends at the final loss."""
    windows = (values[max(0, end - FINAL_STEPS) : end] for end in range(1, len(values) + 1))
    return [statistics.mean(window) for window in windows]


def draw(results: list[Result], nranks: int, png_file: Path) -> None:
    """Loss curves on top of each other; where a step's time goes, as stacked bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (curves, bars) = pyplot.subplots(1, 2, figsize=(12, 4.5), constrained_layout=True)
    for index, r in enumerate(results):
        # Broad below, narrow above: curves that coincide stay visible.
        curves.plot(running_mean(r.losses), label=r.name, linewidth=5 - 1.8 * index, alpha=0.45 + 0.2 * index)
    curves.set(title=f"Training loss, mean over ranks and {FINAL_STEPS} steps", xlabel="step", ylabel="nats per byte")
    curves.legend()

    names = [r.name for r in results]
    bottom = [0.0] * len(results)
    parts = {
        "forward + backward": [r.compute_ms for r in results],
        "exposed communication": [max(r.exposed_ms, 0.0) for r in results],
        "optimizer": [r.optimizer_ms for r in results],
    }
    for label, heights in parts.items():
        drawn = bars.bar(names, heights, bottom=bottom, label=label, width=0.55)
        bars.bar_label(drawn, fmt="%.1f", label_type="center", fontsize=9)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    bars.set(title=f"Where a step's time goes ({nranks} ranks)", ylabel="ms, median of the slowest rank")
    bars.set_ylim(0, 1.25 * max(bottom))
    bars.legend(loc="upper center", ncols=3, fontsize=9)
    figure.savefig(png_file, dpi=120)
    pyplot.close(figure)
