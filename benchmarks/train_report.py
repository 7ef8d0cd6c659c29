"""Table, Markdown and picture of training times. It knows rows of results only, not how they were measured."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

HEADS = [
    ("model", 5),
    ("ranks", 5),
    ("bucket(MB)", 10),
    ("contestant", 18),
    ("step(ms)", 9),
    ("p95(ms)", 9),
    ("samples/s", 9),
    ("speed-up", 8),
    ("compute(ms)", 11),
    ("copies(ms)", 10),
    ("exposed(ms)", 11),
    ("alone(ms)", 9),
    ("hidden", 6),
    ("loss", 9),
    ("vs stock", 9),
    ("replicas", 8),
]
LEGEND = """\
# step: median over steps of the slowest rank; speed-up: stock DDP's step over this one's; samples/s: of all ranks
# step = compute (under no_sync) + copies (what DDP's own work on its buckets adds) + exposed (communication)
# alone: the step's buckets reduced with nothing else to do; hidden: 1 - exposed/alone, below 0 where communication
# slows the rest of the step by more than overlap saves; loss: of the last step; vs stock: "bits" where all losses and
# the parameters are equal to the last bit, else a loss's largest difference; replicas: SHA-256 of all parameters"""


def cells(row: dict[str, Any]) -> list[str]:
    """One row as text, in the order of HEADS."""
    speedup, difference = row["speedup"], row["loss_difference"]
    return [
        row["model"],
        str(row["ranks"]),
        f"{row['bucket_cap_mb']:g} ({row['buckets']})",
        row["contestant"],
        f"{row['step_ms']:.2f}",
        f"{row['step_p95_ms']:.2f}",
        f"{row['samples_per_s']:.1f}",
        "-" if speedup is None else f"{speedup:.2f}",
        f"{row['compute_ms']:.2f}",
        f"{row['copies_ms']:.2f}",
        f"{row['exposed_ms']:.2f}",
        f"{row['alone_ms']:.2f}",
        share(row["hidden"]),
        f"{row['final_loss']:.5f}",
        "-" if difference is None else "bits" if row["same_bits_as_stock"] else f"{difference:.1e}",
        "equal" if row["replicas_identical"] else "DIFFER",
    ]


def share(hidden: float) -> str:
    """Per cent; outside of 0 to 100 only which side it is, since the number would say nothing more."""
    return "<0%" if hidden < 0 else ">100%" if hidden > 1 else f"{hidden:.0%}"


def header() -> str:
    """The names of the columns."""
    return "  ".join(name.rjust(width) for name, width in HEADS)


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    return "  ".join(cell.rjust(width) for cell, (_, width) in zip(cells(row), HEADS, strict=True))


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """All rows as a Markdown table."""
    lines = [[name for name, _ in HEADS], ["---"] * len(HEADS), *(cells(row) for row in rows)]
    return "\n".join("| " + " | ".join(texts) + " |" for texts in lines)


def draw(rows: Sequence[dict[str, Any]], title: str, png_file: Path) -> None:
    """Step time and samples/s against bucket size; a line of panels for each model.

    Raises:
        OSError: the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, panels = pyplot.subplots(
        len(models), 2, figsize=(12, 4.5 * len(models)), squeeze=False, constrained_layout=True
    )
    figure.suptitle(title)
    for model, (times, rates) in zip(models, panels, strict=True):
        of_model = [row for row in rows if row["model"] == model]
        caps = sorted({row["bucket_cap_mb"] for row in of_model})
        for contestant in dict.fromkeys(row["contestant"] for row in of_model):
            points = sorted(
                (r["bucket_cap_mb"], r["step_ms"], r["samples_per_s"])
                for r in of_model
                if r["contestant"] == contestant
            )
            times.plot([p[0] for p in points], [p[1] for p in points], "o-", label=contestant)
            rates.plot([p[0] for p in points], [p[2] for p in points], "o-", label=contestant)
        compute = {row["bucket_cap_mb"]: row["compute_ms"] for row in of_model}
        times.plot(caps, [compute[cap] for cap in caps], "k:", label="under no_sync()")
        times.set(title=f"{model}: step time", ylabel="ms, median of the slowest rank", ylim=(0, None))
        rates.set(title=f"{model}: samples a second", ylabel="samples/s, all ranks", ylim=(0, None))
        for panel in (times, rates):
            panel.set(xlabel="bucket size (MB)", xscale="log", xticks=caps, xticklabels=[f"{cap:g}" for cap in caps])
            panel.minorticks_off()
            panel.legend()
    figure.savefig(png_file, dpi=120)
    pyplot.close(figure)
