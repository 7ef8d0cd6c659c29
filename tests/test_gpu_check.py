"""benchmarks/gpu_check.py where there is no GPU, and how it judges a run of the tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "gpu_check.py"
sys.path.append(str(SCRIPT.parent))
import gpu_check  # noqa: E402

REPORT = (
    '<?xml version="1.0"?><testsuites>'
    '<testsuite name="pytest" tests="9" failures="{failures}" errors="{errors}" skipped="{skipped}"/></testsuites>'
)


def test_without_a_gpu_it_stops_with_one_sentence() -> None:
    """CUDA_VISIBLE_DEVICES hides the devices of a machine that has some."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("gpu-check: there is no NVIDIA GPU to check on here (")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("failures", "errors", "skipped", "expected", "ok"),
    [
        (0, 0, 0, gpu_check.Outcome(9, 0, 0), True),
        (0, 0, 4, gpu_check.Outcome(5, 0, 4), True),
        (1, 0, 0, gpu_check.Outcome(8, 1, 0), False),
        (0, 2, 1, gpu_check.Outcome(6, 2, 1), False),
        (0, 0, 9, gpu_check.Outcome(0, 0, 9), False),
    ],
    ids=["passed", "some-skipped", "failed", "errors", "none-ran"],
)
def test_outcome_of_a_report(
    tmp_path: Path, failures: int, errors: int, skipped: int, expected: gpu_check.Outcome, ok: bool
) -> None:
    report = tmp_path / "junit.xml"
    report.write_text(REPORT.format(failures=failures, errors=errors, skipped=skipped))
    outcome = gpu_check.read_report(report)
    assert outcome == expected
    assert outcome.ok == ok


def test_row_is_as_wide_as_its_head() -> None:
    row = gpu_check.Row(8, 64 << 20, "fp16", 12345.6, 123.45, 216.04)
    head = " ".join(f"{name:>{width}}" for name, width in gpu_check.HEADS)
    assert len(gpu_check.format_row(row)) == len(head)
