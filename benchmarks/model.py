"""Writes the tables of docs/model.md and the picture beside the other results: `python benchmarks/model.py`.

Only what lies between the page's markers is written; everything else of the page is by hand. model_costs.py computes.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

from goals import size_text
from model_costs import (
    BEST,
    CASES,
    LIKELY,
    MACHINES,
    MIB,
    WORST,
    Bar,
    Machine,
    bfloat16_us,
    direct_us,
    halves_gain,
    native_us,
    none_us,
    one_slice_bytes,
    p2p_us,
    ring_us,
    stock_us,
    us,
)
from render import table

ROOT = Path(__file__).resolve().parent.parent
PAGE, PICTURE = ROOT / "docs" / "model.md", ROOT / "benchmarks" / "results" / "model.png"
SIZES = (MIB // 16, MIB // 2, 2 * MIB, 8 * MIB, 16 * MIB, 25 * MIB, 32 * MIB, 128 * MIB, 1024 * MIB)
LARGE = 128 * MIB  # from here on a published bus bandwidth is a time
Model = Callable[[Machine, int, int], float]
CONTESTANTS: dict[str, Model] = {
    "NCCL fp32": stock_us,
    "NCCL bf16": bfloat16_us,
    "nccl none": none_us,
    "nccl native bf16": lambda m, size, case: native_us(m, size, size / 2, case),
    "nccl fp16 direct": direct_us,
    "nccl fp16 ring": ring_us,
    "p2p fp16": p2p_us,
}
LINKS = (10, 25, 50, 100, 200, 370)  # GB/s
MARKER = "<!-- {}: {} -->"


def main() -> int:
    PAGE.write_text(page(PAGE.read_text()))
    draw(PICTURE)
    print(f"wrote {PAGE.relative_to(ROOT)} and {PICTURE.relative_to(ROOT)}")
    return 0


def page(text: str) -> str:
    """The page with every block as it is computed now.

    Raises:
        ValueError: A marker is missing.
    """
    return filled(text, "model", blocks(), PAGE.name)


def filled(text: str, label: str, named: dict[str, str], page_name: str) -> str:
    """A page of docs with other contents between its markers.

    Args:
        label: what its markers begin with.
        named: contents by the name of their markers.

    Raises:
        ValueError: A marker is missing.
    """
    for name, content in named.items():
        begin, end = MARKER.format(label, name), MARKER.format(label, f"end of {name}")
        pattern = re.compile(f"{re.escape(begin)}\n.*?{re.escape(end)}", re.DOTALL)
        text, count = pattern.subn(lambda _, new=f"{begin}\n\n{content}\n\n{end}": new, text)  # type: ignore[misc]
        if count != 1:
            raise ValueError(f"docs/{page_name}: expected {begin} and {end} once")
    return text


def blocks() -> dict[str, str]:
    """By the name of its markers."""
    tables = [f"### {m.name}\n\n{times_table(m)}" for m in MACHINES]
    return {
        "assumptions": assumptions_table(),
        "times": "\n\n".join(tables),
        "ratios": ratios_table(),
        "halves": halves_table(),
        "links": links_table(),
    }


def contestants_of(m: Machine) -> dict[str, Model]:
    """Engine p2p serves one host."""
    return {name: model for name, model in CONTESTANTS.items() if name != "p2p fp16" or m.hosts == 1}


def times_table(m: Machine) -> str:
    """One machine: the likely time of each contestant, the best and the worst; and what has been published."""
    models = contestants_of(m)
    lines = [
        [
            f"modelled, {size_text(size)}",
            *(span(*(model(m, size, case) for case in CASES)) for model in models.values()),
        ]
        + [published(m, size)]
        for size in SIZES
    ]
    return table(["", *models, "NCCL fp32, published"], lines)


def span(best: float, likely: float, worst: float) -> str:
    """ "121 (109-133) us"."""
    unit, scale = ("ms", 1e3) if likely >= 1000 else ("us", 1.0)
    low, middle, high = (digits(value / scale) for value in (best, likely, worst))
    return f"{middle} ({low}-{high}) {unit}"


def digits(value: float) -> str:
    """One decimal below ten, else whole numbers: the error bars are wider."""
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}"


def published(m: Machine, size: int) -> str:
    """A published time, or what a published bus bandwidth makes of a large size."""
    for known, time_us in m.published_us:
        if known == size:
            return f"{time_us:.0f} us"
    if m.published_bus is None or size < LARGE:
        return "-"
    bus = 2 * (m.ranks - 1) / m.ranks * size
    slow, fast = (us(bus, gb_s) / 1e3 for gb_s in m.published_bus)
    return f"{fast:.3g} ms" if slow == fast else f"{fast:.3g}-{slow:.3g} ms"


def assumptions_table() -> str:
    """What is not counted."""
    lines = [
        [
            m.name,
            *(figure(bar) for bar in (m.memory, m.kernel_us, m.group_us, m.neighbour_us)),
            figure(m.peers) if m.gpus > 1 else "-",
            f"{m.nics} x {figure(m.nic)}" if m.nics else "-",
            "published times" if m.published_us else f"{figure(m.stock_us)} us, {figure(m.stock)}",
        ]
        for m in MACHINES
    ]
    heads = ["best, likely, worst", "memory GB/s", "kernel us", "exchange us", "hop us", "link GB/s", "NICs GB/s"]
    return table([*heads, "ncclAllReduce"], lines)


def figure(bar: Bar) -> str:
    return ", ".join(f"{value:g}" for value in bar)


def ratios_table() -> str:
    """NCCL's time over each contestant's, at some sizes."""
    lines = []
    for m in MACHINES:
        for size in (2 * MIB, 25 * MIB, LARGE):
            cells = []
            for name, model in CONTESTANTS.items():
                if name != "NCCL fp32":
                    cells.append(ratio(m, model, size) if name in contestants_of(m) else "-")
            lines.append([f"modelled, {m.name}, {size_text(size)}", *cells])
    return table(["NCCL fp32's time over", *(name for name in CONTESTANTS if name != "NCCL fp32")], lines)


def ratio(m: Machine, model: Model, size: int) -> str:
    """Of the likely times; and of NCCL's best over its worst, and the other way round."""
    likely = stock_us(m, size, LIKELY) / model(m, size, LIKELY)
    least = stock_us(m, size, BEST) / model(m, size, WORST)
    most = stock_us(m, size, WORST) / model(m, size, BEST)
    return f"{likely:.2f} ({least:.2f}-{most:.2f})"


