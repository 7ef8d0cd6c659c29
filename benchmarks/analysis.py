"""What follows from rows of results: who is fastest, by how much, and where dpcomm loses. It measures nothing.

A document is the content of a JSON file of report.py ("python") or rivals.py ("rivals"): rows of contender, variant,
size_bytes, cache, median_us and so on.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

Row = dict[str, Any]
Document = dict[str, Any]
RIVALS = {"python": ("gloo", "openmpi", "fp16_compress_hook"), "rivals": ("openmpi", "mpich", "oneccl")}
LEVELS = {"python": "Python", "rivals": "C++"}
CODECS = ("none", "fp16")
AUTO_MARGIN = 1.10  # another algorithm has to be this much faster to be a loss of auto: less is noise


class Loss(NamedTuple):
    """Somewhere dpcomm is slower than it should be."""

    level: str
    ranks: int
    cache: str
    size_bytes: int
    kind: str
    ours: str
    ours_us: float
    other: str
    other_us: float

    @property
    def factor(self) -> float:
        return self.ours_us / self.other_us


def label(row: Row) -> str:
    """The name of a row's contestant: "gloo", "dpcomm none/auto"."""
    plain = row["variant"] in ("", "default", "copy")
    return row["contender"] if plain else f"{row['contender']} {row['variant']}"


def rows_of(document: Document, contender: str, variant: str = "", cache: str = "hot") -> dict[int, Row]:
    """By size, the fastest row of a contender whose variant begins with `variant`."""
    found: dict[int, Row] = {}
    for row in document["rows"]:
        if (row["contender"], row["cache"]) == (contender, cache) and row["variant"].startswith(variant):
            size = row["size_bytes"]
            found[size] = faster(found.get(size), row)
    return found


def faster(one: Row | None, other: Row) -> Row:
    return other if one is None or other["median_us"] < one["median_us"] else one


def best_of(document: Document, names: Iterable[str], cache: str = "hot") -> dict[int, Row]:
    """By size, the fastest row of several contenders."""
    best: dict[int, Row] = {}
    for name in names:
        for size, row in rows_of(document, name, cache=cache).items():
            best[size] = faster(best.get(size), row)
    return best


def best_rival(document: Document, cache: str = "hot") -> dict[int, Row]:
    return best_of(document, RIVALS[document["benchmark"]], cache)


def ratios(others: dict[int, Row], ours: dict[int, Row]) -> dict[int, float]:
    """Their median over ours, at sizes that both have: above 1 where ours is faster."""
    return {size: others[size]["median_us"] / row["median_us"] for size, row in ours.items() if size in others}


def sizes_of(document: Document) -> list[int]:
    return sorted({row["size_bytes"] for row in document["rows"]})


def caches_of(document: Document) -> list[str]:
    return list(dict.fromkeys(row["cache"] for row in document["rows"]))


def losses(document: Document) -> list[Loss]:
    """Where a rival is faster than dpcomm's auto, fp16 slower than none, or another algorithm faster than auto."""
    found = []
    for cache in caches_of(document):
        autos = {codec: rows_of(document, "dpcomm", f"{codec}/auto", cache) for codec in CODECS}
        for codec, ours in autos.items():
            for name in RIVALS[document["benchmark"]]:
                found += _slower(document, "rival", ours, rows_of(document, name, cache=cache))
            best = rows_of(document, "dpcomm", f"{codec}/", cache)
            found += _slower(document, "algorithm", ours, best, AUTO_MARGIN)
        found += _slower(document, "codec", autos["fp16"], autos["none"])
    return found


def _slower(
    document: Document, kind: str, ours: dict[int, Row], others: dict[int, Row], margin: float = 1.0
) -> list[Loss]:
    return [
        Loss(
            level=document["benchmark"],
            ranks=document["ranks"],
            cache=row["cache"],
            size_bytes=size,
            kind=kind,
            ours=label(row),
            ours_us=row["median_us"],
            other=label(others[size]),
            other_us=others[size]["median_us"],
        )
        for size, row in ours.items()
        if size in others and row["median_us"] > others[size]["median_us"] * margin
    ]
