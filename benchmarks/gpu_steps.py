"""Steps under one time budget, for gpu_check.py: what a step may take, commands with a deadline, the table."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OK, FAILED, OUT_OF_TIME, REFUSED, NOT_RUN = "ok", "failed", "out of time", "refused", "not run"
GOOD = (OK, REFUSED)  # what the environment refuses is no failure of dpcomm
INTERRUPT_GRACE_S = 5.0  # pytest ends its rank processes when it is interrupted, not when it is killed
HEADS = (("step", -10), ("outcome", -12), ("seconds", 8), ("remark", 0))


@dataclass(frozen=True)
class Share:
    """What a step gets of the budget, in parts of the whole.

    Attributes:
        most: It is ended after this part.
        least: What earlier steps leave for it.
    """

    most: float
    least: float


@dataclass(frozen=True)
class Result:
    """What became of a step. `data` goes into the report."""

    outcome: str
    remark: str = ""
    seconds: float = 0.0
    data: Any = field(default=None, compare=False)


@dataclass(frozen=True)
class Done:
    """A command that has ended; status None: it was ended at its deadline."""

    status: int | None
    seconds: float
    output: str

    @property
    def outcome(self) -> str:
        return OUT_OF_TIME if self.status is None else OK if self.status == 0 else FAILED


class Budget:
    """Seconds for all steps together, from its construction on."""

    def __init__(self, total_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.total_s, self._clock, self._start = total_s, clock, clock()

    def left_s(self) -> float:
        return self.total_s - (self._clock() - self._start)

    def seconds(self, share: Share, later: Sequence[Share]) -> float:
        """What a step may take now, so that later ones get their least; 0 where nothing is left."""
        reserved = sum(other.least for other in later) * self.total_s
        return max(0.0, min(share.most * self.total_s, self.left_s() - reserved))


def call(command: Sequence[str], deadline_s: float, log: Path, env: Mapping[str, str] | None = None) -> Done:
    """Runs a command in the repository, its output appended to the log; ends it, and its children, at the deadline."""
    began = time.monotonic()
    with log.open("ab") as out:
        start = out.tell()
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(env or {})},
            start_new_session=True,
        )
        status = _wait(process, deadline_s)
    with log.open("rb") as whole:
        whole.seek(start)
        output = whole.read().decode(errors="replace")
    return Done(status, time.monotonic() - began, output)


def _wait(process: subprocess.Popen[bytes], deadline_s: float) -> int | None:
    try:
        return process.wait(deadline_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)
    try:
        process.wait(INTERRUPT_GRACE_S)
    except subprocess.TimeoutExpired:
        strangers = _descendants(process.pid)
        os.killpg(process.pid, signal.SIGKILL)
        for pid in strangers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
    return None


def _descendants(pid: int) -> list[int]:
    """Of a process; also those with a group of their own, as torchrun gives its workers."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            parent = int(stat.read_text().rpartition(")")[2].split()[1])  # behind the name, which may hold anything
            children.setdefault(parent, []).append(int(stat.parent.name))
    found = [pid]
    for one in found:  # grows on the way
        found += children.get(one, [])
    return found[1:]


def tail(text: str, characters: int = 3000) -> str:
    """The end of an output, where the cause usually stands."""
    return text if len(text) <= characters else "..." + text[-characters:]


def last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no output")


def table(results: Mapping[str, Result]) -> list[str]:
    """One line a step, under a head."""
    rows = [tuple(name for name, _ in HEADS)]
    rows += [(name, r.outcome, f"{r.seconds:.1f}", r.remark) for name, r in results.items()]
    return [" ".join(_cell(cell, width) for cell, (_, width) in zip(row, HEADS, strict=True)).rstrip() for row in rows]


def _cell(text: str, width: int) -> str:
    return text.ljust(-width) if width < 0 else text.rjust(width)


def as_rows(results: Mapping[str, Result]) -> list[dict[str, Any]]:
    """The steps for the report, without their data."""
    return [
        {"name": name, **{key: value for key, value in asdict(result).items() if key != "data"}}
        for name, result in results.items()
    ]
