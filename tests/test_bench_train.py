"""benchmarks/train.py: its arguments, its figures, a short run with traces, and that it notices unequal replicas."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "train.py"
sys.path.append(str(SCRIPT.parent))
import train  # noqa: E402
import train_report  # noqa: E402

# Each layer is a bucket, so that all but the first layer's can travel while backward goes on.
TINY = ["--ranks", "2", "--models", "mlp", "--layers", "6", "--width", "256", "--buckets", "0.25", "--budget", "0"]
NAMES = ["stock DDP, gloo", "fp16_compress_hook", "dpcomm none", "dpcomm fp16"]

pytestmark = pytest.mark.timeout(120)


def run_benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *TINY, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


class Measured(NamedTuple):
    """What a short run left."""

    output: str
    document: dict[str, Any]
    folder: Path

    @property
    def rows(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self.document["rows"]
        return rows

    def trace(self, contestant: str) -> list[dict[str, Any]]:
        """The events of a contestant's chrome trace."""
        name = contestant.replace(",", "").replace(" ", "-")
        file = self.folder / "traces" / f"mlp-2ranks-0.25MB-{name}.json"
        events: list[dict[str, Any]] = json.loads(file.read_text())["traceEvents"]
        return events


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """One short run of two ranks and all contestants."""
    folder = tmp_path_factory.mktemp("train")
    done = run_benchmark("--out", str(folder / "out"), "--trace", str(folder / "traces"), "--markdown")
    assert done.returncode == 0, done.stderr
    return Measured(done.stdout, json.loads((folder / "out" / "train-2ranks.json").read_text()), folder)


def test_table_markdown_json_and_plot_hold_every_contestant(measured: Measured) -> None:
    assert [row["contestant"] for row in measured.rows] == NAMES
    for row in measured.rows:
        assert train_report.line(row) in measured.output
    assert train_report.markdown(measured.rows) in measured.output
    assert measured.document["environment"]["torch"]
    assert measured.document["settings"]["batch"] == 32
    assert (measured.folder / "out" / "train-2ranks.png").read_bytes().startswith(b"\x89PNG")


def test_figures_of_a_row_agree_with_each_other(measured: Measured) -> None:
    stock = measured.rows[0]
    for row in measured.rows:
        assert 0 < row["step_ms"] <= row["step_p95_ms"]
        assert row["samples_per_s"] == pytest.approx(2 * 32 / row["step_ms"] * 1e3)
        assert row["step_ms"] == pytest.approx(row["compute_ms"] + row["copies_ms"] + row["exposed_ms"])
        assert row["hidden"] == pytest.approx(1 - row["exposed_ms"] / row["alone_ms"])
        assert row["speedup"] == pytest.approx(stock["step_ms"] / row["step_ms"])
        assert row["steps"] == stock["steps"] > 0
        assert row["buckets"] == 6


def test_replicas_are_equal_and_codec_none_trains_like_stock_ddp_to_the_last_bit(measured: Measured) -> None:
    """Stock DDP halves before it adds, dpcomm after; with two ranks both are exact short of underflow."""
    rows = {row["contestant"]: row for row in measured.rows}
    assert all(row["replicas_identical"] for row in measured.rows)
    assert rows["dpcomm none"]["same_bits_as_stock"]
    assert rows["dpcomm none"]["final_loss"] == rows["stock DDP, gloo"]["final_loss"]
    assert not rows["dpcomm fp16"]["same_bits_as_stock"]  # else the codec was not used at all
    assert 0 < rows["dpcomm fp16"]["loss_difference"] < 0.01


@pytest.mark.parametrize("contestant", NAMES)
def test_traces_show_communication_beside_backward(measured: Measured, contestant: str) -> None:
    from train_trace import TRACED_STEPS, is_communication, overlap

    events = measured.trace(contestant)
    assert sum(is_communication(event) for event in events) == TRACED_STEPS * 6
    found = overlap(events)
    assert 0 < found.beside_backward_ms <= found.communication_ms
    assert f"{contestant.replace(',', '').replace(' ', '-')}.json: {found}" in measured.output


def test_spans_of_dpcomm_lie_on_tracks_of_their_buckets(measured: Measured) -> None:
    """On one track they would overlap without being nested, which viewers cannot show."""
    from train_trace import is_communication, span

    events = measured.trace("dpcomm fp16")
    names = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M" and e["name"] == "thread_name"}
    spans = [event for event in events if is_communication(event)]
    assert {names[event["tid"]] for event in spans} == {f"dpcomm bucket {bucket}" for bucket in range(6)}
    for bucket in range(6):
        first, second = sorted(span(e) for e in spans if names[e["tid"]] == f"dpcomm bucket {bucket}")
        assert first[1] <= second[0]


def test_overlap_is_nothing_where_communication_waits_for_backward() -> None:
    from train_trace import Overlap, overlap

    node = "autograd::engine::evaluate_function: AddmmBackward0"
    backward = [{"ph": "X", "name": node, "ts": 0.0, "dur": 1000.0}, {"ph": "X", "name": node, "ts": 500, "dur": 1500}]
    late = {"ph": "X", "name": "gloo:all_reduce", "ts": 2000.0, "dur": 1000.0}
    early = {"ph": "X", "name": "dpcomm::allreduce bucket 3 10 float32", "ts": 500.0, "dur": 1000.0}
    assert overlap([*backward, late]) == Overlap(1.0, 0.0)
    assert overlap([*backward, early, late]) == Overlap(2.0, 1.0)


def test_replicas_that_differ_are_named_and_fail_the_run() -> None:
    done = run_benchmark("--contestants", "none,forgetful")
    assert done.returncode == 1, done.stderr
    assert "replicas differed: forgetful" in done.stderr
    lines = {line.split()[4]: line for line in done.stdout.splitlines() if line.strip().startswith("mlp")}
    assert lines["dpcomm"].endswith("equal")
    assert lines["forgetful"].endswith("DIFFER")


def test_gpt_is_the_one_of_the_demo_and_ranks_have_data_of_their_own() -> None:
    from train_models import gpt_task

    task = gpt_task(batch=2, seed=0)
    (inputs, targets), *_ = task.data(0, 2)
    assert inputs.shape == targets.shape == (2, 128)
    assert not inputs.equal(task.data(1, 2)[0][0])
    assert task.model()(inputs, targets).item() == pytest.approx(math.log(256), abs=0.5)  # knows nothing yet


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--ranks", "1"], "--ranks: one rank has nothing to communicate"),
        (["--ranks", "2,x"], "'2,x': expected positive numbers"),
        (["--buckets", "0"], "'0': expected positive numbers"),
        (["--models", "cnn"], "cnn: expected some of mlp,gpt"),
        (["--contestants", "stock,zip"], "zip: expected some of stock"),
        (["--batch", "0"], "must be at least 1"),
        (["--budget", "nan"], "--budget must be 0 or more"),
    ],
    ids=lambda value: "-".join(value).strip("-") if isinstance(value, list) else "",
)
def test_bad_arguments_are_refused(arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        train.parse_arguments(arguments)
    assert stopped.value.code == 2
    assert complaint in capsys.readouterr().err


def test_defaults_are_those_of_the_documentation() -> None:
    arguments = train.parse_arguments([])
    assert (arguments.ranks, arguments.buckets, arguments.models) == ([2, 4], [1, 4, 25, 100], ["mlp", "gpt"])
    assert arguments.contestants == ["stock", "fp16-hook", "none", "fp16"]
    assert (arguments.layers, arguments.width, arguments.batch) == (8, 1024, 32)
