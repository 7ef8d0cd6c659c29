"""The picture of `python -m dpcomm plan --plot FILE`: time against the number of ranks, up to 1024."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from dpcomm import _native
from dpcomm.errors import ArgumentError
from dpcomm.plan.predict import Row, predict
from dpcomm.plan.question import MOST_RANKS, Question, check

Lines = dict[tuple[str, str, str], list[tuple[int, Row]]]


def questions(q: Question) -> list[Question]:
    """The same with 2, 4, 8 ... hosts; of one host, with 2, 4, 8 ... ranks. Up to MOST_RANKS ranks."""
    found, number = [], 2
    while number * (1 if q.hosts == 1 else q.ranks_per_host) <= MOST_RANKS:
        more = dataclasses.replace
        found.append(more(q, ranks_per_host=number) if q.hosts == 1 else more(q, hosts=number))
        number *= 2
    return found


def lines(q: Question) -> Lines:
    """For each engine, algorithm and codec: ranks and prediction. Without oneshot, which is for small calls.

    Raises:
        ArgumentError: The question does not make sense.
    """
    check(q)
    found: Lines = {}
    for each in questions(q):
        for row in predict(each):
            if row.algorithm != "oneshot":
                found.setdefault((row.engine, row.algorithm, row.codec), []).append((each.nranks, row))
    return found


def draw(q: Question, png_file: Path) -> None:
    """Writes the picture. Codec none is dashed.

    Raises:
        ArgumentError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ArgumentError("--plot needs matplotlib: pip install matplotlib.") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panel = pyplot.subplots(figsize=(10, 6), constrained_layout=True)
    colors: dict[tuple[str, str], str] = {}
    for (engine, algorithm, codec), points in lines(q).items():
        color = colors.setdefault((engine, algorithm), f"C{len(colors)}")
        xs, rows = [nranks for nranks, _ in points], [row for _, row in points]
        style = "--" if codec == "none" else "o-"
        label = f"{engine} {algorithm} {codec}"
        width = max(1.0, 4.5 - int(color[1:]))  # wide ones lie below, and show where two agree
        panel.plot(xs, [row.seconds for row in rows], style, color=color, label=label, markersize=4, linewidth=width)
        panel.fill_between(xs, [row.best_s for row in rows], [row.worst_s for row in rows], color=color, alpha=0.08)
    where = "one host" if q.hosts == 1 else f"{q.ranks_per_host} rank{'s' * (q.ranks_per_host > 1)} a host"
    panel.set(title=f"Predicted, not measured: {q.elems} elements of {q.dtype} on {q.device}, {where}")
    panel.set(xlabel="ranks", ylabel="seconds", xscale="log", yscale="log")
    panel.set_xscale("log", base=2)
    ticks = [each.nranks for each in questions(q)]
    panel.set_xticks(ticks, labels=[str(tick) for tick in ticks])
    panel.axvline(_native.MAX_RANKS, color="grey", linewidth=0.8)
    panel.text(_native.MAX_RANKS, panel.get_ylim()[0], " the most that dpcomm serves", fontsize=8, va="bottom")
    panel.legend(fontsize=8)
    try:
        figure.savefig(png_file, dpi=80)
    except OSError as error:
        raise ArgumentError(f"--plot {png_file}: {error.strerror or error}.") from error
    finally:
        pyplot.close(figure)
