"""Table, page and goals of all-reduces between hosts. It knows rows of results only, not how they were
measured."""

import math
from collections.abc import Callable
from typing import Any

import network_plan as plans
from analysis import label
from goals import MIB, size_text
from gpu_goals import Outcome
from render import environment_text, table

Row = dict[str, Any]
Document = dict[str, Any]
HEADS = [
    ("hosts", 5),
    ("rate", 8),
    ("size", 8),
    ("contestant", 18),
    ("time(ms)", 10),
    ("p95(ms)", 10),
    ("vs gloo", 7),
    ("rounds", 11),
    ("sent(B)", 10),
    ("counted(B)", 10),
    ("of line", 7),
    ("#wrong", 6),
    ("error", 7),
    ("calls", 5),
]
LEGEND = """\
# time: median of the slowest rank; vs gloo: gloo's over this one's within a round, the median; rounds: least and most
# sent: by the busiest host in a call, as dpcomm counts it, for the others the least there is; counted: by its
# interface, with headers; of line: bits sent over the time, over the rate; error: relative L2 against fp64"""
HEAD = """# All-reduce between hosts

Written by `benchmarks/network.py` from the JSON file beside it; do not edit. How it is measured and how to read it:
[docs/benchmarks.md](../../docs/benchmarks.md#between-hosts). Hosts are network namespaces of one machine, which share
its processors; their links are shaped both ways. Tensors of {dtype}, sum."""
LARGE = 4 * MIB  # from here on the line is what counts
OVER_GLOO_SHAPED, OVER_GLOO_UNSHAPED, LEAST_LINE_SHARE, NEVER_BELOW = 1.9, 1.2, 0.93, 0.95
NEVER_SLOWER = ("none", "auto")  # codecs that promise it
TWO_LEVELS_GBIT, TWO_LEVELS_OVER_GLOO = 1.0, {"none": 1.4, "fp16": 2.8}


def header() -> str:
    """The names of the columns."""
    return "  ".join(name.rjust(width) for name, width in HEADS)


def line(row: Row) -> str:
    """One row of the table."""
    return "  ".join(cell.rjust(width) for cell, (_, width) in zip(cells(row), HEADS, strict=True))


def cells(row: Row) -> list[str]:
    """One row as text, in the order of HEADS."""
    return [
        shape_cell(row),
        plans.rate_text(row["gbit"]),
        size_text(row["size_bytes"]),
        label(row),
        f"{row['median_ms']:.2f}",
        f"{row['p95_ms']:.2f}",
        f"{row['ratio']:.2f}",
        f"{row['ratio_least']:.2f}-{row['ratio_most']:.2f}",
        f"{row['sent_bytes']:.0f}",
        f"{row['counted_bytes']:.0f}",
        "-" if row["line_share"] is None else f"{row['line_share']:.1%}",
        str(row["wrong"]),
        f"{row['error']:.1e}",
        str(row["calls"]),
    ]


def skipped_text(skipped: Row) -> str:
    """Why a size has no times."""
    return (
        f"{where(skipped)}: not measured, a call without a codec takes {skipped['line_s']:.1f} s on the line, "
        f"more than {plans.LONGEST_CALL_S:g} s"
    )


def shape_cell(row: Row) -> str:
    hosts, each = plans.shape_of(row)
    return str(hosts) if each == 1 else f"{hosts}x{each}"


def where(row: Row) -> str:
    return f"{plans.shape_text(*plans.shape_of(row))}, {plans.rate_text(row['gbit'])}, {size_text(row['size_bytes'])}"


def codec_of(row: Row) -> str:
    """Of dpcomm's rows; empty for the others."""
    return str(row["variant"]).partition("/")[0]


def markdown(document: Document) -> str:
    """The page: goals, picture, a table for each shape and rate."""
    parts = [HEAD.format(dtype=dtype_of(document)), environment_text(document["environment"])]
    for run in document.get("other_runs", ()):
        parts.append(f"Rows of {', '.join(run['shapes'])} are of another run. {environment_text(run['environment'])}")
    parts.append(goals_table(outcomes_of(document)))
    parts += [f"**Doubtful**: {text}." for text in doubtful_rows(document["rows"])]
    parts.append(f"![time of 25 MiB against the rate of the links]({document['benchmark']}.png)")
    for shape, gbit in dict.fromkeys((plans.shape_of(row), row["gbit"]) for row in document["rows"]):
        rows = [row for row in document["rows"] if (plans.shape_of(row), row["gbit"]) == (shape, gbit)]
        parts += [f"## {plans.shape_text(*shape)}, {plans.rate_text(gbit)}"]
        parts += [allowed_text(shape, dtype_of(document))] if shape[1] > 1 and gbit is not None else []
        parts.append(table([name for name, _ in HEADS[2:]], [cells(row)[2:] for row in rows]))
        skipped = [each for each in document["skipped"] if (plans.shape_of(each), each["gbit"]) == (shape, gbit)]
        parts += [skipped_text(each) + "." for each in skipped]
    return "\n\n".join(parts) + "\n"


