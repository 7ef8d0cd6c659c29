"""The tests marked gpu for gpu_check.py, in a process of their own; one that takes it down costs no other test.

This module is both sides. As a plugin of pytest (`-p gpu_tests --gpu-results FILE`) it writes one line of JSON when a
test begins and when it ends: what is known survives whatever ends the process. From outside it runs pytest, reads those
lines, and goes on behind a test that took the process down.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
from gpu_steps import FAILED, OK, OUT_OF_TIME, ROOT, Done, Result, last_line, tail

TESTS = ROOT / "tests"
# What others stand on comes first, what takes long last: time may run out.
ORDER = (
    "test_gpu_bits",
    "test_gpu_nccl",
    "test_gpu_order",
    "test_gpu_processes",
    "test_gpu_faults",
    "test_gpu_ddp",
    "test_gpu_arrays",
    "test_gpu_long",
)
MOST_RESTARTS = 8
CRASH_CHARACTERS = 12_000  # the stacks of all threads, the failing one first
CONTEXT_LOST = 70  # pytest's exit status where a test has left the process without a usable GPU
COMPLETE = (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED)
PASSED, SKIPPED, CRASHED, UNFINISHED = "passed", "skipped", "crashed", "unfinished"


@dataclass(frozen=True)
class Test:
    """What became of one test."""

    name: str
    outcome: str
    seconds: float = 0.0
    message: str = ""
    properties: dict[str, Any] = field(default_factory=dict)

    @property
    def good(self) -> bool:
        return self.outcome in (PASSED, SKIPPED, UNFINISHED)


# --- inside pytest ---------------------------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu-results", help="append one line of JSON when a test begins and when it ends")


def pytest_configure(config: pytest.Config) -> None:
    file = config.getoption("--gpu-results")
    if file:
        config.pluginmanager.register(Journal(Path(str(file))))


class Journal:
    """Writes the lines; leaves out what an earlier process has begun."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        done = read_journal(self._file)
        items[:] = [item for item in items if item.nodeid not in done]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._write({"name": nodeid, "outcome": CRASHED})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            message = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
            self._write(
                {
                    "name": report.nodeid,
                    "outcome": report.outcome,
                    "seconds": round(report.duration, 3),
                    "message": tail(str(message)) if report.outcome != "passed" else "",
                    "properties": dict(report.user_properties),
                }
            )
            if report.outcome == "failed" and (reason := why_context_lost()):
                pytest.exit(f"the GPU cannot be used in this process any more: {reason}", CONTEXT_LOST)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.outcome == "failed":
            self._write({"name": report.nodeid, "outcome": "failed", "message": tail(report.longreprtext)})

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        if exitstatus in COMPLETE:
            self._write({"end": int(exitstatus)})

    def _write(self, line: Mapping[str, Any]) -> None:
        with self._file.open("a") as out:
            out.write(json.dumps(line, default=str) + "\n")


def why_context_lost() -> str:
    """An error that sticks to this process's context, so that every later test in it would fail; "" for none."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return ""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return ""


# --- outside ---------------------------------------------------------------------------------------------------------


def read_journal(file: Path) -> dict[str, Test]:
    """By name, what became of each test that has begun; one that began and never ended has taken the process down."""
    tests: dict[str, Test] = {}
    lines = file.read_text().splitlines() if file.exists() else []
    for line in lines:
        try:
            test = Test(**json.loads(line))
        except (ValueError, TypeError):
            continue  # the mark of an end, or the process ended while it wrote
        before = tests.get(test.name)
        if before is None or before.outcome in (CRASHED, PASSED):  # a failure is not taken back by its teardown
            tests[test.name] = test
    return tests


def count_ends(file: Path) -> int:
    """How many runs of pytest have come to their end. Its exit status cannot tell: that of a time-out is 1, too."""
    return sum(line.startswith('{"end"') for line in file.read_text().splitlines()) if file.exists() else 0


def find_files(tests: Path = TESTS) -> list[Path]:
    """The files that hold tests marked gpu, in the order in which they shall run."""
    found = [path for path in sorted(tests.rglob("test_*.py")) if marked(path)]
    return sorted(found, key=lambda path: ORDER.index(path.stem) if path.stem in ORDER else len(ORDER))


def marked(path: Path) -> bool:
    """Whether a file's own tests carry the marker; those of tests/gpu all do."""
    return path.parent.name == "gpu" or "@pytest.mark.gpu" in path.read_text()


def run_files(
    files: Sequence[Path],
    journal: Path,
    left_s: Callable[[], float],
    call: Callable[[Sequence[str], float, Mapping[str, str]], Done],
) -> Result:
    """Runs pytest on the files until all tests have begun, anew behind each that takes the process down."""
    problem = run_until_end(files, journal, left_s, call)
    tests = list(read_journal(journal).values())
    counts = {PASSED: 0} | {o: sum(t.outcome == o for t in tests) for o in sorted({t.outcome for t in tests})}
    remark = "; ".join([", ".join(f"{n} {o}" for o, n in counts.items()), *([problem] if problem else [])])
    if not all(test.good for test in tests):
        outcome = FAILED
    elif problem == OUT_OF_TIME:
        outcome = OUT_OF_TIME
    else:
        outcome = OK if not problem and counts[PASSED] > 0 else FAILED
    return Result(outcome, remark, data={"counts": counts, "tests": [asdict(test) for test in tests]})


def explain(journal: Path, before: Mapping[str, Test], done: Done) -> None:
    """Adds what a process wrote last to the test that it ended in, and whether it was ended for want of time."""
    for name, test in read_journal(journal).items():
        if name not in before and test.outcome == CRASHED:
            outcome = UNFINISHED if done.status is None else CRASHED
            line = asdict(Test(name, outcome, message=tail(done.output, CRASH_CHARACTERS)))
            with journal.open("a") as out:
                out.write(json.dumps(line) + "\n")


def run_until_end(
    files: Sequence[Path],
    journal: Path,
    left_s: Callable[[], float],
    call: Callable[[Sequence[str], float, Mapping[str, str]], Done],
) -> str:
    """What kept pytest from its end, or ""."""
    command = [sys.executable, "-m", "pytest", "-p", "gpu_tests", "--gpu-results", str(journal), "-m", "gpu", "-q"]
    command += ["--durations=20", "--continue-on-collection-errors", *map(str, files)]
    env = {"PYTHONPATH": str(Path(__file__).resolve().parent)}
    for _ in range(MOST_RESTARTS + 1):
        if left_s() <= 0:
            return OUT_OF_TIME
        begun, ends = read_journal(journal), count_ends(journal)
        done = call(command, left_s(), env)
        explain(journal, begun, done)
        if done.status is None:
            return OUT_OF_TIME
        if count_ends(journal) > ends:
            return ""
        if len(read_journal(journal)) == len(begun):
            return f"pytest ended with status {done.status} before any test: {last_line(done.output)}"
    return f"{MOST_RESTARTS + 1} processes were lost"
