"""benchmarks/network.py: its plan and figures from made-up numbers, and a short real run.

Goals, pages and the picture: test_bench_network_report.py.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from network_rows import (
    KIB,
    MIB,
    SCRIPT,
    document,
    good_rows,
    good_training,
    hosts,
    network,
    plans,
    report,
    row,
    several_rows,
    train_document,
    train_report,
)
from ranks import Pool

CODECS = ["none", "fp16"]

pytestmark = pytest.mark.timeout(120)


# --- plan ------------------------------------------------------------------------------------------------------------


def test_a_rank_sends_its_part_to_add_up_and_as_much_to_give_away() -> None:
    assert plans.sent_plainly(12, 2) == 12
    assert plans.sent_plainly(12, 3) == 16
    assert plans.line_s(125_000_000, 1.0) == pytest.approx(1.0)
    assert plans.line_share(125_000_000, 2.0, 1.0) == pytest.approx(0.5)
    assert (plans.line_s(1, None), plans.line_share(1, 2.0, None)) == (0.0, None)


def test_a_host_sends_less_in_two_levels_and_how_much_sooner_that_ends() -> None:
    assert plans.gain_at_line_rate(2, 2) == pytest.approx(1.5)
    assert plans.gain_at_line_rate(3, 2) == pytest.approx(1.25)
    assert plans.gain_at_line_rate(2, 2, "fp16") == pytest.approx(2 * 1.5 * 512 / 513)
    assert plans.gain_at_line_rate(4, 1) == pytest.approx(1.0)
    # Four ranks: a third of what a rank sends stays on its host; of a ring's four edges two leave one.
    assert plans.leaving_share("direct", 2, 2) == pytest.approx(2 / 3)
    assert plans.leaving_share("native", 2, 2) == plans.leaving_share("ring", 3, 2) == 0.5
    assert plans.leaving_share("oneshot", 3, 1) == plans.leaving_share("ring", 3, 1) == 1.0


def test_shapes_are_read_and_spelled() -> None:
    assert plans.parse_shapes("2x1,3x2,2x1") == [(2, 1), (3, 2)]
    assert [plans.shape_text(2, 1), plans.shape_text(3, 2)] == ["2 hosts", "3 hosts x 2 ranks"]
    assert plans.shape_of({"hosts": 3}) == (3, 1)  # as older files have it
    for text in ("2", "1x2", "5x1", "2x0", "2x2x2", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="expected hosts x ranks"):
            plans.parse_shapes(text)


def test_several_ranks_a_host_have_fewer_sizes() -> None:
    planned = plans.runs([(2, 1), (2, 2)], [0.1, 1.0, None], [])
    assert [run.sizes for run in planned[:3]] == 3 * [plans.SIZES]
    assert [max(run.sizes) for run in planned[3:]] == [25 * MIB, 100 * MIB, 100 * MIB]
    assert 256 * KIB not in planned[4].sizes
    assert [run.nranks for run in planned] == [2, 2, 2, 4, 4, 4]
    asked = plans.runs([(2, 2)], [0.1], [8 * KIB])
    assert asked[0].sizes == (8 * KIB,)


def test_the_default_run_is_planned_for_less_than_its_limit() -> None:
    """Without the start of processes and what is verified: docs/benchmarks.md has what it takes."""
    seconds = sum(
        plans.planned_s(run, plans.SECONDS_PER_SIZE) for run in plans.runs([*plans.SHAPES], [*plans.RATES], [])
    )
    assert 600 < seconds + plans.train_s(plans.TrainPlan()) < 20 * 60


def test_sizes_whose_call_takes_too_long_are_left_out_and_named() -> None:
    planned = plans.runs([(2, 1), (3, 1)], [0.1, 1.0, None], [MIB, 100 * MIB])
    assert len(planned) == 6
    left_out = plans.skipped_rows(planned)
    # 100 MiB at 0.1 Gb/s: 8.4 s between two hosts, 11.2 s between three, where a rank sends 4/3 as much.
    assert [(each["hosts"], each["gbit"], each["size_bytes"]) for each in left_out] == [(3, 0.1, 100 * MIB)]
    assert left_out[0]["line_s"] == pytest.approx(11.18, abs=0.01)
    (short,) = [run for run in planned if run.skipped]
    assert short.sizes == (MIB,)
    text = report.skipped_text(left_out[0])
    assert (
        text
        == "3 hosts, 0.1 Gb/s, 100 MiB: not measured, a call without a codec takes 11.2 s on the line, more than 10 s"
    )
    assert text in report.markdown(document(good_rows() + [row(MIB, 0.1, "gloo", 90.0, 1.0, hosts=3)], left_out))


def test_rates_are_read_and_spelled_for_tc() -> None:
    assert plans.parse_rates("0.1,5,unshaped") == [0.1, 5.0, None]
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
    for text, names in ((plans.contestants_of("float32"), 6), (plans.contestants_of("bfloat16"), 3)):
        assert len(plans.parse_contestants(text, CODECS)) == names
    for text in ("gloo,zip", "gloo,dpcomm:zip/ring", "gloo,dpcomm:fp16", "gloo,gloo:fp16"):
        with pytest.raises(ValueError, match="unknown contestant"):
            plans.parse_contestants(text, CODECS)
    with pytest.raises(ValueError, match="gloo has to take part"):
        plans.parse_contestants("dpcomm", CODECS)


def test_defaults_of_network_are_those_of_the_documentation() -> None:
    arguments = network.parse_arguments([])
    assert arguments.shapes == [(2, 1), (3, 1), (2, 2), (3, 2)]
    assert (arguments.rates, arguments.parts) == ([0.1, 1.0, 5.0, None], network.PARTS)
    assert arguments.sizes == []
    assert plans.default_sizes(1, 0.1) == (64 * KIB, 256 * KIB, MIB, 4 * MIB, 25 * MIB, 100 * MIB)
    assert plans.default_sizes(2, 1.0) == (64 * KIB, MIB, 4 * MIB, 25 * MIB, 100 * MIB)
    assert plans.default_sizes(2, 0.1) == (64 * KIB, MIB, 4 * MIB, 25 * MIB)
    assert arguments.trained == ["stock", "none", "fp16"]
    quick = network.parse_arguments(["--quick"])
    assert (quick.shapes, quick.rates, max(quick.sizes)) == ([(2, 1), (2, 2)], [1.0], MIB)
    assert quick.seconds_per_size < arguments.seconds_per_size


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--shapes", "1x2"], "'1x2': expected hosts x ranks on each"),
        (["--shapes", "2x1,5x1"], "'5x1': expected hosts x ranks on each"),
        (["--rates", "slow"], "'slow': expected Gb/s"),
        (["--sizes", "4K,6"], "--sizes: multiples of 4"),
        (["--sizes", "4X"], "is not a size"),
        (["--dtype", "int8"], "choose from"),
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
    with pytest.raises(RuntimeError, match=r"rank 3: engine gloo \(told to\) instead of two_level"):
        checked(remote, 3, "two_level")


def test_bytes_that_stay_on_a_host_are_not_its_lines() -> None:
    from network_bytes import leaving_share

    two_by_two = (2, 2)
    assert leaving_share("two_level", "fp16/auto", MIB, two_by_two) == 1.0  # counts no others
    assert leaving_share("two_level", "fp16/ring", MIB, two_by_two) == 0.5
    assert leaving_share("gloo", "fp16/auto", MIB, two_by_two) == pytest.approx(2 / 3)
    assert leaving_share("gloo", "none/auto", MIB, two_by_two) == 0.5  # gloo's own ring
    assert leaving_share("gloo", "none/auto", MIB, (3, 1)) == 1.0
    assert leaving_share("gloo", "none/auto", MIB, two_by_two, "bfloat16") == pytest.approx(2 / 3)  # direct


def test_precision_of_bfloat16_is_what_each_rounds() -> None:
    from contestants import Contestant
    from network_rank import precision_in

    def roundings(name: str, variant: str, engine: str, dtype: torch.dtype = torch.bfloat16) -> tuple[float, int]:
        each = Contestant(name, variant, torch.Tensor.zero_, torch.Tensor.zero_)
        return precision_in(dtype, each, engine, 6)[:2]

    unit = 2.0**-8
    assert roundings("gloo", "", "") == (unit, 6)  # values, five additions
    assert roundings("flat", "none/auto", "gloo") == (unit, 2)  # values, the sum
    assert roundings("dpcomm", "none/auto", "two_level") == (unit, 3)
    assert roundings("dpcomm", "none/direct", "two_level") == (unit, 2)
    assert roundings("dpcomm", "none/ring", "gloo") == (unit, 6)
    assert roundings("dpcomm", "none/auto", "two_level", torch.float32) == (0.0, 0)


def verify_spoiled(rank: int, nranks: int, corrupt: str | None) -> int:
    import torch.distributed as dist
    from verification import precision_of_sixteen_bits, verify

    precision = precision_of_sixteen_bits(torch.bfloat16, nranks)
    return verify(dist.all_reduce, 1001, precision, corrupt, torch.bfloat16).wrong


@pytest.mark.parametrize(("corrupt", "wrong"), [(None, 0), ("bit", 1), ("value", 2)])
def test_one_wrong_bit_of_bfloat16_is_noticed(pool: Callable[[int], Pool], corrupt: str | None, wrong: int) -> None:
    """A bit, on one of two ranks, is within the bound, but not the same; a value is wrong on both."""
    assert pool(2).run(verify_spoiled, corrupt) == [wrong] * 2


def test_what_is_counted_is_a_hosts_own_interface() -> None:
    from network_bytes import interface_sent

    if not any(text.strip().startswith("eth0:") for text in Path("/proc/self/net/dev").read_text().splitlines()):
        with pytest.raises(RuntimeError, match="no interface eth0"):
            interface_sent()
    else:
        assert 0 <= interface_sent() <= interface_sent()


# --- files and real runs ---------------------------------------------------------------------------------------------


def test_pages_are_rendered_from_the_json_files_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*good_rows(), *several_rows(2), *several_rows(3)]
    rows[1]["wrong"] = 3
    (tmp_path / "network.json").write_text(json.dumps(document(rows)))
    (tmp_path / "train-network.json").write_text(json.dumps(train_document(good_training())))
    assert network.main(["--render", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert "3 elements were wrong" in said.err
    assert said.out.count(": reached") == 12
    left = json.loads((tmp_path / "network.json").read_text())
    assert [goal["reached"] for goal in left["goals"]] == [True] * 8
    assert {file.name for file in tmp_path.iterdir()} == {
        *("network.json", "network.md", "network.png"),
        *("train-network.json", "train-network.md"),
    }


def rows_of(found: dict[str, Any], shape: tuple[int, int], size: int) -> dict[tuple[str, str], dict[str, Any]]:
    rows = [row for row in found["rows"] if plans.shape_of(row) == shape and row["size_bytes"] == size]
    return {(row["contender"], row["variant"]): row for row in rows}


def run_benchmark(*arguments: str, timeout_s: float = 100) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--quick", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)


@pytest.fixture
def permitted() -> None:
    if reason := hosts.why_no_hosts():
        pytest.skip(reason)


@pytest.mark.usefixtures("permitted")
@pytest.mark.timeout(300)
def test_quick_run_measures_every_contestant_between_two_hosts(tmp_path: Path) -> None:
    done = run_benchmark("--out", str(tmp_path), timeout_s=280)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "network.json").read_text())
    names = [("gloo", ""), ("fp16_compress_hook", ""), ("dpcomm", "none/auto"), ("dpcomm", "fp16/auto")]
    for size in plans.QUICK_SIZES:
        rows = rows_of(found, (2, 1), size)
        assert set(names) == set(rows)
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
    assert done.stdout.count("goal: ") == 12
    for size in plans.QUICK_SIZES:
        rows = rows_of(found, (2, 2), size)
        assert set(rows) == {*names, ("flat", "none/auto"), ("flat", "fp16/auto")}
        engines = {name: {row["engine"] for key, row in rows.items() if key[0] == name} for name, _ in rows}
        assert engines == {"gloo": {""}, "fp16_compress_hook": {""}, "dpcomm": {"two_level"}, "flat": {"gloo"}}
        assert all(row["wrong"] == 0 for row in rows.values())
        # One edge of gloo's ring leaves each host; in two levels half of each shard does, and as much of results.
        assert rows[names[0]]["sent_bytes"] == 1.5 * size
        assert rows[names[2]]["sent_bytes"] == size
        assert rows["flat", "fp16/auto"]["sent_bytes"] == pytest.approx(2 * rows[names[3]]["sent_bytes"], rel=0.01)
    assert found["two_levels"]["hosts"] == [[0, 1], [2, 3]]


@pytest.mark.usefixtures("permitted")
def test_bfloat16_has_files_and_contestants_of_its_own(tmp_path: Path) -> None:
    flags = ["--parts", "allreduce", "--dtype", "bfloat16", "--shapes", "2x2", "--sizes", "1M", "--out", str(tmp_path)]
    done = run_benchmark(*flags)
    assert done.returncode == 0, done.stderr
    assert {file.name for file in tmp_path.iterdir()} == {f"network-bfloat16{end}" for end in (".json", ".md", ".png")}
    found = json.loads((tmp_path / "network-bfloat16.json").read_text())
    rows = rows_of(found, (2, 2), MIB)
    sent = {name: row["sent_bytes"] / MIB for name, row in rows.items()}
    assert sent == {("gloo", ""): 1.5, ("dpcomm", "none/auto"): 1.0, ("flat", "none/auto"): 2.0}
    assert {row["wrong"] for row in rows.values()} == {0}
    assert report.doubtful_rows(found["rows"]) == []
    assert all(1e-3 < row["error"] < 2.0**-8 for row in rows.values())  # float32's would be below 1e-6
    assert [goal["goal"] for goal in found["goals"]] == ["none nowhere below 0.95x gloo"]
    page = (tmp_path / "network-bfloat16.md").read_text()
    assert "Tensors of bfloat16, sum" in page
    assert "(network-bfloat16.png)" in page
    corrupt = run_benchmark(*flags, "--corrupt", "gloo")
    assert corrupt.returncode == 1, corrupt.stderr
    assert "gloo: 4 elements were wrong" in corrupt.stderr


@pytest.mark.usefixtures("permitted")
def test_wrong_results_between_hosts_fail_the_run(tmp_path: Path) -> None:
    flags = ["--parts", "allreduce", "--shapes", "2x1", "--sizes", "4K", "--contestants", "gloo,fp16_compress_hook"]
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
    flags = ["--parts", "allreduce", "--shapes", "2x1", "--contestants", "gloo,dpcomm:none/pigeon"]
    done = run_benchmark(*flags, "--out", str(tmp_path))
    assert done.returncode == 2
    assert "pigeon" in done.stderr
    assert "a rank ended with status 1" in done.stderr
    assert not list(tmp_path.iterdir())
