"""What `python -m dpcomm info --group` found out, and how it reads: for up to 64 ranks, without asking anything."""

from __future__ import annotations

import textwrap
from dataclasses import asdict, dataclass, field
from typing import Any

from dpcomm.chosen import spans

OWN, SHARED, NETWORK = "own", "shared memory", "network"
# How data gets from rank to rank: one letter a link. "ipc" and "plain pointer" are engine p2p's words.
LETTERS = {
    OWN: "-",
    SHARED: "S",
    "ipc": "P",
    "plain pointer": "P",
    "pinned host memory": "H",
    NETWORK: "N",
}
MEANINGS = {
    "S": "shared memory",
    "P": "memory of the other GPU",
    "H": "pinned host memory",
    "N": "network",
    "?": "otherwise, see the table",
}
NO_VERSION = "none"
WIDTH = 120
BLOCK = 8  # columns of the matrix between two spaces


@dataclass(frozen=True)
class Rank:
    """What a rank says of itself.

    Attributes:
        device: "cpu", or name and PCI address of its GPU.
        processors: It may run on.
        versions: Of dpcomm, torch and NCCL.
        refuses: Engines that it cannot use, and why.
        how: By rank: how data gets there, of LETTERS; empty where no communicator was made.
    """

    rank: int
    host: str
    pid: int
    device: str
    processors: list[int]
    versions: dict[str, str]
    refuses: dict[str, str]
    how: list[str] = field(default_factory=list)

    def reaches(self) -> str:
        """Which ranks how, in words."""
        ranks: dict[str, list[int]] = {}
        for rank, how in enumerate(self.how):
            if rank != self.rank:
                ranks.setdefault(how, []).append(rank)
        near_first = sorted(ranks.items(), key=lambda item: item[0] == NETWORK)
        return "; ".join(f"{how}: {spans(those)}" for how, those in near_first)


@dataclass
class Report:
    """A group of ranks.

    Attributes:
        nranks: How many there should be.
        device: "cpu" or "cuda": what the communicator was made for.
        ranks: All of them, once all have come.
        hosts: Ranks that share one, as proven; empty where it came not to that.
        engine, why: The choice, as `describe()` has it.
        said: The line that the communicator logged.
        check: What the all-reduce showed.
        engines: By name: in use, usable or why not.
        notes: What else was noticed.
        error: code and message; None where all went well.
    """

    nranks: int
    device: str = ""
    ranks: list[Rank] = field(default_factory=list)
    hosts: list[list[int]] = field(default_factory=list)
    engine: str = ""
    why: str = ""
    said: str = ""
    check: str = ""
    engines: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    error: dict[str, str] | None = None

    def labels(self) -> list[str]:
        """By rank: its host's name; hosts of one name get numbers."""
        names = [rank.host for rank in self.ranks]
        for name in set(names):
            those = [host for host in self.hosts if names[host[0]] == name]
            for number, host in enumerate(those if len(those) > 1 else [], 1):
                for rank in host:
                    names[rank] = f"{name}/{number}"
        return names

    def links(self) -> list[str]:
        """The matrix: a text for each rank, a letter for each peer."""
        return ["".join(LETTERS.get(how, "?") for how in rank.how) for rank in self.ranks if rank.how]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        links = self.links()
        return {**asdict(self), "links": links, "legend": _legend(links)}


def text(report: Report) -> str:
    """The whole page, without the error."""
    notes = [_wrapped(f"note: {note}") for note in report.notes]
    parts = [_heading(report), _table(report), _matrix(report), _choice(report), *notes]
    return "\n\n".join(part for part in parts if part)


def _heading(report: Report) -> str:
    if not report.ranks:
        return ""
    where = f" on {_count(len(report.hosts), 'host')}" if report.hosts else ""
    same, different = [], []
    for what in report.ranks[0].versions:
        found: dict[str, list[int]] = {}
        for rank in report.ranks:
            found.setdefault(rank.versions.get(what, NO_VERSION), []).append(rank.rank)
        if len(found) == 1:
            same.append(f"{what} {next(iter(found))}")
        else:
            texts = [f"{version} on ranks {spans(ranks)}" for version, ranks in found.items()]
            different.append(f"{what} differs: {'; '.join(texts)}")
    return "\n".join(
        [f"{_count(report.nranks, 'rank')}{where}, data on {report.device}; {', '.join(same)}", *different]
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def _table(report: Report) -> str:
    if not report.ranks:
        return ""
    rows = [["rank", "host", "pid", "device", "processors", "reaches"]]
    for rank, label in zip(report.ranks, report.labels(), strict=True):
        rows.append(
            [str(rank.rank), label, str(rank.pid), rank.device, _processors(rank.processors), rank.reaches() or "-"]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    right = (0, 2)
    lines = []
    for row in rows:
        cells = [c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _processors(numbers: list[int]) -> str:
    """ "8 (0-7)"; which ones is left out where it takes more room than a column has."""
    which = spans(numbers)
    return f"{len(numbers)} ({which})" if len(which) <= 16 else f"{len(numbers)} ({numbers[0]} .. {numbers[-1]})"


def _matrix(report: Report) -> str:
    """One letter a link; the number of the column is read downwards."""
    links = report.links()
    if not links:
        return ""
    digits = len(str(report.nranks - 1))
    margin = len("rank ") + digits + 2
    columns = [str(rank).rjust(digits) for rank in range(report.nranks)]
    lines = ["links, from the rank at the left to the one above: what was tried and works"]
    lines += [" " * margin + _blocks("".join(column[digit] for column in columns)) for digit in range(digits)]
    lines += [f"rank {rank:>{digits}}  {_blocks(row)}" for rank, row in enumerate(links)]
    lines.append("; ".join(f"{letter}: {meaning}" for letter, meaning in _legend(links).items()))
    return "\n".join(line.rstrip() for line in lines)


def _blocks(row: str) -> str:
    return " ".join(row[at : at + BLOCK] for at in range(0, len(row), BLOCK))


def _legend(links: list[str]) -> dict[str, str]:
    """The letters that occur."""
    found = set("".join(links))
    return {letter: meaning for letter, meaning in MEANINGS.items() if letter in found}


def _choice(report: Report) -> str:
    lines = []
    if report.engine:
        lines.append(_wrapped(f"choice: {report.said or f'engine {report.engine}: {report.why}'}"))
        lines.append(f"tried: {report.check}")
    if report.engines:
        lines.append("engines:")
        width = max(map(len, report.engines))
        lines += [_wrapped(f"  {name:<{width}}  {v}", " " * (width + 4)) for name, v in report.engines.items()]
    return "\n".join(lines)


def _wrapped(line: str, indent: str = "  ") -> str:
    return textwrap.fill(line, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
