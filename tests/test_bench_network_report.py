"""Goals, tables and the picture of benchmarks/network.py, from made-up numbers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from network_rows import KIB, MIB, document, good_rows, good_training, report, row, train_document, train_report

pytestmark = pytest.mark.timeout(120)


def verdicts(rows: list[dict[str, Any]]) -> list[bool | None]:
    return [outcome.reached for outcome in report.outcomes(rows)]


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
