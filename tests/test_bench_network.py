"""benchmarks/network.py: its plan, figures, tables, goals and picture from made-up numbers, and a short real run."""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "network.py"
sys.path.append(str(SCRIPT.parent))
import hosts  # noqa: E402
import network  # noqa: E402
import network_plan as plans  # noqa: E402
import network_report as report  # noqa: E402
import network_train_report as train_report  # noqa: E402

KIB, MIB = 1 << 10, 1 << 20
CODECS = ["none", "fp16"]
ENVIRONMENT = {"cpu": "abacus", "cores": 2, "caches": {}, "kernel": "k", "torch": "t", "commit": "c0ffee"}
ENVIRONMENT |= {"date": "today", "load_average": 0.5}

pytestmark = pytest.mark.timeout(120)


def row(size: int, gbit: float | None, name: str, time_ms: float, ratio: float, **changed: Any) -> dict[str, Any]:
    contender, _, variant = name.partition(" ")
    sent = size * (0.5 if variant.startswith("fp16") else 1.0)
    made = {"hosts": 2, "gbit": gbit, "contender": contender, "variant": variant, "size_bytes": size, "rounds": 3}
    made |= {"calls": 9, "median_ms": time_ms, "p95_ms": 2 * time_ms, "ratio": ratio, "ratio_least": ratio - 0.1}
    made |= {"ratio_most": ratio + 0.1, "sent_bytes": sent, "counted_bytes": 1.05 * sent, "wrong": 0, "error": 0.0}
    made |= {"line_share": plans.line_share(sent, time_ms / 1e3, gbit)}
    return made | changed


def good_rows(size: int = 25 * MIB) -> list[dict[str, Any]]:
    """Each contestant at 96 % of the line at 1 Gb/s, and unshaped; every goal is reached."""
    shaped_ms = 1e3 * plans.line_s(size, 1.0) / 0.96
    rows = [row(size, 1.0, "gloo", shaped_ms, 1.0), row(size, 1.0, "dpcomm none/auto", shaped_ms, 1.0)]
    rows.append(row(size, 1.0, "dpcomm fp16/auto", shaped_ms / 2, 2.0))
    rows += [row(size, None, "gloo", 30.0, 1.0), row(size, None, "dpcomm none/auto", 29.0, 1.03)]
    return [*rows, row(size, None, "dpcomm fp16/auto", 20.0, 1.5)]


