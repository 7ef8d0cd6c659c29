"""benchmarks/report.py and smoke.py: plans, turns, what is computed from rows, the page, and who is absent or wrong."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.append(str(SCRIPTS))
import analysis  # noqa: E402
import goals  # noqa: E402
import launch  # noqa: E402
import render  # noqa: E402
import report  # noqa: E402
import smoke  # noqa: E402
from contestants import select  # noqa: E402

KIB, MIB = 1 << 10, 1 << 20
QUICK = ["--ranks", "2", "--sizes", "4K,64K", "--seconds-per-size", "0"]

pytestmark = pytest.mark.timeout(120)


def row(contender: str, variant: str, size: int, us: float, cache: str = "hot", wrong: int = 0) -> dict[str, Any]:
    found = {"contender": contender, "variant": variant, "size_bytes": size, "cache": cache, "calls": 5}
    return found | {"median_us": us, "p95_us": 2 * us, "wrong": wrong}


def document(level: str, ranks: int, rows: list[dict[str, Any]]) -> dict[str, Any]:
    environment = {
        "cpu": "abacus",
        "cores": 2,
        "caches": {"L3": "1 KiB"},
        "kernel": "k",
        "torch": "t",
        "commit": "c0ffee",
    }
    environment |= {"date": "today", "load_average": 0.5}
    return {"benchmark": level, "ranks": ranks, "environment": environment, "rows": rows, "absent": {}}


def python_rows(
    none: float = 10.0, fp16: float = 9.0, openmpi: float = 20.0, ring: float = 9.5
) -> list[dict[str, Any]]:
    """One size, 64 KiB, with the times given."""
    times = {("floor", "copy"): 5.0, ("gloo", ""): 200.0, ("openmpi", ""): openmpi, ("fp16_compress_hook", ""): 300.0}
    times |= {("dpcomm", "none/auto"): none, ("dpcomm", "none/ring"): ring, ("dpcomm", "fp16/auto"): fp16}
    return [row(*key, 64 * KIB, us) for key, us in times.items()]


def cpp_rows(sizes: list[int]) -> list[dict[str, Any]]:
    """Ours take 10 us with none, 8 with fp16; rivals 30 and 15; probes 9 and 8; the floor 7.6."""
    times = {("floor", "copy"): 7.6, ("dpcomm", "none/auto"): 10.0, ("dpcomm", "fp16/auto"): 8.0}
    times |= {("openmpi", "default"): 30.0, ("mpich", "default"): 15.0}
    times |= {("probe", "fp32/plain/64"): 9.0, ("probe", "fp32/plain/1024"): 50.0, ("probe", "fp16/plain/64"): 8.0}
    return [row(*key, size, us) for size in sizes for key, us in times.items()]


# ---- what is computed --------------------------------------------------------------------------------------------
def test_nothing_is_lost_where_everybody_else_is_slower() -> None:
    assert analysis.losses(document("python", 2, python_rows())) == []


def test_losses_are_against_rivals_none_and_other_algorithms() -> None:
    found = analysis.losses(document("python", 4, python_rows(none=30.0, fp16=31.0)))
    assert [(loss.kind, loss.ours, loss.other) for loss in found] == [
        ("rival", "dpcomm none/auto", "openmpi"),
        ("algorithm", "dpcomm none/auto", "dpcomm none/ring"),
        ("rival", "dpcomm fp16/auto", "openmpi"),
        ("codec", "dpcomm fp16/auto", "dpcomm none/auto"),
    ]
    assert found[0].factor == pytest.approx(1.5)
    assert {loss.ranks for loss in found} == {4}


def test_states_of_the_cache_are_not_mixed() -> None:
    cold = [dict(each, cache="cold", median_us=1.0) for each in python_rows() if each["contender"] == "openmpi"]
    mixed = document("python", 2, [*python_rows(), *cold])
    assert analysis.losses(mixed) == []
    assert analysis.best_rival(mixed)[64 * KIB]["median_us"] == 20.0


def test_the_fastest_variant_stands_for_a_contender() -> None:
    probes = analysis.rows_of(document("rivals", 2, cpp_rows([MIB])), "probe", "fp32")
    assert probes[MIB]["variant"] == "fp32/plain/64"


def outcome(documents: list[dict[str, Any]], level: str, ranks: int, words: str) -> goals.Outcome:
    by_key = {(each["benchmark"], each["ranks"]): each for each in documents}
    (found,) = [o for o in goals.outcomes(by_key) if (o.level, o.ranks) == (level, ranks) and words in o.goal]
    return found


@pytest.mark.parametrize(("none", "reached"), [(11.0, True), (11.2, False)])
def test_goal_over_gloo(none: float, reached: bool) -> None:
    found = outcome([document("python", 2, python_rows(none=none))], "python", 2, "18x gloo at 64 KiB")
    assert found.reached is reached
    assert found.measured == f"{200 / none:.2f}"


@pytest.mark.parametrize(("openmpi", "two", "eight"), [(9.9, False, False), (11.0, False, True), (12.0, True, True)])
def test_goals_over_open_mpi(openmpi: float, two: bool, eight: bool) -> None:
    both = [document("python", ranks, python_rows(openmpi=openmpi)) for ranks in (2, 8)]
    assert outcome(both, "python", 2, "Open MPI").reached is two
    assert outcome(both, "python", 8, "Open MPI").reached is eight
    assert outcome(both, "python", 8, "gloo").reached is True
    assert outcome(both, "python", 4, "gloo").reached is None


def test_goals_in_cpp() -> None:
    one = [document("rivals", 2, cpp_rows([4 * KIB, 64 * KIB, 8 * MIB]))]
    assert outcome(one, "rivals", 2, "none at least 1.3x").measured == "1.50, least of 3 sizes, at 4 KiB"
    assert "(without oneccl)" in outcome(one, "rivals", 2, "none at least 1.3x").goal
    assert outcome(one, "rivals", 2, "geometric mean")[3:] == ("1.50x", False)
    assert outcome(one, "rivals", 2, "fp16 at least 1.5x").reached is True
    assert outcome(one, "rivals", 2, "none at least 80 %")[3:] == ("0.90", True)
    assert outcome(one, "rivals", 2, "none at least 75 %")[3:] == ("0.76", True)
    assert outcome(one, "rivals", 2, "fp16 at least 75 %")[3:] == ("0.95", True)


def test_without_results_no_goal_is_reached_or_missed() -> None:
    assert {found.reached for found in goals.outcomes({})} == {None}
    wrong_sizes = document("python", 2, [row("gloo", "", 100, 9.0), row("dpcomm", "none/auto", 100, 1.0)])
    assert outcome([wrong_sizes], "python", 2, "gloo at 4 KiB").reached is None
    assert outcome([wrong_sizes], "python", 2, "4 KiB under").reached is None


# ---- the page ----------------------------------------------------------------------------------------------------
def test_the_page_comes_from_the_files_alone(tmp_path: Path) -> None:
    python = document("python", 2, python_rows(none=30.0)) | {"absent": {"openmpi": "no mpirun\n on PATH"}}
    python["rows"][1]["wrong"] = 3
    (tmp_path / "python-2ranks.json").write_text(json.dumps(python))
    cpp = document("rivals", 8, cpp_rows([MIB])) | {"failed": {"oneccl": "tired"}}
    (tmp_path / "rivals-8ranks.json").write_text(json.dumps(cpp))
    (tmp_path / "allreduce-2ranks.json").write_text("{}")  # another benchmark's
    assert report.main(["--render", "--out", str(tmp_path)]) == 0
    page = (tmp_path / "report.md").read_text()
    for words in (
        "| Python | 2 | 64 KiB | hot | dpcomm none/auto | 30.0 | openmpi | 20.0 | 1.50 |",
        "| Python | 2 | none at least 18x gloo at 64 KiB | 6.67 | **missed** |",
        "- Absent: openmpi: no mpirun on PATH",
        "- **Failed**: oneccl: tired",
        "- **Wrong**: gloo, 64 KiB, hot: 3 elements",
        "| 1 MiB | 7.6 | 30.0 | 15.0 | 9.0 | 8.0 | 10.0 | 8.0 | mpich | 1.50x | 1.88x | 76% | 95% |",
    ):
        assert words in page
    for picture in ("python-2ranks.png", "rivals-8ranks.png"):
        assert f"]({picture})" in page
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_a_page_without_losses_says_so() -> None:
    assert render.report({}).count("Nowhere in these results.") == 3


# ---- plans -------------------------------------------------------------------------------------------------------
def test_the_floor_always_takes_part_and_variants_can_be_picked() -> None:
    assert select(["gloo", "dpcomm:none/ring"]) == [("floor", "copy"), ("gloo", ""), ("dpcomm", "none/ring")]
    assert len(select(["dpcomm"])) == 1 + 2 * 4


@pytest.mark.parametrize("name", ["pigeon", "dpcomm:none/pigeon", "gloo:fast"])
def test_unknown_contestants_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="unknown contestant"):
        select([name])


def test_defaults_are_those_of_the_documentation() -> None:
    arguments = report.parse_arguments([])
    assert arguments.ranks == [2, 4, 8]
    assert (min(arguments.sizes), max(arguments.sizes)) == (256, 256 * MIB)
    assert {64 * KIB, 25 * MIB, 100 * MIB} < set(arguments.sizes)
    for ranks, minutes in ((2, 6), (4, 5), (8, 5)):
        plan = report.plan_of(arguments, ranks, {})
        assert plan["seconds_per_size"] * len(plan["sizes"]) < 60 * minutes
        assert plan["caches"] == ["hot", "cold"]
    assert ("openmpi", "") in plan["contestants"]
    assert ("openmpi", "") not in report.plan_of(arguments, 2, {"openmpi": "asleep"})["contestants"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--ranks", "1"], "one rank has nothing"),
        (["--ranks", "two"], "invalid literal"),
        (["--sizes", "6"], "multiples of 4"),
        (["--sizes", "4X"], "is not a size"),
        (["--seconds-per-size", "nan"], "--seconds-per-size"),
        (["--threads", "0"], "--threads"),
    ],
    ids=lambda value: "-".join(value).strip("-") if isinstance(value, list) else "",
)
def test_bad_arguments_are_refused(arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        report.parse_arguments(arguments)
    assert stopped.value.code == 2
    assert complaint in capsys.readouterr().err


# ---- real runs ---------------------------------------------------------------------------------------------------
def test_open_mpi_that_is_absent_is_named_and_the_rest_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch, "mpirun", lambda: None)
    assert report.main([*QUICK, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "python-2ranks.json").read_text())
    assert "apt-get install openmpi-bin" in found["absent"]["openmpi"]
    assert "openmpi" in capfd.readouterr().out
    names = {each["contender"] for each in found["rows"]}
    assert names == {"floor", "gloo", "fp16_compress_hook", "dpcomm"}
    assert len(found["rows"]) == 2 * 2 * 11  # two sizes, hot and cold, eight of them dpcomm's
    for each in found["rows"]:
        assert each["wrong"] == 0
        assert 0 < each["median_us"] <= each["p95_us"]
        assert each["calls"] >= 3
        assert each["floor_fraction"] == pytest.approx(each["floor_us"] / each["median_us"])
        exact = each["contender"] in ("floor", "gloo") or each["variant"].startswith("none/")
        assert each["error"] == 0 if exact else 1e-5 < each["error"] < 1e-3
    for fact in ("date", "command", "cpu", "kernel", "python", "torch", "communicator", "dpcomm", "compiler"):
        assert found["environment"][fact], fact
    assert found["environment"]["flush_bytes"] >= 64 * MIB
    assert "Absent: openmpi" in (tmp_path / "report.md").read_text()


def test_open_mpi_takes_part_where_it_is_installed(tmp_path: Path) -> None:
    if reason := launch.why_no_openmpi():
        pytest.skip(reason)
    chosen = ["--contestants", "openmpi,gloo,dpcomm:none/auto"]
    assert report.main([*QUICK, *chosen, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "python-2ranks.json").read_text())
    assert "Open MPI" in found["environment"]["mpi"]
    assert {each["wrong"] for each in found["rows"] if each["contender"] == "openmpi"} == {0}


@pytest.mark.parametrize("name", ["fp16_compress_hook", "dpcomm"])
def test_a_contestant_that_computes_nonsense_fails_the_run(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = ["--contestants", "gloo,fp16_compress_hook,dpcomm:fp16/ring", "--sizes", "4K", "--out", str(tmp_path)]
    assert report.main([*QUICK, *chosen, "--corrupt", name]) == 1
    found = json.loads((tmp_path / "python-2ranks.json").read_text())
    assert {each["contender"] for each in found["rows"] if each["wrong"] == 1} == {name}
    assert f"2 ranks, {name}" in capsys.readouterr().err


def test_a_rank_that_fails_ends_all_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    plan = report.plan_of(report.parse_arguments(QUICK), 2, {"openmpi": ""}) | {"contestants": [("pigeon", "")]}
    begin = time.monotonic()
    with pytest.raises(launch.LaunchError, match="a rank ended with status 1"):
        launch.run_ranks(plan, with_mpirun=False, deadline_s=60)
    assert time.monotonic() - begin < 30
    assert "KeyError: 'pigeon'" in capfd.readouterr().err


def test_ranks_that_do_not_end_are_killed() -> None:
    processes = launch.start([sys.executable, "-c", "import time; time.sleep(60)"], 2, with_mpirun=False)
    with pytest.raises(launch.LaunchError, match="in time"):
        launch.wait(processes, time.monotonic())
    launch.stop(processes)
    assert all(process.poll() is not None for process in processes)


def test_more_ranks_than_processors_yield_under_mpirun() -> None:
    cores = len(os.sched_getaffinity(0))
    assert "mpi_yield_when_idle" in launch.mpirun_command(cores + 1)
    assert "mpi_yield_when_idle" not in launch.mpirun_command(cores)


# ---- make bench-smoke --------------------------------------------------------------------------------------------
def test_smoke_sets_ratios_beside_the_committed_ones() -> None:
    now = document("python", 2, python_rows(none=100.0))
    before = document("python", 2, python_rows(none=10.0))
    lines = [line.split() for line in smoke.table(now, before).splitlines()]
    assert lines[1] == ["64", "KiB", "none", "100.0", "200.0", "2.00", "20.00", "0.10"]
    assert smoke.table(now, None).splitlines()[1].split()[-2:] == ["-", "-"]


def test_smoke_does_not_fail_on_slow_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A thousand times slower than gloo, and than what was committed: information."""
    (tmp_path / "python-2ranks.json").write_text(json.dumps(document("python", 2, python_rows())))
    monkeypatch.setattr(smoke, "measure", lambda plan, absent: document("python", 2, python_rows(none=2e5, fp16=2e5)))
    assert smoke.main(["--committed", str(tmp_path)]) == 0
    assert "0.00" in capsys.readouterr().out


def test_smoke_fails_on_wrong_results() -> None:
    command = [sys.executable, str(SCRIPTS / "smoke.py"), "--sizes", "4K", "--seconds-per-size", "0"]
    done = subprocess.run([*command, "--corrupt", "dpcomm"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1, done.stderr
    assert "1 elements were wrong" in done.stderr
