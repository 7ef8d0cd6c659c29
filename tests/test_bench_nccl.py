"""benchmarks/nccl.py without a GPU, with gloo in NCCL's place: two processes and one; plan, table, JSON, verdicts."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from without_gpu import run_without_gpu

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
SCRIPT = BENCHMARKS / "nccl.py"
sys.path.append(str(BENCHMARKS))
import nccl_plan as plans  # noqa: E402
import nccl_rank  # noqa: E402
import verification  # noqa: E402

COLUMNS = ["size(B)", "count", "type", "redop", "time(us)", "algbw(GB/s)", "busbw(GB/s)", "#wrong", "wire(B)"]
COLUMNS += ["contestant", "note"]
REHEARSED = plans.CONTESTS["cpu"]
SIZES = [4096, 16384]

pytestmark = pytest.mark.timeout(180)


def run(*arguments: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), str(SCRIPT), "--device", "cpu", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)


def rows_of(output: str) -> list[list[str]]:
    """The table's lines, cut where columns are: contestants and notes have spaces in them."""
    lines = [line for line in output.splitlines() if line and not line.startswith(("#", "wrote"))]
    assert lines[0].split() == COLUMNS
    at = lines[0].index("contestant")
    note = lines[0].index("note")
    return [[*line[:at].split(), line[at:note].strip(), line[note:].strip()] for line in lines[1:]]


