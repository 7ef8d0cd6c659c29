"""Draws docs/step.svg, the picture of one training step: `python docs/pictures.py`. Needs nothing but Python.

A schematic: lengths are chosen to be readable, they come from no measurement.
"""

from __future__ import annotations

from pathlib import Path

FILE = Path(__file__).with_name("step.svg")
WIDTH, HEIGHT = 960, 470
LEFT, BAR = 190, 34
INK, SOFT = "#1f2933", "#7b8794"
FORWARD, BACKWARD, OPTIMIZER, WORK, IDLE = "#cbd2d9", "#9fc5e8", "#b6d7a8", "#f9cb9c", "#eef1f4"

# Backward from x to x, gradients of the last layers first; a bucket is full at the end of its piece.
FORWARD_SPAN = (190, 330)
PIECES = [(330, 430), (430, 530), (530, 630), (630, 730)]
REDUCTIONS = [(440, 520), (540, 620), (640, 720), (740, 820)]
OPTIMIZER_SPAN = (832, 930)


def box(x: int, y: int, width: int, height: int, fill: str, text: str = "") -> str:
    """A bar with a centred label."""
    bar = f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="3" fill="{fill}" stroke="{INK}"/>'
    return bar + (label(x + width // 2, y + height // 2 + 4, text, "middle") if text else "")


def label(
    x: int, y: int, text: str, anchor: str = "start", size: int = 13, colour: str = INK, weight: int = 400
) -> str:
    """One line of text."""
    return (
        f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="{size}" fill="{colour}" '
        f'font-weight="{weight}">{text}</text>'
    )


def arrow(x1: int, y1: int, x2: int, y2: int, both: bool = False) -> str:
    """A line with a head at its end, or at both."""
    start = ' marker-start="url(#head)"' if both else ""
    return f'<path d="M{x1} {y1} L{x2} {y2}" fill="none" stroke="{INK}"{start} marker-end="url(#head)"/>'


def rank(number: int, main_y: int, worker_y: int) -> list[str]:
    """The two threads of one rank."""
    top = min(main_y, worker_y)
    parts = [label(18, top + BAR + 16, f"rank {number}", size=16, weight=700)]
    for y, name in ((main_y, "Python"), (worker_y, "dpcomm's thread")):
        parts.append(label(LEFT - 12, y + BAR // 2 + 4, name, "end"))
        parts.append(f'<rect x="{LEFT}" y="{y}" width="{OPTIMIZER_SPAN[1] - LEFT}" height="{BAR}" fill="{IDLE}"/>')
    parts.append(box(FORWARD_SPAN[0], main_y, FORWARD_SPAN[1] - FORWARD_SPAN[0], BAR, FORWARD, "forward"))
    down = worker_y > main_y
    for index, (begin, end) in enumerate(PIECES):
        parts.append(box(begin, main_y, end - begin, BAR, BACKWARD, f"backward {index}"))
        target, source = (worker_y, main_y + BAR) if down else (worker_y + BAR, main_y)
        parts.append(arrow(end, source, end + 10, target))
    parts += [
        box(begin, worker_y, end - begin, BAR, WORK, f"reduce {index}") for index, (begin, end) in enumerate(REDUCTIONS)
    ]
    begin, end = OPTIMIZER_SPAN
    source, target = (worker_y, main_y + BAR) if down else (worker_y + BAR, main_y)
    parts.append(arrow(REDUCTIONS[-1][1], source, begin, target))
    parts.append(box(begin, main_y, end - begin, BAR, OPTIMIZER, "optimizer"))
    return parts


def picture() -> str:
    """The whole SVG."""
    parts = [
        label(18, 30, "One training step on two ranks", size=17, weight=700),
        label(LEFT, 52, "a bucket of gradients is full: the hook hands it over, backward goes on", colour=SOFT),
        *rank(0, 66, 130),
        *rank(1, 292, 228),
    ]
    # Between the two ranks: one memory.
    parts.append(box(LEFT, 186, OPTIMIZER_SPAN[1] - LEFT, 20, "#ffffff"))
    parts.append(label(LEFT + 10, 200, "shared memory: slots and flags", size=13, colour=SOFT))
    for begin, end in REDUCTIONS:
        middle = (begin + end) // 2
        parts += [arrow(middle, 165, middle, 185, both=True), arrow(middle, 207, middle, 227, both=True)]
    parts.append(label(LEFT, 360, "reduce = three phases, pipelined slice by slice, on both ranks at once:"))
    phases = {
        "give": "my values of the chunk that you own, encoded into a slot",
        "reduce": "decode everyone's values of my chunk, add in rank order, divide by N, encode once",
        "take": "the finished bytes of your chunk, decoded in place into the bucket: the same on every rank",
    }
    for row, (phase, text) in enumerate(phases.items(), start=1):
        parts.append(label(LEFT + 12, 360 + 24 * row, phase))
        parts.append(label(LEFT + 74, 360 + 24 * row, text, colour=SOFT))
    parts.append(label(WIDTH - 30, HEIGHT - 12, "time; not to scale", "end", colour=SOFT))
    parts.append(arrow(LEFT, HEIGHT - 16, WIDTH - 150, HEIGHT - 16))
    head = (
        '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        f'orient="auto-start-reverse"><path d="M0 0 L8 4 L0 8 z" fill="{INK}"/></marker>'
    )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
            f'height="{HEIGHT}" font-family="Helvetica, Arial, sans-serif" xml:space="preserve">',
            "<title>One training step: backward fills buckets while dpcomm reduces the earlier ones</title>",
            f"<defs>{head}</defs>",
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
            *parts,
            "</svg>",
            "",
        ]
    )


if __name__ == "__main__":
    FILE.write_text(picture())
