"""Pictures of benchmark results. It knows rows of results only, not how they were measured."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def draw_allreduce(rows: Sequence[dict[str, Any]], title: str, png_file: Path) -> None:
    """Time against size on logarithmic axes; beside it, where gloo was measured, its time over dpcomm's.

    Raises:
        OSError: the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    compared = any(row["gloo_median_us"] is not None for row in rows)
    figure, panels = pyplot.subplots(
        1, 2 if compared else 1, figsize=(12 if compared else 6, 4.5), squeeze=False, constrained_layout=True
    )
    times = panels[0][0]
    series = {
        codec: [row for row in rows if row["codec"] == codec] for codec in dict.fromkeys(r["codec"] for r in rows)
    }
    for codec, points in series.items():
        times.plot([p["size_bytes"] for p in points], [p["median_us"] for p in points], "o-", label=f"dpcomm {codec}")
    if compared:
        points = next(iter(series.values()))
        times.plot([p["size_bytes"] for p in points], [p["gloo_median_us"] for p in points], "s--", label="gloo")
        ratios = panels[0][1]
        for codec, points in series.items():
            ratios.plot([p["size_bytes"] for p in points], [p["ratio"] for p in points], "o-", label=f"dpcomm {codec}")
        ratios.axhline(1.0, color="black", linewidth=0.8)
        ratios.set(
            title="Speed-up over gloo", xlabel="bytes", ylabel="gloo's time / dpcomm's", xscale="log", yscale="log"
        )
        ratios.legend()
    times.set(title=title, xlabel="bytes", ylabel="us, median of the slowest rank", xscale="log", yscale="log")
    times.legend()
    figure.savefig(png_file, dpi=120)
    pyplot.close(figure)