def halves_table() -> str:
    """From which size on two halves would be faster than a whole."""
    lines = []
    for m in MACHINES:
        limit = one_slice_bytes(m.ranks)
        cells = [halves_from(m, case) for case in CASES]
        lines.append(
            [f"modelled, {m.name}", f"{limit / MIB:.1f} MiB", *cells, f"{halves_gain(m, limit):+.0%}"]
            + [f"{halves_gain(m, LARGE):+.0%}"]
        )
    heads = ["", "one slice up to", "pays from: best", "likely", "worst", "gain there, likely"]
    return table([*heads[:-1], "gain at that limit", f"at {size_text(LARGE)}"], lines)


def halves_from(m: Machine, case: int) -> str:
    """The least power of two, up to a GiB."""
    size = MIB
    while size <= 1024 * MIB:
        if halves_gain(m, size, case) > 0:
            return size_text(size)
        size *= 2
    return "never"


def links_table() -> str:
    """The gain of halves for the GPUs and fixed costs of the first machine, behind links of other speeds."""
    first = MACHINES[0]
    lines = []
    for speed in LINKS:
        m = first._replace(peers=Bar(speed, speed, speed))
        lines.append(
            [f"modelled, {speed} GB/s", halves_from(m, LIKELY)]
            + [f"{halves_gain(m, size):+.0%}" for size in (2 * MIB, 8 * MIB, 32 * MIB, LARGE)]
        )
    return table(["link", "pays from", "gain at 2 MiB", "8 MiB", "32 MiB", "128 MiB"], lines)


def draw(png_file: Path) -> None:
    """A panel for each machine: times over NCCL's likely one; the shade is from the best case to the worst.

    Raises:
        OSError: the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure_, places = pyplot.subplots(2, 3, figsize=(15, 9), constrained_layout=True)
    figure_.suptitle(
        "modelled, not measured: time over the likely time of NCCL's all-reduce in fp32; below 1 is faster"
    )
    *panels, last = places.flat
    for m, panel in zip(MACHINES, panels, strict=True):
        for name, model in contestants_of(m).items():
            low, middle, high = (
                [model(m, size, case) / stock_us(m, size, LIKELY) for size in SIZES] for case in (BEST, LIKELY, WORST)
            )
            (drawn,) = panel.plot([*SIZES], middle, "o-" if name.startswith(("nccl", "p2p")) else "s--", label=name)
            panel.fill_between([*SIZES], low, high, color=drawn.get_color(), alpha=0.12)
        panel.set(xlabel="bytes", xscale="log", yscale="log")
        panel.set_title(m.name, fontsize=10)
        panel.axhline(1.0, color="black", linewidth=0.8)
    last.axis("off")
    last.legend(*panels[0].get_legend_handles_labels(), loc="center")
    figure_.savefig(png_file, dpi=70)
    pyplot.close(figure_)


if __name__ == "__main__":
    sys.exit(main())
