"""report.md and its pictures, from the JSON files of report.py and rivals.py alone. It measures nothing."""

import json
from pathlib import Path
from typing import Any

from analysis import (
    CODECS,
    LEVELS,
    RIVALS,
    Document,
    Loss,
    Row,
    best_rival,
    caches_of,
    label,
    losses,
    ratios,
    rows_of,
    sizes_of,
)
from goals import outcomes, size_text
from plots import LEAST_FLOOR_BYTES, draw_contest

HEAD = """# Benchmark report

Written by `benchmarks/report.py --render` from the JSON files beside it; do not edit. How it is measured and how to
read it: [docs/benchmarks.md](../../docs/benchmarks.md). Times are medians in microseconds of the slowest rank, float32,
sum; ratios are above 1 where dpcomm is faster. Compare within a table: absolute times of a shared machine mean
little."""
KINDS = {
    "rival": "A rival is faster than dpcomm",
    "codec": "fp16 is slower than none",
    "algorithm": "Another algorithm is more than 10 % faster than auto",
}


def write_report(folder: Path) -> Path:
    """Draws a picture for each JSON file and writes report.md. Returns its path."""
    documents = read(folder)
    for document in documents.values():
        draw_contest(document, folder / f"{stem(document)}.png")
    file = folder / "report.md"
    file.write_text(report(documents))
    return file


def read(folder: Path) -> dict[tuple[str, int], Document]:
    """The documents by level and rank count; Python's first."""
    found = {}
    for level in LEVELS:
        for file in folder.glob(f"{level}-*ranks.json"):
            document = json.loads(file.read_text())
            found[level, int(document["ranks"])] = document
    return {key: found[key] for key in sorted(found)}


def stem(document: Document) -> str:
    return f"{document['benchmark']}-{document['ranks']}ranks"


def title(document: Document) -> str:
    return f"{LEVELS[document['benchmark']]}, {document['ranks']} ranks"


def report(documents: dict[tuple[str, int], Document]) -> str:
    """The whole text."""
    parts = [HEAD, "## Goals", goals_table(documents), "## Where dpcomm loses", losses_text(documents)]
    for document in documents.values():
        parts += [f"## {title(document)}", *section(document)]
    return "\n\n".join(parts) + "\n"


def goals_table(documents: dict[tuple[str, int], Document]) -> str:
    words = {True: "reached", False: "**missed**", None: "not measured"}
    lines = [
        [LEVELS[each.level], str(each.ranks), each.goal, each.measured, words[each.reached]]
        for each in outcomes(documents)
    ]
    return table(["level", "ranks", "goal", "measured", "outcome"], lines)


def losses_text(documents: dict[tuple[str, int], Document]) -> str:
    """A table for each kind of loss; largest factor first."""
    found = [loss for document in documents.values() for loss in losses(document)]
    parts = []
    for kind, heading in KINDS.items():
        of_kind = sorted((loss for loss in found if loss.kind == kind), key=lambda loss: -loss.factor)
        lines = [loss_cells(loss) for loss in of_kind]
        heads = ["level", "ranks", "size", "cache", "dpcomm", "us", "faster", "us", "factor"]
        parts += [f"### {heading}", table(heads, lines) if lines else "Nowhere in these results."]
    return "\n\n".join(parts)


def loss_cells(loss: Loss) -> list[str]:
    ours, other = us(loss.ours_us), us(loss.other_us)
    where = [LEVELS[loss.level], str(loss.ranks), size_text(loss.size_bytes), loss.cache]
    return [*where, loss.ours, ours, loss.other, other, f"{loss.factor:.2f}"]


def section(document: Document) -> list[str]:
    """One run: who was there, the picture, the tables."""
    parts = [environment_text(document["environment"]), *absence(document)]
    parts.append(f"![time, ratio and fraction of the floor against size]({stem(document)}.png)")
    for cache in caches_of(document):
        parts += [f"**{cache.capitalize()} buffers**", contest(document, cache)]
    for cache in caches_of(document):
        if algorithms := algorithm_table(document, cache):
            parts += [f"Algorithms of dpcomm, {cache}:", algorithms]
    for cache in caches_of(document):
        parts += [f"95th percentiles, {cache}:", percentiles(document, cache)]
    return parts