Run = tuple[subprocess.CompletedProcess[str], dict[str, Any], Path]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One short run of two processes."""
    folder = tmp_path_factory.mktemp("nccl")
    files = ["--json", str(folder / "new" / "rows.json"), "--plot", str(folder / "rows.png")]
    done = run("-b", "4K", "-e", "16K", "-f", "4", "-n", "5", "-w", "1", *files, processes=2)
    assert done.returncode == 0, done.stderr
    return done, json.loads((folder / "new" / "rows.json").read_text()), folder / "rows.png"


# --- two processes ---------------------------------------------------------------------------------------------------


def test_everyone_takes_part_at_every_size_or_is_absent_with_a_reason(measured: Run) -> None:
    done, document, _ = measured
    absent = document["absent"]
    assert set(absent) == set(plans.SYMMETRIC)
    assert all(f"# absent: {name}: {reason}" in done.stdout and reason for name, reason in absent.items())
    expected = [(str(size), name) for size in SIZES for name in REHEARSED.names() if name not in absent]
    assert [(cells[0], cells[9]) for cells in rows_of(done.stdout)] == expected
    assert [(str(row["size_bytes"]), row["contestant"]) for row in document["rows"]] == expected


def test_every_output_is_marked_as_a_rehearsal(measured: Run) -> None:
    done, document, plot = measured
    assert done.stdout.count("# cpu rehearsal: gloo in the place of NCCL, no figure of a GPU") == 1
    assert document["rehearsal"] == "cpu rehearsal"
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_the_picture_is_marked_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    titles: list[str] = []
    monkeypatch.setattr(nccl_rank, "draw_curves", lambda curves, title, ylabel, file: titles.append(title))
    arguments = argparse.Namespace(json=None, plot=tmp_path / "x.png", dtype="float")
    nccl_rank.finish(arguments, [], 1, plans.setting(REHEARSED, 1, 2))
    assert "cpu rehearsal" in titles[0]
    assert "virtual ranks" in titles[0]


def test_figures_of_a_row_agree_with_each_other(measured: Run) -> None:
    _, document, _ = measured
    for row in document["rows"]:
        assert row["count"] * 4 == row["size_bytes"]
        assert 0 < row["time_us"] <= row["p95_us"]
        assert row["algbw_gb_s"] == pytest.approx(row["size_bytes"] / row["time_us"] / 1e3)
        assert row["busbw_gb_s"] == pytest.approx(row["algbw_gb_s"])  # 2 (N-1)/N is 1 for two ranks
        assert (row["wrong"], row["ranks"], row["redop"], row["note"]) == (0, 2, "sum", "")
        name, size = row["contestant"], row["size_bytes"]
        share = 513 / 1024 if "fp16/" in name else 0.5 if name in ("gloo bf16", "fp16_compress_hook") else 1
        assert row["wire_bytes"] == pytest.approx(size * share), name
        exact = name == "gloo" or " none/" in name
        assert row["error"] == 0 if exact else 1e-5 < row["error"] < 1e-2, name


def test_json_has_the_keys_that_a_run_on_gpus_has(measured: Run) -> None:
    _, document, _ = measured
    keys = {"benchmark", "rehearsal", "ranks", "virtual_ranks", "settings", "communicators", "remarks"}
    assert set(document) == keys | {"environment", "absent", "rows"}
    assert {"gpu", "driver", "cuda", "nccl", "torch", "cpu", "commit"} <= set(document["environment"])
    assert set(document["communicators"]) == {"shm", "gloo"}
    assert document["settings"]["sizes"] == SIZES
    assert document["virtual_ranks"] is None


@pytest.mark.parametrize("name", ["gloo bf16", "dpcomm gloo fp16/ring"])
def test_a_contestant_with_wrong_results_is_counted_and_fails_the_run(name: str) -> None:
    """The negative control: one element of one contestant is off by 1 on each of two ranks."""
    done = run("-b", "4K", "-e", "4K", "-n", "1", "-w", "0", "--only", name, "--corrupt", name, processes=2)
    assert done.returncode == 1, done.stderr
    assert {cells[9]: cells[7] for cells in rows_of(done.stdout)} == {"gloo": "0", name: "2"}
    assert "2 elements were wrong" in done.stderr


# --- one process -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float", "half", "bfloat16"])
def test_one_process_has_virtual_ranks_and_says_so(dtype: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    done = run("-b", "4K", "-e", "4K", "-n", "2", "-w", "0", "-d", dtype, "--virtual-ranks", "3", "--json", str(file))
    assert done.returncode == 0, done.stderr
    assert "dpcomm shm has 3 virtual ranks that share it" in done.stdout
    assert "not a network figure" in done.stdout
    document = json.loads(file.read_text())
    assert (document["ranks"], document["virtual_ranks"]) == (1, 3)
    for row in document["rows"]:
        assert (row["wrong"], row["busbw_gb_s"]) == (0, None)  # there is no bus
        if row["contestant"].startswith("dpcomm shm"):
            assert (row["ranks"], row["note"]) == (3, "3 virtual ranks on one device")
            assert row["time_us"] > 0
        if row["contestant"].startswith("dpcomm gloo"):
            assert (row["time_us"], row["note"]) == (None, "one rank: nothing to move")


def test_what_was_measured_before_an_end_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Time runs out behind the first size."""
    file, own = tmp_path / "new" / "rows.json", nccl_rank.measure_size

    def once(entrants: Any, size: int, *arguments: Any) -> Any:
        if size > SIZES[0]:
            raise KeyboardInterrupt
        return own(entrants, size, *arguments)

    monkeypatch.setattr(nccl_rank, "measure_size", once)
    flags = ["--device", "cpu", "-b", "4K", "-e", "16K", "-n", "1", "-w", "0", "--only", "shm none/ring"]
    try:
        with pytest.raises(KeyboardInterrupt):
            nccl_rank.run(plans.parse_arguments([*flags, "--json", str(file)]))
    finally:
        torch.distributed.destroy_process_group()
    rows = json.loads(file.read_text())["rows"]
    assert [(row["contestant"], row["size_bytes"]) for row in rows] == [
        ("gloo", SIZES[0]),
        ("dpcomm shm none/ring", SIZES[0]),
    ]


def test_wrong_results_of_virtual_ranks_fail_the_run() -> None:
    name = "dpcomm shm fp16/direct"
    done = run("-b", "4K", "-e", "4K", "-n", "1", "-w", "0", "--only", name, "--corrupt", name)
    assert done.returncode == 1
    assert {cells[9]: cells[7] for cells in rows_of(done.stdout)} == {"gloo": "0", name: "1"}


def test_unchecked_results_are_no_right_ones() -> None:
    done = run("-b", "4K", "-e", "4K", "-n", "1", "-w", "0", "-c", "0", "--only", "shm none/direct")
    assert done.returncode == 0
    assert {cells[7] for cells in rows_of(done.stdout)} == {"-"}


def test_without_a_gpu_it_stops_with_the_reason() -> None:
    done = run_without_gpu(SCRIPT)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("nccl: there is no GPU here (")
    assert len(done.stderr.splitlines()) == 1


