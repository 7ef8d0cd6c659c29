"""benchmarks/allreduce.py as a user runs it: its table, its JSON, and that it notices a wrong result."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "allreduce.py"
COLUMNS = ["size(B)", "count", "type", "codec", "time(us)", "p95(us)", "algbw(GB/s)", "busbw(GB/s)"]
COLUMNS += ["wire(B)", "#wrong", "error", "gloo(us)", "ratio"]
SIZES = [4096, 16384, 65536]

pytestmark = pytest.mark.timeout(120)


def run_benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "-n", "5", "-w", "2", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


def table_of(output: str) -> list[dict[str, str]]:
    lines = [line.split() for line in output.splitlines() if not line.startswith(("#", "wrote"))]
    assert lines[0] == COLUMNS
    return [dict(zip(COLUMNS, cells, strict=True)) for cells in lines[1:]]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, str]], dict[str, Any], Path]:
    """The table, the JSON and the plot of one short run."""
    folder = tmp_path_factory.mktemp("benchmark")
    files = ["--json", str(folder / "new" / "rows.json"), "--plot", str(folder / "rows.png")]
    done = run_benchmark("-b", "4K", "-e", "64K", "-f", "4", *files)
    assert done.returncode == 0, done.stderr
    return table_of(done.stdout), json.loads((folder / "new" / "rows.json").read_text()), folder / "rows.png"


def test_table_and_json_hold_every_size_and_codec(
    measured: tuple[list[dict[str, str]], dict[str, Any], Path],
) -> None:
    table, document, _ = measured
    expected = [(size, codec) for size in SIZES for codec in ("none", "fp16")]
    assert [(int(line["size(B)"]), line["codec"]) for line in table] == expected
    assert [(row["size_bytes"], row["codec"]) for row in document["rows"]] == expected
    assert all(line["#wrong"] == "0" for line in table)
    assert all(row["wrong"] == 0 for row in document["rows"])


def test_figures_of_a_row_agree_with_each_other(measured: tuple[list[dict[str, str]], dict[str, Any], Path]) -> None:
    _, document, _ = measured
    for row in document["rows"]:
        assert row["count"] * 4 == row["size_bytes"]
        assert 0 < row["median_us"] <= row["p95_us"]
        assert row["algbw_gb_s"] == pytest.approx(row["size_bytes"] / row["median_us"] / 1e3)
        assert row["busbw_gb_s"] == pytest.approx(row["algbw_gb_s"])  # 2 (N-1)/N is 1 for two ranks
        assert row["ratio"] == pytest.approx(row["gloo_median_us"] / row["median_us"])
        # fp32 as it is: no rounding. fp16: 3.3e-4 is what docs/numerics.md promises for independent Gaussians.
        assert row["error"] == 0 if row["codec"] == "none" else 1e-5 < row["error"] < 3.3e-4
    wire = {(row["size_bytes"], row["codec"]): row["wire_bytes"] for row in document["rows"]}
    for size in SIZES:
        assert 0.4 < wire[size, "fp16"] / wire[size, "none"] < 0.6


def test_json_says_where_it_was_measured(measured: tuple[list[dict[str, str]], dict[str, Any], Path]) -> None:
    _, document, plot = measured
    environment = document["environment"]
    for fact in ("date", "command", "cpu", "kernel", "python", "torch", "dpcomm", "communicator"):
        assert environment[fact], fact
    assert environment["cores"] >= 1
    assert "allreduce.py" in environment["command"]
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("corrupt", "wrong"), [("bit", "1"), ("value", "2")])
def test_wrong_results_are_counted_and_fail_the_run(corrupt: str, wrong: str) -> None:
    done = run_benchmark("-b", "4K", "--corrupt", corrupt, "--vs", "nothing")
    assert done.returncode == 1, done.stderr
    assert [line["#wrong"] for line in table_of(done.stdout)] == [wrong, wrong]
    assert "elements were wrong" in done.stderr


def test_more_ranks_and_no_comparison() -> None:
    done = run_benchmark("-b", "4K", "--ranks", "3", "--codec", "none", "--vs", "nothing")
    assert done.returncode == 0, done.stderr
    (line,) = table_of(done.stdout)
    assert (line["#wrong"], line["gloo(us)"], line["ratio"]) == ("0", "-", "-")


def test_runs_under_torchrun() -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(SCRIPT), "-b", "4K", "-n", "5", "--codec", "none"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert [line["#wrong"] for line in table_of(done.stdout)] == ["0"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["-b", "4X"], "is not a size"),
        (["-b", "8K", "-e", "4K"], "-b must not be greater than -e"),
        (["-f", "1"], "-f must be greater than 1"),
        (["--codec", "none,zip"], "no bound is known for zip"),
        (["-b", "4K", "--engine", "pigeon"], "pigeon"),
    ],
    ids=["size", "range", "factor", "codec", "engine"],
)
def test_bad_arguments_are_refused_in_plain_words(arguments: list[str], complaint: str) -> None:
    done = run_benchmark(*arguments)
    assert done.returncode == 2
    assert complaint in done.stderr