def environment_text(environment: dict[str, Any]) -> str:
    facts = [
        f"{environment['cpu']}, {environment['cores']} processors",
        " ".join(f"{name} {size}" for name, size in (environment.get("caches") or {}).items()),
        environment["kernel"],
        f"torch {environment['torch']}",
        environment.get("mpi", ""),
        ", ".join(f"{name}: {text}" for name, text in environment.get("versions", {}).items() if text),
        f"commit {environment['commit'][:12]}" if environment["commit"] else "",
        f"{environment['date']}, load {environment['load_average']:.1f} at start",
    ]
    return "; ".join(fact for fact in facts if fact) + "."


def absence(document: Document) -> list[str]:
    """Who did not take part, or not in all of it, and why; and what was wrong."""
    kinds = {"absent": "Absent", "failed": "**Failed**", "dropped": "Dropped"}
    lines = [
        f"- {word}: {name}: {' '.join(reason.split())}"
        for kind, word in kinds.items()
        for name, reason in document.get(kind, {}).items()
    ]
    lines += [
        f"- **Wrong**: {label(row)}, {size_text(row['size_bytes'])}, {row['cache']}: {row['wrong']} elements"
        for row in document["rows"]
        if row["wrong"]
    ]
    return ["\n".join(lines)] if lines else []


def columns(document: Document, cache: str) -> dict[str, dict[int, Row]]:
    """The contestants of the main table: each column's rows by size. Of the probes the fastest for each wire."""
    found = {"floor": rows_of(document, "floor", cache=cache)}
    found |= {name: rows_of(document, name, cache=cache) for name in RIVALS[document["benchmark"]]}
    found |= {f"probe {wire}": rows_of(document, "probe", wire, cache) for wire in ("fp32", "fp16")}
    found |= {f"dpcomm {codec}": rows_of(document, "dpcomm", f"{codec}/auto", cache) for codec in CODECS}
    return {name: rows for name, rows in found.items() if rows}


def contest(document: Document, cache: str) -> str:
    """Medians of everybody, the fastest rival, and how dpcomm compares with it, with gloo and with the floor."""
    shown = columns(document, cache)
    rival = best_rival(document, cache)
    gloo, floor = rows_of(document, "gloo", cache=cache), shown.get("floor", {})
    ours = {codec: shown[f"dpcomm {codec}"] for codec in CODECS if f"dpcomm {codec}" in shown}
    added: dict[str, dict[int, str]] = {"fastest rival": {size: label(row) for size, row in rival.items()}}
    for codec, rows in ours.items():
        added[f"{codec} / it"] = times(ratios(rival, rows))
    for codec, rows in ours.items() if gloo else []:
        added[f"{codec} / gloo"] = times(ratios(gloo, rows))
    for codec, rows in ours.items() if floor else []:
        parts = {size: value for size, value in ratios(floor, rows).items() if size >= LEAST_FLOOR_BYTES}
        added[f"{codec} of floor"] = {size: f"{value:.0%}" for size, value in parts.items()}
    lines = [
        [
            size_text(size),
            *(us(rows[size]["median_us"]) if size in rows else "-" for rows in shown.values()),
            *(texts.get(size, "-") for texts in added.values()),
        ]
        for size in sizes_of(document)
    ]
    return table(["size", *shown, *added], lines)


def times(values: dict[int, float]) -> dict[int, str]:
    return {size: f"{value:.2f}x" for size, value in values.items()}


def algorithm_table(document: Document, cache: str) -> str:
    """Medians of dpcomm's variants; empty where there is only auto."""
    variants = list(dict.fromkeys(row["variant"] for row in document["rows"] if row["contender"] == "dpcomm"))
    if all(variant.endswith("/auto") for variant in variants):
        return ""
    shown = {variant: rows_of(document, "dpcomm", variant, cache) for variant in variants}
    return cells_table(document, shown, "median_us")


def percentiles(document: Document, cache: str) -> str:
    return cells_table(document, columns(document, cache), "p95_us")


def cells_table(document: Document, shown: dict[str, dict[int, Row]], field: str) -> str:
    lines = [
        [size_text(size), *(us(rows[size][field]) if size in rows else "-" for rows in shown.values())]
        for size in sizes_of(document)
    ]
    return table(["size", *shown], lines)


def us(value: float) -> str:
    return f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def table(heads: list[str], lines: list[list[str]]) -> str:
    rows = [heads, ["---"] + ["--:"] * (len(heads) - 1), *lines]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)
