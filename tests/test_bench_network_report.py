"""Goals, tables and the picture of benchmarks/network.py, from made-up numbers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from network_rows import (
    KIB,
    MIB,
    document,
    good_rows,
    good_training,
    label,
    picture,
    report,
    row,
    several_rows,
    train_document,
    train_report,
)

pytestmark = pytest.mark.timeout(120)


ALL = [*good_rows(), *several_rows(2), *several_rows(3)]


def verdicts(rows: list[dict[str, Any]]) -> list[bool | None]:
    return [outcome.reached for outcome in report.outcomes(rows)]


# --- goals -----------------------------------------------------------------------------------------------------------


def test_goals_are_reached_by_good_rows_and_not_judged_without_any() -> None:
    assert verdicts(ALL) == [True] * 8
    assert verdicts([]) == [None] * 8
    assert verdicts(good_rows()) == [True, True, True, None, None, None, None, True]
    # fp16 with several ranks a host is not judged by the goals of one rank each.
    assert verdicts(several_rows(2)) == [None, None, None, True, True, None, None, True]


@pytest.mark.parametrize(
    ("index", "changed", "missed"),
    [
        (2, {"ratio": 1.89}, 0),
        (2, {"ratio": math.nan}, 0),
        (2, {"line_share": 0.929}, 1),
        (5, {"ratio": 1.19}, 2),
        (7, {"ratio": 1.39}, 3),
        (8, {"ratio": 2.79}, 4),
        (12, {"ratio": 1.39}, 5),
        (13, {"ratio": 2.79}, 6),
        (1, {"ratio": 0.94}, 7),
        (4, {"ratio": 0.94}, 7),
    ],
    ids=[
        *("fp16-slow", "fp16-nan", "line", "fp16-unshaped", "2x2-none", "2x2-fp16", "3x2-none", "3x2-fp16"),
        *("none-shaped", "none-unshaped"),
    ],
)
def test_each_goal_is_missed_by_the_row_that_misses_it(index: int, changed: dict[str, float], missed: int) -> None:
    rows = [dict(each) for each in ALL]
    rows[index] |= changed
    assert verdicts(rows) == [goal != missed for goal in range(8)]
    words = report.outcomes(rows)[missed]
    assert "25 MiB" in words.measured
    assert str(words).endswith(": missed")


def test_small_sizes_count_for_none_only_and_fast_links_for_no_goal_of_the_line() -> None:
    small = [row(64 * KIB, 1.0, "dpcomm fp16/auto", 1.0, 0.5), row(64 * KIB, 1.0, "dpcomm none/auto", 1.0, 0.96)]
    fast = [row(25 * MIB, 5.0, "dpcomm fp16/auto", 40.0, 1.4)]
    fast.append(several_rows(2)[2] | {"gbit": 5.0, "ratio": 1.4})
    assert verdicts(ALL + small + fast) == [True] * 8
    small[1]["ratio"] = 0.9
    assert verdicts(ALL + small + fast) == [True] * 7 + [False]
    several = several_rows(3, 64 * KIB)
    several[3]["ratio"] = 0.5  # flat promises nothing
    assert verdicts(ALL + several) == [True] * 8
    several[1]["ratio"] = 0.5
    assert verdicts(ALL + several) == [True] * 7 + [False]


def test_a_goal_says_what_the_line_allows() -> None:
    goals = [each.goal for each in report.outcomes([])][3:7]
    allowed = [
        "(the line allows 1.50x)",
        "(the line allows 2.99x)",
        "(the line allows 1.25x)",
        "(the line allows 2.50x)",
    ]
    assert [goal[goal.index("(") :] for goal in goals] == allowed


def test_a_codec_called_auto_has_a_goal_of_its_own() -> None:
    rows = [*good_rows(), row(64 * KIB, 0.1, "dpcomm auto/auto", 9.0, 0.9)]
    (*_, last) = report.outcomes(rows)
    assert (last.goal, last.reached) == ("auto nowhere below 0.95x gloo", False)


# --- pages and pictures ----------------------------------------------------------------------------------------------


def test_page_holds_every_row_goal_and_fact() -> None:
    page = report.markdown(document(ALL))
    for each in ALL:
        assert "| " + " | ".join(report.cells(each)[2:]) + " |" in page
    for fact in (
        "abacus",
        "c0ffee",
        "## 2 hosts, 1 Gb/s",
        "## 2 hosts, unshaped",
        "## 3 hosts x 2 ranks, 1 Gb/s",
        "96.0%",
        "| reached |",
    ):
        assert fact in page
    assert "missed" not in page
    rows = good_rows()
    rows[2]["ratio"] = 1.0
    assert "**missed**" in report.markdown(document(rows))


def test_rows_of_older_files_have_one_rank_a_host() -> None:
    old, new = good_rows(), [each | {"ranks_per_host": 1, "engine": ""} for each in good_rows()]
    assert report.markdown(document(old)) == report.markdown(document(new))
    assert [report.cells(each)[0] for each in (old[0], several_rows(3)[0])] == ["2", "3x2"]


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


def test_picture_shows_every_contestant_and_the_limits_of_the_line() -> None:
    rows = [*good_rows(), row(25 * MIB, 0.1, "gloo", 2200.0, 1.0)]
    lines = drawn(rows, unshaped_at=4.0)
    names = ["gloo", "dpcomm none/auto", "dpcomm fp16/auto"]
    assert sorted(lines) == sorted([*names, *(f"_line, {name}" for name in names)])
    assert list(lines["gloo"].get_xdata()) == [0.1, 1.0, 4.0]  # unshaped last
    limits = [1e3 * 8 * 25 * MIB / rate for rate in (0.1e9, 1e9)]
    assert list(lines["_line, gloo"].get_ydata()) == pytest.approx(limits)
    assert list(lines["_line, dpcomm fp16/auto"].get_ydata()) == pytest.approx([limits[1] / 2])


def test_picture_shows_flat_against_two_levels() -> None:
    lines = drawn(several_rows(2), unshaped_at=4.0)
    ours = ["dpcomm none, two levels", "dpcomm fp16, two levels", "dpcomm none, flat", "dpcomm fp16, flat"]
    assert sorted(lines) == sorted([*(f"_line, {name}" for name in ["gloo", *ours]), "gloo", *ours])
    two, flat = (lines[f"_line, dpcomm fp16, {way}"].get_ydata()[0] for way in ("two levels", "flat"))
    assert flat == pytest.approx(2 * two)


def test_picture_has_shapes_with_several_ranks_in_a_row_of_their_own(tmp_path: Path) -> None:
    three = [each | {"hosts": 3} for each in good_rows()]
    assert picture.lines_of_shapes(ALL + three) == [[(2, 1), (3, 1)], [(2, 2), (3, 2)]]
    assert picture.lines_of_shapes(several_rows(2)) == [[(2, 2)]]
    for number, rows in enumerate([ALL + three, ALL, good_rows(), several_rows(3, MIB)]):
        picture.draw(rows, tmp_path / f"{number}.png")
        assert (tmp_path / f"{number}.png").read_bytes().startswith(b"\x89PNG")


def drawn(rows: list[dict[str, Any]], unshaped_at: float) -> dict[str, Any]:
    """The lines of a panel, by their labels."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panel = pyplot.subplots()
    colors = {label(each): "C0" for each in rows}
    picture.fill(panel, rows, unshaped_at, colors)
    pyplot.close(figure)
    return {str(line.get_label()): line for line in panel.lines}


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
