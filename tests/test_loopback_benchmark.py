"""benchmarks/allreduce.py --virtual-ranks without a GPU: plan, bytes, table, JSON and goal, with a fake clock."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from without_gpu import run_without_gpu

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
SCRIPT = BENCHMARKS / "allreduce.py"
sys.path.append(str(BENCHMARKS))
import allreduce  # noqa: E402
import loopback  # noqa: E402
import loopback_nccl  # noqa: E402
import loopback_plan as plans  # noqa: E402
from gpu_clock import Times  # noqa: E402
from loopback_plan import Cell, Row, Yardsticks  # noqa: E402

KIB, MIB = 1 << 10, 1 << 20
ENVIRONMENT = {"gpu": "a GPU", "multiprocessors": 132, "driver": "1", "torch": "2"}
STICKS = Yardsticks(1000.0, 50.0)


# --- bytes -----------------------------------------------------------------------------------------------------------


class Counter:
    """Counts what the schedules of csrc/core do, slice by slice, as they are written there: not by formula."""

    def __init__(self, nranks: int, codec: str, pinned: bool) -> None:
        self.nranks, self.scaled, self.pinned = nranks, codec == "fp16", pinned
        self.tensor_read = self.tensor_written = self.message_read = self.message_written = 0.0

    def put(self, share: float, wire: float) -> None:
        self.tensor_read += share
        self.message_written += wire

    def add_up(self, rank: int, share: float, wire: float) -> None:
        for other in range(self.nranks):
            if other == rank and not self.scaled:
                self.tensor_read += share
            else:
                self.message_read += wire

    def get(self, share: float, wire: float) -> None:
        self.message_read += wire
        self.tensor_written += share

    def direct(self, rank: int, share: float, wire: float) -> None:
        for _ in range(1, self.nranks + self.scaled):
            self.put(share, wire)
        self.add_up(rank, share, wire)
        self.tensor_written += share
        self.message_written += wire if self.pinned else sum(wire for r in range(self.nranks) if r != rank)
        for _ in range(1, self.nranks):
            self.get(share, wire)

    def oneshot(self, rank: int, share: float, wire: float) -> None:
        share, wire = share * self.nranks, wire * self.nranks  # no chunks
        for r in range(self.nranks):
            if r == (rank + 1) % self.nranks if self.pinned else self.scaled or r != rank:
                self.put(share, wire)
        self.add_up(rank, share, wire)
        self.tensor_written += share

    def ring(self, share: float, wire: float) -> None:
        for turn in range(2 * self.nranks - 1):
            sends = turn < 2 * self.nranks - 2
            if turn == 0:
                self.put(share, wire)
            elif turn < self.nranks:
                self.put(share, wire)
                self.message_read += wire
                self.tensor_written += share if turn == self.nranks - 1 else 0
            else:
                self.get(share, wire)
                self.message_written += wire if sends else 0


@pytest.mark.parametrize("nranks", [2, 3, 8])
@pytest.mark.parametrize("codec", ["none", "fp16"])
@pytest.mark.parametrize("pinned", [False, True], ids=["device", "pinned"])
@pytest.mark.parametrize("algorithm", plans.ALGORITHMS)
def test_bytes_are_those_of_the_schedules(algorithm: str, pinned: bool, codec: str, nranks: int) -> None:
    share, wire = 1024.0, 1024.0 if codec == "none" else 513.0  # of a chunk
    counted = Counter(nranks, codec, pinned)
    for rank in range(nranks):
        if algorithm == "ring":
            counted.ring(share, wire)
        else:
            (counted.direct if algorithm == "direct" else counted.oneshot)(rank, share, wire)
    found = plans.traffic(algorithm, codec, nranks, share * nranks, wire * nranks, pinned)
    assert found._asdict() == pytest.approx({name: getattr(counted, name) for name in found._fields})


def test_bytes_of_a_call() -> None:
    two = Cell(MIB, "none", "direct").traffic(2, False)
    assert two == (2 * MIB, 2 * MIB, 2 * MIB, 2 * MIB)
    assert (two.total, two.busier_way) == (8 * MIB, 2 * MIB)
    half = Cell(MIB, "fp16", "direct").traffic(2, True)
    assert half.message_read == 3 * 1024 * 513  # each rank reads two contributions to its half and the other's result


# --- plan ------------------------------------------------------------------------------------------------------------


def parsed(*arguments: str) -> Any:
    return allreduce.parse_arguments(["--engine", "p2p", "--virtual-ranks", "2", *arguments])


def test_plan_holds_every_size_codec_and_algorithm() -> None:
    plan = loopback.plan_of(parsed(), 132)
    assert (plan.nranks, plan.ctas) == (2, (1, 2, 4, 8, 16, 32, 64))
    cells = {(cell.size_bytes, cell.codec, cell.algorithm) for cell in plan.cells}
    assert len(cells) == len(plan.cells) == 5 * 2 * 2 + 2 * 2  # oneshot for 4 and 64 KiB only
    assert (64 * KIB, "fp16", "oneshot") in cells
    assert (MIB, "fp16", "oneshot") not in cells
    assert (100 * MIB, "none", "ring") in cells


def test_plan_follows_the_arguments() -> None:
    plan = loopback.plan_of(parsed("-b", "1M", "--algorithm", "oneshot", "--codec", "fp16", "--max-ctas", "3,66"), 132)
    assert plan.cells == (Cell(MIB, "fp16", "oneshot"),)
    assert plan.ctas == (3, 66)
    with pytest.raises(SystemExit, match="at most 66 CTAs each"):
        loopback.plan_of(parsed("--max-ctas", "67"), 132)


# --- measuring -------------------------------------------------------------------------------------------------------

CELLS = plans.cells_of([4 * KIB, MIB], ["none", "fp16"], "auto")


def clock(us: float) -> Callable[[Cell, int], Times]:
    """fp16 takes half as long as none."""
    return lambda cell, calls: Times(us * (1 if cell.codec == "none" else 0.5) * cell.size_bytes / 4096, 3.0)


def measured(us: float = 7.0, arena: str = "device", nranks: int = 2, wrong: int = 0) -> list[Row]:
    advanced: list[None] = []
    times, counts = plans.measure(CELLS, 3, clock(us), lambda _: wrong, lambda: advanced.append(None))
    assert len(advanced) == 3 * len(CELLS)
    assert {len(each) for each in times.values()} == {3}
    return plans.rows_of(nranks, arena, 16, times, counts, STICKS)


def test_figures_of_a_row_agree_with_each_other() -> None:
    for row in measured():
        assert row.algbw_gb_s == pytest.approx(row.size_bytes / row.median_us / 1e3)
        assert row.moved_gb_s == pytest.approx(row.moved_bytes / row.median_us / 1e3)
        assert row.of_copy == pytest.approx(row.moved_bytes / STICKS.copy_gb_s / 1e3 / row.median_us)
        assert (row.bus_bytes, row.of_link, row.host_us, row.wrong) == (None, None, 3.0, 0)
        assert row.over_none == (2.0 if row.codec == "fp16" else None)


def test_pinned_arenas_are_compared_with_the_bus() -> None:
    row = next(r for r in measured(arena="pinned") if (r.size_bytes, r.codec, r.algorithm) == (MIB, "none", "direct"))
    assert row.bus_bytes == 2 * MIB
    assert row.of_link == pytest.approx(2 * MIB / STICKS.link_gb_s / 1e3 / row.median_us)


def test_medians_and_percentiles_of_rounds() -> None:
    cell = Cell(4 * KIB, "none", "direct")
    times = {cell: [Times(us, us) for us in (9.0, 1.0, 2.0, 3.0, 4.0)]}
    (row,) = plans.rows_of(2, "device", 1, times, {cell: 5}, STICKS)
    assert (row.median_us, row.p95_us, row.host_us, row.wrong) == (3.0, 9.0, 3.0, 5)


@pytest.mark.parametrize(("us", "calls"), [(0, 100), (5, 100), (100, 30), (1e5, 3)])
def test_calls_fill_a_timing(us: float, calls: int) -> None:
    assert plans.calls_for(us) == calls


def test_the_goal_is_reached_missed_or_not_measured() -> None:
    assert str(plans.outcome_of(2, measured(7.9))).endswith("7.9 us with 16 CTAs a rank: reached")
    assert str(plans.outcome_of(2, measured(8.0))).endswith("missed")
    for outcome in (plans.outcome_of(4, measured(1.0, nranks=4)), plans.outcome_of(2, measured(1.0, "pinned"))):
        assert outcome.reached is None
        assert str(outcome).endswith("not measured")


def test_differing_bits_are_counted() -> None:
    a = torch.tensor([1.0, float("nan"), 0.0])
    assert loopback.differing(a, a.clone()) == 0
    assert loopback.differing(a, torch.tensor([1.0, float("nan"), -0.0])) == 1


# --- output ----------------------------------------------------------------------------------------------------------


def test_table_says_that_it_is_a_loopback() -> None:
    head = plans.header(2, ENVIRONMENT, STICKS).splitlines()
    assert head[0] == "# loop-back: 2 virtual ranks on one GPU; not a network figure"
    assert all(len(plans.line(row)) == len(head[-1]) for row in [*measured(), *measured(arena="pinned", wrong=3)])


def test_json_holds_rows_goal_and_remarks() -> None:
    plan, rows = loopback.plan_of(parsed(), 132), measured(9.0)
    made = loopback.document(plan, ENVIRONMENT, 50.0, rows, {4096: 12.5}, ["no NCCL"])
    written = json.loads(json.dumps(made))
    assert written["environment"] == ENVIRONMENT
    assert "not a network figure" in written["note"]
    assert [Row(**row) for row in written["rows"]] == rows
    assert written["goals"][0]["reached"] is False
    assert (written["nccl_us"], written["remarks"], written["ranks"]) == ({"4096": 12.5}, ["no NCCL"], 2)


def test_nccl_is_left_out_with_a_reason() -> None:
    assert loopback_nccl.why_not((2, 30, 3)) == ""
    assert "2.28.9 refuses several ranks on one GPU" in loopback_nccl.why_not((2, 28, 9))
    assert loopback_nccl.measure(2, [4096], ()) == ({}, "this torch has no NCCL")


# --- the command, and its parts with a fake device -------------------------------------------------------------------


class FakeBench:
    """A device whose calls take 7 us for each 4 KiB, and whose fp16 is wrong at 1 MiB."""

    def __init__(self, nranks: int, ctas: int, largest: int) -> None:
        assert (nranks, largest) == (2, MIB)
        self.arena, self.ctas, self.time = "device", ctas, clock(7.0)

    def wrong(self, cell: Cell) -> int:
        return int(cell.codec == "fp16" and cell.size_bytes == MIB)

    def close(self) -> None:
        """Nothing to give back."""


@pytest.fixture
def fake_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """What loopback.main() asks a GPU for."""
    monkeypatch.setattr(loopback, "Bench", FakeBench)
    monkeypatch.setattr(loopback, "why_no_gpu", lambda: "")
    monkeypatch.setattr(loopback, "describe_gpu_environment", lambda: ENVIRONMENT)
    monkeypatch.setattr(loopback, "nccl_version", lambda: (2, 28, 9))
    monkeypatch.setattr(loopback, "copy_gb_s", lambda ctas: 20.0 * ctas)
    monkeypatch.setattr(loopback, "link_gb_s", lambda: 50.0)
    monkeypatch.delenv(loopback.ARENA, raising=False)


@pytest.mark.usefixtures("fake_device")
def test_a_whole_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pinned = measured(arena="pinned")
    monkeypatch.setattr(loopback, "pinned_rows", lambda plan, argv: (pinned, ""))
    argv = ["--engine", "p2p", "--virtual-ranks", "2", "-b", "4K", "-e", "1M", "-f", "256", "--max-ctas", "1,16"]
    argv += ["--json", str(tmp_path / "new" / "rows.json")]
    assert loopback.main(allreduce.parse_arguments(argv), argv) == 1
    output, complaint = capsys.readouterr()
    assert output.count("# loop-back: 2 virtual ranks on one GPU; not a network figure") == 2  # for each number of CTAs
    assert "7.0 us with 1 CTAs a rank: reached" in output
    assert "# NCCL was not measured: NCCL 2.28.9 refuses several ranks on one GPU" in output
    assert complaint.endswith("4 elements were wrong\n")  # 2 algorithms, 2 numbers of CTAs
    rows = [Row(**row) for row in json.loads((tmp_path / "new" / "rows.json").read_text())["rows"]]
    assert {row.ctas for row in rows if row.arena == "device"} == {1, 16}
    assert [row for row in rows if row.arena == "pinned"] == pinned


def test_a_child_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    argv = ["--engine", "p2p", "--virtual-ranks", "2", "-b", "4K"]
    rows, problem = loopback.pinned_rows(loopback.plan_of(allreduce.parse_arguments(argv), 132), argv)
    assert rows == []
    assert problem.startswith("allreduce: there is no GPU for virtual ranks here (")


def test_without_a_gpu_it_stops_with_the_reason() -> None:
    done = run_without_gpu(SCRIPT, "--engine", "p2p", "--virtual-ranks", "2")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("allreduce: there is no GPU for virtual ranks here (")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--virtual-ranks", "2"], "--virtual-ranks needs --engine p2p"),
        (["--engine", "p2p", "--virtual-ranks", "1"], "must be at least 2"),
        (["--max-ctas", "4"], "--max-ctas needs --virtual-ranks"),
        (["--engine", "p2p", "--virtual-ranks", "2", "--max-ctas", "4,x"], "'4,x'"),
        (["--engine", "p2p", "--virtual-ranks", "2", "--plot", "x.png"], "do not serve --virtual-ranks"),
    ],
    ids=["engine", "one-rank", "max-ctas-alone", "max-ctas", "plot"],
)
def test_bad_arguments_are_refused_in_plain_words(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        allreduce.parse_arguments(arguments)
    assert stopped.value.code == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.timeout(300)
def test_a_short_run_gives_the_cpu_engine_s_bits(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    arguments = ["--engine", "p2p", "--virtual-ranks", "2", "-b", "64K", "--max-ctas", "2", "--json", str(file)]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=280, check=False
    )
    if done.returncode == 2 and "this torch" in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr
    assert {row["wrong"] for row in json.loads(file.read_text())["rows"]} == {0}
