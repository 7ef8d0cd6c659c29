"""benchmarks/rivals.py with contenders that are small Python scripts: plans, figures, table, JSON, and who is named.

What the real contenders compute is checked by the benchmark itself, before it times them; here the planted faults make
sure that it would notice.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "rivals.py"
sys.path.append(str(SCRIPT.parent))
import rivals  # noqa: E402
from cpp import contenders  # noqa: E402
from cpp.group import Contender, ContenderError, Group  # noqa: E402
from cpp.report import Report, Row, columns_of, compare, summary, table_line  # noqa: E402

# Speaks the protocol of benchmarks/cpp/pipes.h and turns.h. The fault comes at the size of 4096 bytes.
FAKE = """
import os, sys, time
folder, rank, us, fault = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
asked, answers = open(f"{folder}/to.{rank}"), open(f"{folder}/from.{rank}", "w")
def say(*words):
    print(*words, file=answers, flush=True)
if fault == "never ready":
    time.sleep(60)
say("exchange", f"word{rank}")
assert asked.readline().split()[:2] == ["exchanged", "word0"]
say("ready", os.getpid(), "fake 1.0")
for line in asked:
    what, variant, floats, *rest = line.split()
    bad = fault if floats == "1024" else ""
    if bad == "hangs":
        time.sleep(60)
    if bad == "dies":
        print("out of luck", file=sys.stderr)
        sys.exit(3)
    if bad == "complains":
        say("failed", "no such thing")
    if what == "check":
        say("checked", 7 if bad == "wrong" and rank == 1 else 0)
    else:
        say("ran", *[int(us * 1000) * (rank + 1)] * int(rest[0]))
