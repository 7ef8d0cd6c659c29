"""examples/train_lm.py as a user runs it, a few steps of a tiny model: its table, files, verdict on replicas."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SCRIPT = EXAMPLES / "train_lm.py"
TINY = ["--steps", "6", "--layers", "1", "--width", "32", "--context", "32", "--bucket-cap-mb", "0.02"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

pytestmark = pytest.mark.timeout(120)


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any], Path]:
    """What the demo printed, its report.json and its folder."""
    folder = tmp_path_factory.mktemp("demo") / "new"
    done = run(sys.executable, str(SCRIPT), "--demo", *TINY, "--out", str(folder))
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((folder / "report.json").read_text()), folder


def test_demo_reports_three_runs_with_identical_replicas(demo: tuple[str, dict[str, Any], Path]) -> None:
    _, report, folder = demo
    assert [(r["hook"], r["codec"]) for r in report["runs"]] == [
        ("stock", "none"),
        ("dpcomm", "none"),
        ("dpcomm", "fp16"),
    ]
    for r in report["runs"]:
        assert r["replicas_identical"]
        assert len(r["losses"]) == 6
        assert r["losses"][-1] < r["losses"][0]
        assert r["step_ms"] > 0
        assert r["allreduce_ms"] > 0
        assert len(r["bucket_bytes"]) > 1
    assert report["ranks"] == 2
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")


def test_demo_prints_the_table(demo: tuple[str, dict[str, Any], Path]) -> None:
    output, report, folder = demo
    for heading in ("final loss", "step ms", "exposed ms", "all-reduce ms", "wire MB/step", "replicas identical"):
        assert heading in output
    for r in report["runs"]:
        (line,) = [line for line in output.splitlines() if line.startswith(r["name"]) and line.endswith("yes")]
        assert f"{r['final_loss']:.4f}" in line
    assert f"wrote {folder / 'report.json'}" in output


def test_codec_none_trains_like_stock_ddp_to_the_last_bit(demo: tuple[str, dict[str, Any], Path]) -> None:
    """Stock DDP halves before it adds, dpcomm after; with two ranks both are exact short of underflow."""
    stock, none, fp16 = demo[1]["runs"]
    assert none["losses"] == stock["losses"]
    assert none["parameters_sha256"] == stock["parameters_sha256"]
    assert fp16["parameters_sha256"] != stock["parameters_sha256"]  # else the codec was not used at all


def test_fp16_halves_the_bytes_on_the_wire(demo: tuple[str, dict[str, Any], Path]) -> None:
    stock, none, fp16 = (r["wire_bytes_per_step"] for r in demo[1]["runs"])
    assert none == pytest.approx(stock, rel=0.1)  # dpcomm moves whole groups of 256 elements
    assert fp16 == pytest.approx(none / 2, rel=0.1)


def test_runs_under_torchrun_on_a_text_of_ones_own(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("to be or not to be, that is the question. " * 50)
    mine = ["--hook", "dpcomm", "--codec", "fp16", "--text", str(text), "--out", str(tmp_path)]
    done = run(*TORCHRUN, str(SCRIPT), *TINY, *mine)
    assert done.returncode == 0, done.stderr
    assert "2,100 bytes of text" in done.stdout
    (only,) = json.loads((tmp_path / "report.json").read_text())["runs"]
    assert (only["name"], only["replicas_identical"]) == ("dpcomm fp16", True)


SPOILED = f"""
import sys
sys.path.insert(0, {str(EXAMPLES)!r})
import torch
import torch.distributed as dist
import train_lm

measure = train_lm.measure_allreduce

def spoil(runs):
    measure(runs)
    if dist.get_rank() == 1:
        parameter = next(runs[0]._ddp.parameters())
        with torch.no_grad():
            parameter.view(-1)[0] += 1e-3

train_lm.measure_allreduce = spoil
sys.exit(train_lm.main(sys.argv[1:]))
"""


def test_replicas_that_differ_are_reported_and_fail_the_run(tmp_path: Path) -> None:
    script = tmp_path / "spoiled.py"
    script.write_text(SPOILED)
    done = run(*TORCHRUN, str(script), *TINY, "--hook", "stock", "--out", str(tmp_path))
    assert done.returncode != 0
    assert json.loads((tmp_path / "report.json").read_text())["runs"][0]["replicas_identical"] is False
    assert any(line.startswith("stock DDP") and line.endswith("NO") for line in done.stdout.splitlines())


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--steps", "3"], "--steps must be at least 5"),
        (["--width", "30"], "--width must be a multiple of 4"),
        (["--codec", "zip"], "invalid choice: 'zip'"),
        (["--text", "no/such/file"], "no/such/file"),
    ],
    ids=["steps", "width", "codec", "text"],
)
def test_bad_arguments_are_refused_before_anything_starts(arguments: list[str], complaint: str) -> None:
    done = run(sys.executable, str(SCRIPT), *arguments)
    assert done.returncode == 2
    assert complaint in done.stderr
    assert "torch.distributed" not in done.stderr