# --- plan and verdicts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "sizes"),
    [
        (["-b", "1K", "-e", "64K"], [1024, 4096, 16384, 65536]),
        (["-b", "1K", "-e", "4K", "-f", "2"], [1024, 2048, 4096]),
        (["-b", "1K", "-e", "4K", "-i", "1K"], [1024, 2048, 3072, 4096]),
        (["-b", "5", "-e", "5"], [8]),
        (["-b", "5", "-e", "5", "-d", "half"], [6]),
    ],
    ids=["default", "factor", "step", "whole-floats", "whole-halves"],
)
def test_sizes_are_those_of_nccl_tests(flags: list[str], sizes: list[int]) -> None:
    assert plans.parse_arguments(flags).sizes == sizes


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["-b", "8K", "-e", "4K"], "-b must not be greater than -e"),
        (["-f", "1"], "-f must be greater than 1"),
        (["-f", "2", "-i", "1K"], "-f and -i exclude each other"),
        (["-n", "0"], "-n must be at least 1"),
        (["-d", "double"], "invalid choice"),
        (["--virtual-ranks", "1"], "must be at least 2"),
        (["-c", "0", "--corrupt", "gloo"], "shows nothing with -c 0"),
    ],
    ids=["range", "factor", "both", "iterations", "dtype", "one-rank", "unchecked"],
)
def test_bad_arguments_are_refused_in_plain_words(
    flags: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        plans.parse_arguments(flags)
    assert stopped.value.code == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize("iterations", [1, 4, 5, 49, 50, 1000])
def test_a_median_is_over_rounds(iterations: int) -> None:
    turns = plans.turns_for(iterations, 10)
    assert turns.calls * turns.timed >= iterations
    assert turns.timed >= min(iterations, plans.LEAST_ROUNDS)
    assert turns.calls <= plans.MOST_TURN_CALLS
    assert turns.calls * turns.warm >= 10


def test_names_on_gpus_are_those_of_the_rehearsal_but_for_who_carries() -> None:
    swapped = [name.replace("gloo", "nccl").replace("shm", "p2p") for name in REHEARSED.names()]
    native = [name for name in plans.CONTESTS["cuda"].names() if name.endswith("/native")]
    assert native == ["dpcomm nccl fp16/native", "dpcomm nccl bf16/native"]
    assert [*swapped, *native] == plans.CONTESTS["cuda"].names()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["half", "bfloat16"])
def test_bounds_of_16_bits_are_met_by_16_bits_and_by_nothing_worse(dtype: torch.dtype) -> None:
    """A sum in 16 bits is within the bound; the same once more cut to an eighth of the precision is not."""
    nranks = 4
    precision = verification.precision_of_sixteen_bits(dtype, nranks)
    spoiled = torch.float8_e4m3fn if dtype == torch.float16 else torch.float8_e5m2

    def added(xs: list[torch.Tensor], through: torch.dtype) -> None:
        total = xs[0].to(dtype)
        for x in xs[1:]:
            total = total + x.to(dtype)
        for x in xs:
            x.copy_(total.to(through).float())

    assert verification.verify_local(lambda xs: added(xs, dtype), nranks, 5000, precision).wrong == 0
    assert verification.verify_local(lambda xs: added(xs, spoiled), nranks, 5000, precision).wrong > 1000


def test_results_that_differ_between_virtual_ranks_are_wrong() -> None:
    """Within the bound of the codec, but not the same bits."""

    def nearly(xs: list[torch.Tensor]) -> None:
        total = xs[0] + xs[1]
        xs[0].copy_(total)
        xs[1].copy_(torch.nextafter(total, total * 2))

    precision = verification.precision_of("fp16", "direct", 2)
    assert verification.verify_local(nearly, 2, 1000, precision).wrong == 1000


@pytest.mark.gpu
@pytest.mark.timeout(300)
def test_a_short_run_on_one_gpu(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    command = [sys.executable, str(SCRIPT), "-b", "64K", "-e", "1M", "-n", "10", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    if done.returncode == 2 and "this torch" in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr
    assert "virtual ranks" in done.stdout
    rows = json.loads(file.read_text())["rows"]
    assert {row["wrong"] for row in rows} == {0}
    assert any(row["contestant"] == "nccl" and row["time_us"] > 0 for row in rows)