"""


@pytest.fixture(autouse=True)
def fewer_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals, "ROUNDS", 2)


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("fake") / "fake.py"
    file.write_text(FAKE)
    return file


def fake(script: Path, name: str, us: float, fault: str = "", variants: tuple[str, ...] = ("default",)) -> Contender:
    command = (sys.executable, "-S", str(script), "{folder}", "{rank}", str(us), fault)
    return Contender(name, variants, command, sums=name != "floor")


def measure(present: list[Contender], sizes: list[int], deadline_s: float = 30) -> Report:
    report = Report()
    rivals.measure_all(present, sizes, 2, 1.0, False, report, deadline_s)
    return report


def test_rows_hold_every_size_cache_and_variant_with_their_ratios(
    script: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    present = [
        fake(script, "floor", 1),
        fake(script, "dpcomm", 4, variants=("none/auto", "fp16/auto")),
        fake(script, "openmpi", 8),
        fake(script, "mpich", 16),
        fake(script, "probe", 2, variants=("fp32/plain/64", "fp16/plain/64")),
    ]
    report = measure(present, [4096, 8192])
    assert not report.failed
    assert not report.dropped
    found = [(row.size_bytes, row.contender, row.variant, row.cache) for row in report.rows]
    assert sorted(found) == sorted(
        (size, contender.name, variant, cache)
        for size in (4096, 8192)
        for contender in present
        for variant in contender.variants
        for cache in ("hot", "cold")
    )
    for row in (row for row in report.rows if row.contender == "dpcomm"):
        # Rank 1 says that it takes twice as long as rank 0: the slowest rank counts.
        assert (row.median_us, row.p95_us, row.floor_us) == (8, 8, 2)
        assert (row.rival, row.rival_ratio, row.probe_fraction, row.floor_fraction) == ("openmpi", 2, 0.5, 0.25)
        assert row.algbw_gb_s == pytest.approx(row.size_bytes / 8e3)
    output = capsys.readouterr().out
    assert "dpcomm none/auto" in output
    assert "probe fp16" in output
    assert "[2.00x 0.50 0.25]" in output


@pytest.mark.parametrize(
    ("fault", "words"),
    [("hangs", "no answer in time"), ("dies", "status 3. out of luck"), ("complains", "no such thing")],
)
def test_a_contender_that_fails_is_named_and_the_others_go_on(script: Path, fault: str, words: str) -> None:
    start = time.monotonic()
    report = measure([fake(script, "floor", 1), fake(script, "mpich", 2, fault)], [256, 4096, 8192], deadline_s=2)
    assert time.monotonic() - start < 10
    assert list(report.failed) == ["mpich"]
    assert "4096 bytes" in report.failed["mpich"]
    assert words in report.failed["mpich"]
    assert {row.size_bytes for row in report.rows if row.contender == "floor"} == {256, 4096, 8192}
    assert {row.size_bytes for row in report.rows if row.contender == "mpich"} == {256}
    assert any("FAILED: mpich" in line for line in summary(report))


@pytest.mark.parametrize("fault", ["never ready", ""])
def test_no_process_outlives_its_group(script: Path, fault: str) -> None:
    if fault:
        with pytest.raises(ContenderError, match="no answer in time from ranks"):
            Group(fake(script, "mpich", 1, fault), 2, pin=False, deadline_s=0.5)
        return
    group = Group(fake(script, "mpich", 1), 2, pin=False, deadline_s=30)
    pids = list(group._pids)
    assert len(pids) == 2
    group.stop()
    group.stop()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_a_program_that_cannot_be_started_is_named() -> None:
    report = measure([Contender("oneccl", ("default",), ("/nowhere/mpiexec",), launcher=True)], [256])
    assert "cannot start /nowhere/mpiexec" in report.failed["oneccl"]


def test_a_slow_contender_is_dropped_for_larger_sizes(script: Path) -> None:
    us = rivals.SLOW_CALL_S * 1e6  # of rank 0; rank 1 says twice as much
    report = measure([fake(script, "floor", 1), fake(script, "oneccl", us)], [256, 512])
    assert "above 256 bytes" in report.dropped["oneccl"]
    assert [row.size_bytes for row in report.rows if row.contender == "oneccl"] == [256, 256]
    assert all(row.calls >= rivals.MIN_CALLS for row in report.rows)


def test_wrong_elements_are_counted_and_fail_the_run(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    present = [fake(script, "floor", 1), fake(script, "dpcomm", 4, "wrong")]
    monkeypatch.setattr(contenders, "build", lambda *_: (present, {"oneccl": "no oneCCL in /here"}))
    json_file = tmp_path / "new" / "rivals.json"
    command = ["--sizes", "4K", "--seconds-per-size", "0.5", "--json", str(json_file)]
    assert rivals.main(command) == 1
    output = capsys.readouterr().out
    assert "WRONG: dpcomm default, 4096 bytes: 7 elements" in output
    assert "absent: oneccl: no oneCCL in /here" in output
    document = json.loads(json_file.read_text())
    assert document["ranks"] == 2
    assert document["absent"] == {"oneccl": "no oneCCL in /here"}
    assert document["environment"]["versions"] == {"floor": "fake 1.0", "dpcomm": "fake 1.0"}
    assert document["environment"]["cpu"]
    assert {(row["contender"], row["wrong"]) for row in document["rows"]} == {("floor", 0), ("dpcomm", 7)}
    assert rivals.main(["--sizes", "8K", "--seconds-per-size", "0.5"]) == 0


def test_contenders_are_selected_by_name_and_variant() -> None:
    assert contenders.select(["dpcomm", "dpcomm:none/ring", "mpich"]) == {
        "floor": ("copy",),
        "dpcomm": ("none/auto", "fp16/auto", "none/ring"),
        "mpich": ("default",),
    }
    with pytest.raises(ValueError, match="unknown contender 'gloo'"):
        contenders.select(["gloo"])


def test_what_is_not_installed_has_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "apt-get install mpich" in contenders.why_missing("mpich", tmp_path)
    assert "mpirun.openmpi" in contenders.why_missing("openmpi", tmp_path)
    assert "pip install oneccl-devel" in contenders.why_missing("oneccl", tmp_path)
    assert contenders.why_missing("probe", tmp_path) == ""


def test_sizes_are_whole_vectors_and_fit_into_memory() -> None:
    assert [rivals.parse_size(text) for text in ("1", "4K", "25m", "100")] == [64, 4096, 25 << 20, 128]
    for text in ("", "K", "-1", "0", "4KB"):
        with pytest.raises(ValueError, match="is not a size"):
            rivals.parse_size(text)
    assert rivals.fitting([100, 1000], nbuffers=8, available=8000) == [100]


def test_a_turn_has_as_many_calls_as_fit() -> None:
    assert rivals.turn_calls(0.01, 0.1) == 10
    assert rivals.turn_calls(5.0, 0.1) == rivals.LEAST_TURN_CALLS
    assert rivals.turn_calls(1e-9, 0.1) == rivals.MOST_TURN_CALLS


def test_a_missing_rival_leaves_a_dash(script: Path) -> None:
    rows = compare([Row("dpcomm", "none/auto", 256, "hot", 5, 2.0, 2.0, 0.1, 0)])
    assert (rows[0].rival_ratio, rows[0].floor_us, rows[0].probe_fraction) == (None, None, None)
    columns = columns_of([fake(script, "dpcomm", 1, variants=("none/auto",)), fake(script, "mpich", 1)])
    assert table_line(rows, columns).split() == ["256", "hot", "2.0", "-", "[-", "-", "-]"]