def document(rows: list[dict[str, Any]], skipped: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    return {"benchmark": "network", "environment": ENVIRONMENT, "rows": rows, "skipped": skipped or []}


def verdicts(rows: list[dict[str, Any]]) -> list[bool | None]:
    return [outcome.reached for outcome in report.outcomes(rows)]


# --- plan ------------------------------------------------------------------------------------------------------------


def test_a_rank_sends_its_part_to_add_up_and_as_much_to_give_away() -> None:
    assert plans.sent_plainly(12, 2) == 12
    assert plans.sent_plainly(12, 3) == 16
    assert plans.line_s(125_000_000, 1.0) == pytest.approx(1.0)
    assert plans.line_share(125_000_000, 2.0, 1.0) == pytest.approx(0.5)
    assert (plans.line_s(1, None), plans.line_share(1, 2.0, None)) == (0.0, None)


def test_sizes_whose_call_takes_too_long_are_left_out_and_named() -> None:
    planned = plans.runs([2, 3], [0.1, 1.0, None], [MIB, 100 * MIB])
    assert len(planned) == 6
    left_out = plans.skipped_rows(planned)
    # 100 MiB at 0.1 Gb/s: 8.4 s between two hosts, 11.2 s between three, where a rank sends 4/3 as much.
    assert [(each["hosts"], each["gbit"], each["size_bytes"]) for each in left_out] == [(3, 0.1, 100 * MIB)]
    assert left_out[0]["line_s"] == pytest.approx(11.18, abs=0.01)
    (short,) = [run for run in planned if run.skipped]
    assert short.sizes == (MIB,)
    text = report.skipped_text(left_out[0])
    assert text == "3 hosts, 0.1 Gb/s, 100 MiB: not measured, a call in fp32 takes 11.2 s on the line, more than 10 s"
    assert text in report.markdown(document(good_rows() + [row(MIB, 0.1, "gloo", 90.0, 1.0, hosts=3)], left_out))


def test_rates_are_read_and_spelled_for_tc() -> None:
    assert plans.parse_rates("0.1,5,unshaped") == [0.1, 5.0, None]
    assert [plans.tc_rate(rate) for rate in (0.1, 1.0, None)] == ["100mbit", "1000mbit", None]
    assert [plans.rate_text(rate) for rate in (0.1, 1.0, None)] == ["0.1 Gb/s", "1 Gb/s", "unshaped"]
    for text in ("0", "fast", "nan", "inf", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="expected Gb/s"):
            plans.parse_rates(text)


def test_every_codec_takes_part() -> None:
    found = plans.parse_contestants("gloo,dpcomm,dpcomm:fp16/ring", [*CODECS, "int8"])
    assert found[0] == ("gloo", "")
    assert [variant for name, variant in found if name == "dpcomm"] == [
        "none/auto",
        "fp16/auto",
        "int8/auto",
        "fp16/ring",
    ]
    for text in ("gloo,zip", "gloo,dpcomm:zip/ring", "gloo,dpcomm:fp16", "gloo,gloo:fp16"):
        with pytest.raises(ValueError, match="unknown contestant"):
            plans.parse_contestants(text, CODECS)
    with pytest.raises(ValueError, match="gloo has to take part"):
        plans.parse_contestants("dpcomm", CODECS)


def test_defaults_of_network_are_those_of_the_documentation() -> None:
    arguments = network.parse_arguments([])
    assert (arguments.hosts, arguments.rates, arguments.parts) == ([2, 3], [0.1, 1.0, 5.0, None], network.PARTS)
    assert arguments.sizes == [64 * KIB, 256 * KIB, MIB, 4 * MIB, 25 * MIB, 100 * MIB]
    assert arguments.trained == ["stock", "none", "fp16"]
    quick = network.parse_arguments(["--quick"])
    assert (quick.hosts, quick.rates, max(quick.sizes)) == ([2], [1.0], MIB)
    assert quick.seconds_per_size < arguments.seconds_per_size


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--hosts", "1"], "--hosts: 2 to 4"),
        (["--hosts", "2,5"], "--hosts: 2 to 4"),
        (["--rates", "slow"], "'slow': expected Gb/s"),
        (["--sizes", "4K,6"], "--sizes: multiples of 4"),
        (["--sizes", "4X"], "is not a size"),
        (["--trained", "zip"], "zip: expected some of stock"),
        (["--seconds-per-size", "-1"], "--seconds-per-size: 0 to 3600"),
    ],
    ids=lambda value: "".join(value).strip("-") if isinstance(value, list) else "",
)
def test_bad_network_arguments_are_refused(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        network.parse_arguments(arguments)
    assert stopped.value.code == 2
    assert complaint in capsys.readouterr().err


# --- figures ---------------------------------------------------------------------------------------------------------


def test_ratios_are_taken_within_a_round() -> None:
    """A machine that is half as fast in the second round changes both contestants' times, and no ratio."""
    from network_rank import ratios, round_medians

    gloo = round_medians([10.0, 11.0, 12.0, 20.0, 22.0], [3, 2])
    own = round_medians([5.0, 5.0, 6.0, 10.0, 11.0, 12.0], [2, 4])
    assert (gloo, own) == ([11.0, 21.0], [5.0, 10.5])
    assert ratios(gloo, own) == [2.2, 2.0]
    with pytest.raises(ValueError):
        ratios(gloo, own[:1])  # rounds that do not belong together


def test_a_communicator_on_another_engine_is_refused() -> None:
    from network_rank import checked

    class Comm:
        def __init__(self, engine: str) -> None:
            self.engine = engine

        def describe(self) -> dict[str, Any]:
            return {"engine": self.engine, "why": "told to"}

    remote: Any = Comm("gloo")
    assert checked(remote, 0)["engine"] == "gloo"
    local: Any = Comm("shm")
    with pytest.raises(RuntimeError, match=r"rank 1: engine shm \(told to\) instead of gloo"):
        checked(local, 1)


def test_what_is_counted_is_a_hosts_own_interface() -> None:
    from network_rank import interface_sent

    if not any(text.strip().startswith("eth0:") for text in Path("/proc/self/net/dev").read_text().splitlines()):
        with pytest.raises(RuntimeError, match="no interface eth0"):
            interface_sent()
    else:
        assert 0 <= interface_sent() <= interface_sent()


# --- goals -----------------------------------------------------------------------------------------------------------


def test_goals_are_reached_by_good_rows_and_not_judged_without_any() -> None:
    assert verdicts(good_rows()) == [True, True, True, True]
    assert verdicts([]) == [None, None, None, None]


@pytest.mark.parametrize(
    ("index", "changed", "missed"),
    [
        (2, {"ratio": 1.89}, 0),
        (2, {"ratio": math.nan}, 0),
        (2, {"line_share": 0.929}, 1),
        (5, {"ratio": 1.19}, 2),
        (1, {"ratio": 0.94}, 3),
        (4, {"ratio": 0.94}, 3),
    ],
    ids=["fp16-slow", "fp16-nan", "line", "fp16-unshaped", "none-shaped", "none-unshaped"],
)
def test_each_goal_is_missed_by_the_row_that_misses_it(index: int, changed: dict[str, float], missed: int) -> None:
    rows = good_rows()
    rows[index] |= changed
    assert verdicts(rows) == [goal != missed for goal in range(4)]
    words = report.outcomes(rows)[missed]
    assert "25 MiB" in words.measured
    assert str(words).endswith(": missed")


def test_small_sizes_count_for_none_only_and_fast_links_for_no_goal_of_the_line() -> None:
    small = [row(64 * KIB, 1.0, "dpcomm fp16/auto", 1.0, 0.5), row(64 * KIB, 1.0, "dpcomm none/auto", 1.0, 0.96)]
    fast = [row(25 * MIB, 5.0, "dpcomm fp16/auto", 40.0, 1.4)]
    assert verdicts(good_rows() + small + fast) == [True, True, True, True]
    small[1]["ratio"] = 0.9
    assert verdicts(good_rows() + small + fast) == [True, True, True, False]


def test_a_codec_called_auto_has_a_goal_of_its_own() -> None:
    rows = [*good_rows(), row(64 * KIB, 0.1, "dpcomm auto/auto", 9.0, 0.9)]
    (*_, last) = report.outcomes(rows)
    assert (last.goal, last.reached) == ("auto nowhere below 0.95x gloo", False)


# --- pages and pictures ----------------------------------------------------------------------------------------------


def test_page_holds_every_row_goal_and_fact() -> None:
    page = report.markdown(document(good_rows()))
    for each in good_rows():
        assert "| " + " | ".join(report.cells(each)[2:]) + " |" in page
    for fact in ("abacus", "c0ffee", "## 2 hosts, 1 Gb/s", "## 2 hosts, unshaped", "96.0%", "| reached |"):
        assert fact in page
    assert "missed" not in page
    rows = good_rows()
    rows[2]["ratio"] = 1.0
    assert "**missed**" in report.markdown(document(rows))


def test_wrong_elements_are_named() -> None:
    rows = good_rows()
    assert report.wrong_rows(rows) == []
    rows[2]["wrong"] = 7
    assert report.wrong_rows(rows) == ["2 hosts, 1 Gb/s, 25 MiB, dpcomm fp16/auto: 7 elements were wrong"]


@pytest.mark.parametrize("factor", [0.9, 1.3], ids=["too-few", "too-many"])
def test_rows_whose_bytes_were_not_counted_are_doubtful(factor: float) -> None:
    rows = good_rows()
    assert report.doubtful_rows(rows) == []
    rows[1]["counted_bytes"] = factor * rows[1]["sent_bytes"]
    (text,) = report.doubtful_rows(rows)
    assert text.startswith("2 hosts, 1 Gb/s, 25 MiB, dpcomm none/auto: sent 26214400 bytes, but ")
    assert f"**Doubtful**: {text}." in report.markdown(document(rows))
    assert report.doubtful_rows([row(64 * KIB, 1.0, "gloo", 1.0, 1.0, counted_bytes=1e9)]) == []


def test_picture_shows_every_contestant_and_the_limits_of_the_line(tmp_path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panel = pyplot.subplots()
    rows = [*good_rows(), row(25 * MIB, 0.1, "gloo", 2200.0, 1.0)]
    report._fill(panel, rows, unshaped_at=4.0)
    lines: dict[str, Any] = {str(drawn.get_label()): drawn for drawn in panel.lines}
    names = ["gloo", "dpcomm none/auto", "dpcomm fp16/auto"]
    assert sorted(lines) == sorted([*names, *(f"line, {name}" for name in names)])
    assert list(lines["gloo"].get_xdata()) == [0.1, 1.0, 4.0]  # unshaped last
    limits = [1e3 * 8 * 25 * MIB / rate for rate in (0.1e9, 1e9)]
    assert list(lines["line, gloo"].get_ydata()) == pytest.approx(limits)
    assert list(lines["line, dpcomm fp16/auto"].get_ydata()) == pytest.approx([limits[1] / 2])
    pyplot.close(figure)
    report.draw(document(rows), tmp_path / "network.png")
    assert (tmp_path / "network.png").read_bytes().startswith(b"\x89PNG")


# --- training --------------------------------------------------------------------------------------------------------


def trained(seed: int, name: str, step_ms: float, loss: float, **changed: Any) -> dict[str, Any]:
    made = {"seed": seed, "contestant": name, "step_ms": step_ms, "step_p95_ms": step_ms, "compute_ms": 60.0}
    made |= {"alone_ms": 250.0, "final_loss": loss, "replicas_identical": True, "speedup": 300.0 / step_ms}
    return made | changed


def good_training() -> list[dict[str, Any]]:
    """Final losses of the seeds vary by 0.02, those of the codecs by less."""
    rows = []
    for seed, loss in enumerate((2.30, 2.32, 2.34)):
        rows += [trained(seed, train_report.STOCK, 300.0, loss), trained(seed, train_report.NONE, 290.0, loss)]
        rows.append(trained(seed, train_report.FP16, 170.0, loss + 1e-4))
    return rows


def train_document(rows: list[dict[str, Any]]) -> dict[str, Any]:
    settings = plans.TrainPlan(seeds=3)._asdict()
    made = {"benchmark": "train-network", "ranks": 2, "environment": ENVIRONMENT, "settings": settings}
    return made | {"rows": rows}


def test_goals_of_training_are_reached_by_good_rows_and_not_judged_without_any() -> None:
    assert [each.reached for each in train_report.outcomes(good_training())] == [True] * 4
    assert [each.reached for each in train_report.outcomes([])] == [None] * 4
    assert train_report.seed_noise(good_training()) == pytest.approx(0.02)
    one_seed = [each for each in good_training() if each["seed"] == 0]
    assert [each.reached for each in train_report.outcomes(one_seed)] == [True, True, None, None]


@pytest.mark.parametrize(
    ("name", "changed", "missed"),
    [
        (train_report.STOCK, {"compute_ms": 76.0}, 0),
        (train_report.FP16, {"speedup": 1.59}, 1),
        (train_report.NONE, {"final_loss": 2.40}, 2),
        (train_report.FP16, {"final_loss": math.nan}, 3),
    ],
    ids=["little-communication", "slow", "loss-none", "loss-nan"],
)
def test_each_goal_of_training_is_missed_by_rows_that_miss_it(
    name: str, changed: dict[str, float], missed: int
) -> None:
    rows = [each | changed if each["contestant"] == name else each for each in good_training()]
    assert [each.reached for each in train_report.outcomes(rows)] == [goal != missed for goal in range(4)]


def test_page_of_training_holds_contestants_and_seeds() -> None:
    page = train_report.markdown(train_document(good_training()))
    for fact in ("3 seeds", "| dpcomm fp16 | 170.0 | 1.76 | 65% |", "2.0e-02", "+1.0e-04", "| reached |", "abacus"):
        assert fact in page
    assert page.count("| stock DDP, gloo |") == 4  # in the summary, and once a seed
    assert "DIFFER" not in page


def test_replicas_that_differ_across_hosts_are_named() -> None:
    rows = good_training()
    assert train_report.differing(rows) == []
    rows[2]["replicas_identical"] = False
    assert train_report.differing(rows) == ["seed 0, dpcomm fp16: replicas differed"]
    assert "**DIFFER**" in train_report.markdown(train_document(rows))


# --- files and real runs ---------------------------------------------------------------------------------------------


def test_pages_are_rendered_from_the_json_files_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = good_rows()
    rows[1]["wrong"] = 3
    (tmp_path / "network.json").write_text(json.dumps(document(rows)))
    (tmp_path / "train-network.json").write_text(json.dumps(train_document(good_training())))
    assert network.main(["--render", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert "3 elements were wrong" in said.err
    assert said.out.count(": reached") == 8
    left = json.loads((tmp_path / "network.json").read_text())
    assert [goal["reached"] for goal in left["goals"]] == [True] * 4
    assert {file.name for file in tmp_path.iterdir()} == {
        *("network.json", "network.md", "network.png"),
        *("train-network.json", "train-network.md"),
    }


def run_benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--quick", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


@pytest.fixture
def permitted() -> None:
    if reason := hosts.why_no_hosts():
        pytest.skip(reason)


@pytest.mark.usefixtures("permitted")
def test_quick_run_measures_every_contestant_between_two_hosts(tmp_path: Path) -> None:
    done = run_benchmark("--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "network.json").read_text())
    names = [("gloo", ""), ("fp16_compress_hook", ""), ("dpcomm", "none/auto"), ("dpcomm", "fp16/auto")]
    for size in plans.QUICK_SIZES:
        rows = {(row["contender"], row["variant"]): row for row in found["rows"] if row["size_bytes"] == size}
        assert set(names) <= set(rows)
        for each in rows.values():
            assert report.line(each) in done.stdout
            assert each["wrong"] == 0
            assert 0 < each["median_ms"] <= each["p95_ms"]
            assert each["ratio_least"] <= each["ratio"] <= each["ratio_most"]
            assert each["line_share"] == pytest.approx(8 * each["sent_bytes"] / each["median_ms"] / 1e6)
        # A ring's bytes for gloo; dpcomm's own count is what its interface counted, short of headers.
        assert rows[names[0]]["sent_bytes"] == size
        assert 0.4 < rows[names[3]]["sent_bytes"] / rows[names[2]]["sent_bytes"] < 0.6
    assert report.doubtful_rows(found["rows"]) == []
    assert found["communicator"]["engine"] == "gloo"
    assert found["environment"]["torch"]
    training = json.loads((tmp_path / "train-network.json").read_text())
    assert [row["contestant"] for row in training["rows"]] == 2 * [train_report.STOCK, "dpcomm none", "dpcomm fp16"]
    assert all(row["replicas_identical"] for row in training["rows"])
    assert (tmp_path / "network.png").read_bytes().startswith(b"\x89PNG")
    assert done.stdout.count("goal: ") == 8


@pytest.mark.usefixtures("permitted")
def test_wrong_results_between_hosts_fail_the_run(tmp_path: Path) -> None:
    flags = ["--parts", "allreduce", "--sizes", "4K", "--contestants", "gloo,fp16_compress_hook"]
    done = run_benchmark(*flags, "--corrupt", "fp16_compress_hook", "--out", str(tmp_path))
    assert done.returncode == 1, done.stderr
    assert "fp16_compress_hook: 2 elements were wrong" in done.stderr
    assert "gloo: 2" not in done.stderr


@pytest.mark.usefixtures("permitted")
def test_replicas_that_differ_between_hosts_fail_the_run(tmp_path: Path) -> None:
    done = run_benchmark("--parts", "train", "--trained", "stock,forgetful", "--out", str(tmp_path))
    assert done.returncode == 1, done.stderr
    assert "seed 1, forgetful: replicas differed" in done.stderr
    assert "stock DDP, gloo: replicas differed" not in done.stderr


@pytest.mark.usefixtures("permitted")
def test_a_rank_that_fails_ends_the_run(tmp_path: Path) -> None:
    done = run_benchmark("--parts", "allreduce", "--contestants", "gloo,dpcomm:none/pigeon", "--out", str(tmp_path))
    assert done.returncode == 2
    assert "pigeon" in done.stderr
    assert "a rank ended with status 1" in done.stderr
    assert not list(tmp_path.iterdir())
