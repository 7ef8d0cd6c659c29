"""Pictures of benchmark results. It knows rows of results only, not how they were measured."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from analysis import LEVELS, Document, best_rival, caches_of, label, ratios, rows_of

LEAST_FLOOR_BYTES = 1 << 20  # below, a call costs more than the bytes it moves


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


def draw_curves(curves: dict[str, dict[int, float]], title: str, ylabel: str, png_file: Path) -> None:
    """A line for each name against bytes, on logarithmic axes.

    Raises:
        OSError: the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panel = pyplot.subplots(figsize=(9, 5.5), constrained_layout=True)
    for name, points in curves.items():
        _line(panel, points, "o-" if name.startswith("dpcomm") else "s--", name)
    panel.set(xlabel="bytes", ylabel=ylabel, xscale="log", yscale="log")
    panel.set_title(title, wrap=True, fontsize=9)
    if panel.lines:
        panel.legend(fontsize=7)
    figure.savefig(png_file, dpi=100)
    pyplot.close(figure)


def draw_contest(document: Document, png_file: Path) -> None:
    """A line of panels for each state of the cache: times, ratios against a rival, fractions of the floor.

    Raises:
        OSError: the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    caches = caches_of(document)
    figure, panels = pyplot.subplots(
        len(caches), 3, figsize=(18, 4.8 * len(caches)), squeeze=False, constrained_layout=True
    )
    figure.suptitle(f"All-reduce, {LEVELS[document['benchmark']]}, {document['ranks']} ranks, float32, sum")
    for cache, (times, versus, fractions) in zip(caches, panels, strict=True):
        if document["benchmark"] == "python":
            reference, name = rows_of(document, "gloo", cache=cache), "gloo"
        else:
            reference, name = best_rival(document, cache), "the fastest rival"
        floor = rows_of(document, "floor", cache=cache)
        shown = dict.fromkeys(label(row) for row in document["rows"] if row["contender"] != "probe")
        for contestant in shown:
            rows = {r["size_bytes"]: r for r in document["rows"] if label(r) == contestant and r["cache"] == cache}
            style = "o-" if contestant.startswith("dpcomm") else "k:" if contestant == "floor" else "s--"
            _line(times, {size: row["median_us"] for size, row in rows.items()}, style, contestant)
            if contestant != "floor":
                _line(versus, ratios(reference, rows), style, contestant)
                large = {size: value for size, value in ratios(floor, rows).items() if size >= LEAST_FLOOR_BYTES}
                _line(fractions, large, style, contestant)
        versus.axhline(1.0, color="black", linewidth=0.8)
        times.set(title=f"{cache}: median of the slowest rank", ylabel="us", yscale="log")
        versus.set(title=f"{cache}: time of {name} / own time", ylabel="ratio", yscale="log")
        fractions.set(title=f"{cache}: time of a copy by all ranks / own time", ylabel="fraction of the floor")
        for panel in (times, versus, fractions):
            panel.set(xlabel="bytes", xscale="log")
            if panel.lines:
                panel.legend(fontsize=7)
    figure.savefig(png_file, dpi=100)
    pyplot.close(figure)


def _line(panel: Any, points: dict[int, float], style: str, name: str) -> None:
    if points:
        sizes = sorted(points)
        panel.plot(sizes, [points[size] for size in sizes], style, label=name, markersize=4)
