"""How gpu_check.py runs the tests marked gpu: made-up files with tests that fail, crash and take too long."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
import gpu_steps
import gpu_tests
from gpu_steps import FAILED, OK, OUT_OF_TIME, Result

FIRST_FILE = """
import os, pytest
def test_good(record_property):
    record_property("calls", 7)
@pytest.mark.skip(reason="no second GPU")
def test_skipped(): pass
def test_that_crashes():
    os.abort()
def test_behind_it(): pass
"""
SECOND_FILE = """
import pytest
def test_bad():
    assert 1 == 2, "bits differ"
@pytest.fixture
def broken():
    yield
    raise RuntimeError("teardown")
def test_with_a_bad_end(broken): pass
"""


def run_inner(folder: Path, files: Mapping[str, str], seconds: float = 100.0) -> tuple[Result, dict[str, str]]:
    """Runs made-up test files as gpu-check runs the real ones."""
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = gpu: x\n")
    paths = []
    for name, text in files.items():
        paths.append(folder / name)
        paths[-1].write_text(text + "\nimport pytest\npytestmark = pytest.mark.gpu\n")
    end = time.monotonic() + seconds
    journal, log = folder / "journal", folder / "log"
    result = gpu_tests.run_files(
        paths, journal, lambda: end - time.monotonic(), lambda *arguments: gpu_steps.call(*with_log(arguments, log))
    )
    return result, {test.name.partition("::")[2]: test.outcome for test in gpu_tests.read_journal(journal).values()}


def with_log(
    arguments: tuple[Sequence[str], float, Mapping[str, str]], log: Path
) -> tuple[Sequence[str], float, Path, Mapping[str, str]]:
    command, seconds, env = arguments
    return command, seconds, log, env


@pytest.mark.timeout(120)
def test_a_test_that_crashes_costs_no_other(tmp_path: Path) -> None:
    result, outcomes = run_inner(tmp_path, {"test_one.py": FIRST_FILE, "test_two.py": SECOND_FILE})
    assert outcomes == {
        "test_good": "passed",
        "test_skipped": "skipped",
        "test_that_crashes": "crashed",
        "test_behind_it": "passed",
        "test_bad": "failed",
        "test_with_a_bad_end": "failed",
    }
    assert result.outcome == FAILED
    assert result.data["counts"] == {"passed": 2, "crashed": 1, "failed": 2, "skipped": 1}
    kept = {test["name"].partition("::")[2]: test for test in result.data["tests"]}
    assert kept["test_good"]["properties"] == {"calls": 7}
    assert "bits differ" in kept["test_bad"]["message"]
    assert "Fatal Python error: Aborted" in kept["test_that_crashes"]["message"]
    assert "no second GPU" in kept["test_skipped"]["message"]
    assert json.dumps(result.data)


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("text", "outcome"),
    [
        ("def test_good(): pass", OK),
        ("@__import__('pytest').mark.skip(reason='x')\ndef test_skipped(): pass", FAILED),
        ("import no_such_module", FAILED),
    ],
    ids=["passed", "none-ran", "broken-collection"],
)
def test_outcome_of_the_tests(tmp_path: Path, text: str, outcome: str) -> None:
    assert run_inner(tmp_path, {"test_one.py": text})[0].outcome == outcome


@pytest.mark.timeout(120)
def test_tests_that_run_out_of_time_are_named(tmp_path: Path) -> None:
    text = "import time\ndef test_good(): pass\ndef test_slow(): time.sleep(60)\ndef test_late(): pass"
    result, outcomes = run_inner(tmp_path, {"test_one.py": text}, seconds=20.0)
    assert OUT_OF_TIME in result.remark
    assert result.outcome == OUT_OF_TIME
    assert outcomes == {"test_good": "passed", "test_slow": "unfinished"}


def test_files_with_gpu_tests_are_found() -> None:
    names = [path.name for path in gpu_tests.find_files()]
    assert names[0] == "test_gpu_bits.py"
    assert names.index("test_gpu_long.py") > names.index("test_gpu_faults.py")
    assert "test_wire.py" not in names
