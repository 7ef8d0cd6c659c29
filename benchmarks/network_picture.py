"""The picture of all-reduces between hosts: time against the rate of the links. It knows rows of results only."""

from pathlib import Path
from typing import Any

import network_plan as plans
from analysis import label
from goals import MIB, size_text

Row = dict[str, Any]
PICTURE_BYTES = 25 * MIB
WIDTH, HEIGHT = 7, 5  # of a panel, in inches


def draw(rows: list[Row], png_file: Path, dtype: str = plans.FLOAT32) -> None:
    """Time of an all-reduce of 25 MiB (or the largest size there is) against the rate; a panel for each shape, those
    with several ranks a host in a row of their own. Dotted: what the line needs for the bytes sent.

    Raises:
        OSError: The file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sizes = {row["size_bytes"] for row in rows}
    size = PICTURE_BYTES if PICTURE_BYTES in sizes else max(sizes)
    shown = [row for row in rows if row["size_bytes"] == size]
    lines = lines_of_shapes(shown)
    columns = max(len(line) for line in lines)
    figsize = (WIDTH * columns, HEIGHT * len(lines))
    figure, panels = pyplot.subplots(len(lines), columns, figsize=figsize, squeeze=False, constrained_layout=True)
    figure.suptitle(
        f"All-reduce of {size_text(size)}, {dtype}, sum, between hosts; dotted: what the line needs for the bytes sent"
    )
    shaped = sorted({row["gbit"] for row in shown if row["gbit"] is not None})
    unshaped_at = 4 * max(shaped, default=1.0)  # a place of its own on a logarithmic axis
    ticks = {gbit: f"{gbit:g}" for gbit in shaped}
    ticks |= {unshaped_at: plans.UNSHAPED} if any(row["gbit"] is None for row in shown) else {}
    contestants = dict.fromkeys(label(row) for row in shown)
    colors = {each: f"C{number}" for number, each in enumerate(contestants)}  # the same in all panels
    for line, its_panels in zip(lines, panels, strict=True):
        for panel in its_panels[len(line) :]:
            panel.set_axis_off()
        for shape, panel in zip(line, its_panels, strict=False):
            fill(panel, [row for row in shown if plans.shape_of(row) == shape], unshaped_at, colors)
            panel.set(
                title=plans.shape_text(*shape), xlabel="Gb/s of each link", ylabel="ms, median of the slowest rank"
            )
            panel.set(xscale="log", yscale="log", xticks=list(ticks), xticklabels=list(ticks.values()))
            panel.minorticks_off()
            panel.legend(fontsize=8)
    figure.savefig(png_file, dpi=120)
    pyplot.close(figure)


def lines_of_shapes(rows: list[Row]) -> list[list[tuple[int, int]]]:
    """The shapes with one rank a host, and those with several; no line without any."""
    shapes = sorted({plans.shape_of(row) for row in rows})
    lines = ([shape for shape in shapes if (shape[1] > 1) == several] for several in (False, True))
    return [line for line in lines if line]


def name_of(row: Row) -> str:
    """What the legend calls a contestant: between several ranks a host dpcomm's two ways, with the codec."""
    ways = {plans.FLAT: "flat"} | ({"dpcomm": "two levels"} if plans.shape_of(row)[1] > 1 else {})
    codec, _, algorithm = row["variant"].partition("/")
    if row["contender"] not in ways or algorithm != "auto":
        return label(row)
    return f"dpcomm {codec}, {ways[row['contender']]}"


def fill(panel: Any, rows: list[Row], unshaped_at: float, colors: dict[str, str]) -> None:
    """A line for each contestant; dotted in its color what the link needs for the bytes of gloo and of dpcomm. The
    legend leaves out what begins with "_"."""
    for name in dict.fromkeys(name_of(row) for row in rows):
        own = sorted((row for row in rows if name_of(row) == name), key=lambda row: row["gbit"] or unshaped_at)
        style = "s--" if not name.startswith("dpcomm") else "^-." if name.endswith("flat") else "o-"
        rates, color = [row["gbit"] or unshaped_at for row in own], colors[label(own[0])]
        panel.plot(rates, [row["median_ms"] for row in own], style, label=name, markersize=4, color=color)
        shaped = [row for row in own if row["gbit"] is not None]
        if shaped and (name == "gloo" or name.startswith("dpcomm")):
            limits = [1e3 * plans.line_s(row["sent_bytes"], row["gbit"]) for row in shaped]
            panel.plot([row["gbit"] for row in shaped], limits, ":", color=color, label=f"_line, {name}")