def allowed_text(shape: tuple[int, int], dtype: str = plans.FLOAT32) -> str:
    """What no all-reduce in two levels can exceed where the line is all that counts."""
    none, fp16 = (plans.gain_at_line_rate(*shape, codec) for codec in ("none", "fp16"))
    halved = f", {fp16:.2f}x with `fp16`" if dtype == plans.FLOAT32 else ""
    return (
        f"On a line that is full two levels are at most {none:.2f}x as fast as gloo's ring with `none`{halved}: "
        "that is the quotient of the bytes that a host sends."
    )


def goals_table(found: list[Outcome]) -> str:
    words = {True: "reached", False: "**missed**", None: "not measured"}
    return table(["goal", "measured", "outcome"], [[each.goal, each.measured, words[each.reached]] for each in found])


def dtype_of(document: Document) -> str:
    return str(document.get("dtype", plans.FLOAT32))  # older documents


def outcomes_of(document: Document) -> list[Outcome]:
    """The goals of a document. Other dtypes than float32 have one: codecs make 16 bits of 32."""
    rows = document["rows"]
    return outcomes(rows) if dtype_of(document) == plans.FLOAT32 else never_slower(rows)


def outcomes(rows: list[Row]) -> list[Outcome]:
    """All goals of float32, in order."""
    fp16 = [row for row in rows if row["contender"] == "dpcomm" and codec_of(row) == "fp16"]
    fp16 = [row for row in fp16 if plans.shape_of(row) == (2, 1)]
    slow = [row for row in fp16 if row["gbit"] is not None and row["gbit"] <= 1 and row["size_bytes"] >= LARGE]
    free = [row for row in fp16 if row["gbit"] is None and row["size_bytes"] >= LARGE]
    size = size_text(LARGE)
    found = [
        least(
            f"fp16 at least {OVER_GLOO_SHAPED}x gloo from {size} on, two hosts at 1 Gb/s and below",
            slow,
            OVER_GLOO_SHAPED,
        ),
        least(
            f"fp16 uses {LEAST_LINE_SHARE:.0%} of the line from {size} on, two hosts at 1 Gb/s and below",
            slow,
            LEAST_LINE_SHARE,
            lambda row: float(row["line_share"]),
        ),
        least(
            f"fp16 at least {OVER_GLOO_UNSHAPED}x gloo from {size} on, two hosts, unshaped", free, OVER_GLOO_UNSHAPED
        ),
    ]
    found += [goal for shape in plans.SHAPES if shape[1] > 1 for goal in two_level_goals(shape, rows)]
    return found + never_slower(rows)


def never_slower(rows: list[Row]) -> list[Outcome]:
    """The goals of codecs that promise not to lose against gloo, of any dtype."""
    found: list[Outcome] = []
    codecs = dict.fromkeys(codec_of(row) for row in rows if row["contender"] == "dpcomm")
    for codec in [name for name in NEVER_SLOWER if name in codecs or name == "none"]:
        own = [row for row in rows if row["contender"] == "dpcomm" and codec_of(row) == codec]
        found.append(least(f"{codec} nowhere below {NEVER_BELOW}x gloo", own, NEVER_BELOW))
    return found


def two_level_goals(shape: tuple[int, int], rows: list[Row]) -> list[Outcome]:
    """Against gloo's flat ring. The text has what the line allows: a goal beyond it cannot be reached."""
    at_rate = [row for row in rows if (plans.shape_of(row), row["gbit"]) == (shape, TWO_LEVELS_GBIT)]
    large = [row for row in at_rate if row["contender"] == "dpcomm" and row["size_bytes"] >= LARGE]
    return [
        least(
            f"{codec} in two levels at least {bound}x gloo from {size_text(LARGE)} on, {plans.shape_text(*shape)} at "
            f"{plans.rate_text(TWO_LEVELS_GBIT)} (the line allows {plans.gain_at_line_rate(*shape, codec):.2f}x)",
            [row for row in large if codec_of(row) == codec],
            bound,
        )
        for codec, bound in TWO_LEVELS_OVER_GLOO.items()
    ]


def ratio(row: Row) -> float:
    return float(row["ratio"])


def least(goal: str, rows: list[Row], bound: float, value: Callable[[Row], float] = ratio) -> Outcome:
    """Reached where the smallest of the rows' values is at least `bound`; a value that is no number never is."""
    if not rows:
        return Outcome(goal, "", None)
    worst = min(rows, key=lambda row: -math.inf if math.isnan(value(row)) else value(row))
    below = sum(not value(row) >= bound for row in rows)
    counted = f"{below} of {len(rows)} below" if below else f"least of {len(rows)}"
    return Outcome(goal, f"{value(worst):.3f} at {where(worst)}; {counted}", below == 0)


def wrong_rows(rows: list[Row]) -> list[str]:
    """A line for each row with wrong elements."""
    return [f"{where(row)}, {label(row)}: {row['wrong']} elements were wrong" for row in rows if row["wrong"]]


def doubtful_rows(rows: list[Row]) -> list[str]:
    """A line for each large row whose bytes, as they were told, are not those that the interface counted: its share of
    the line means nothing. Headers take up to a tenth; below 1 MiB the ranks' meetings show."""
    most, least_there = 1.15, 0.99
    return [
        f"{where(row)}, {label(row)}: sent {row['sent_bytes']:.0f} bytes, but {row['counted_bytes']:.0f} were counted"
        for row in rows
        if row["size_bytes"] >= MIB and not least_there <= row["counted_bytes"] / row["sent_bytes"] <= most
    ]
