"""`python -m dpcomm plan`: units, questions, rows, break-even, verdict, JSON and picture."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from pathlib import Path

import pytest

from dpcomm import _native
from dpcomm.__main__ import main
from dpcomm.errors import ArgumentError
from dpcomm.plan import command as plan_command
from dpcomm.plan import constants as plan_constants
from dpcomm.plan import counts
from dpcomm.plan import gpu as plan_gpu
from dpcomm.plan import machine as plan_machine
from dpcomm.plan import picture as plan_picture
from dpcomm.plan import predict as plans
from dpcomm.plan.question import Question, check

ISSUE = "--hosts 16 --ranks-per-host 8 --link 50GB/s --network 400Gb/s --params 7e9 --dtype bf16 --codec fp16"
TWO_HOSTS = Question(2, 1, 25 << 18, network=0.125e9)
NVLINK = Question(1, 8, 32 << 18, device="cuda", link=450e9)
ALONE = Question(8, 1, 32 << 18, device="cuda", network=12.5e9)


def asked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["dpcomm", "plan", *arguments.split()])
    main()
    return capsys.readouterr().out


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        asked(monkeypatch, capsys, arguments)
    assert ended.value.code == 2
    return capsys.readouterr().err


# --- units -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [("50GB/s", 50e9), ("400Gb/s", 50e9), ("400 Gbit/s", 50e9), ("1Mb/s", 125e3), ("1.5TB/s", 1.5e12), ("8b/s", 1)],
)
def test_speeds_are_bits_or_bytes_as_written(text: str, value: float) -> None:
    assert plan_command.speed(text) == value


@pytest.mark.parametrize("text", ["50", "50G", "50GBps", "50gb/s", "50GiB/s", "0GB/s", "-1GB/s", "GB/s", "nanGB/s", ""])
def test_other_speeds_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"50GB/s or bits as in 400Gb/s"):
        plan_command.speed(text)


@pytest.mark.parametrize(("text", "value"), [("25MiB", 25 << 20), ("100MB", 10**8), ("4096B", 4096), ("1.5kB", 1500)])
def test_sizes_have_units(text: str, value: int) -> None:
    assert plan_command.size(text) == value


@pytest.mark.parametrize("text", ["25", "25M", "25Mb", "0B", "0.5B", "1.0001kB", "MiB"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="expected whole bytes"):
        plan_command.size(text)


@pytest.mark.parametrize("text", ["0", "1.5", "-3", "1e99", "seven", "0x10"])
def test_other_counts_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="expected a whole number"):
        plan_command.count(text)


# --- questions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--hosts 2 --size 25MiB", "Give --network"),
        ("--hosts 1 --ranks-per-host 2 --network 1Gb/s --size 25MiB", "one host needs no --network"),
        ("--hosts 1 --size 25MiB", "needs two ranks"),
        ("--hosts 1 --ranks-per-host 2 --device cuda --size 25MiB", "Give --link"),
        ("--hosts 1 --ranks-per-host 2 --device cpu --link 50GB/s --size 25MiB", "--link is between GPUs"),
        ("--hosts 1 --ranks-per-host 2 --link 50GB/s --processors 2 --size 25MiB", "--processors is for"),
        ("--hosts 1025 --network 1Gb/s --size 25MiB", "predictions end at 1024"),
        ("--hosts 2 --network 1Gb/s --size 25MiB --bucket 1MiB", "--bucket belongs to --params"),
        ("--hosts 2 --network 1Gb/s --size 1023B", "no whole number of elements"),
        ("--hosts 2 --network 1Gb/s --params 7 --bucket 8B", "a bucket below 1 KiB"),
        ("--hosts 2 --network 1Gb/s", "one of the arguments --params --size is required"),
        ("--hosts 2 --network 1Gbps --size 25MiB", "argument --network: '1Gbps': expected bytes"),
        ("--hosts 2 --network 1Gb/s --size 25MiB --codec int8", "invalid choice"),
    ],
)
def test_questions_that_make_no_sense_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: str, said: str
) -> None:
    assert said in refused(monkeypatch, capsys, arguments)


@pytest.mark.parametrize("changes", [{"dtype": "int32"}, {"codec": "none"}, {"device": "tpu"}, {"elems": 0}])
def test_questions_are_checked_without_a_command_line_too(changes: dict[str, object]) -> None:
    check(TWO_HOSTS)
    with pytest.raises(ArgumentError):
        plans.plan(dataclasses.replace(TWO_HOSTS, **changes))  # type: ignore[arg-type]


def test_a_link_means_gpus() -> None:
    parser = argparse.ArgumentParser()
    plan_command.add_arguments(parser)
    ask = ["--hosts", "1", "--ranks-per-host", "8", "--size", "25MiB"]
    assert plan_command.question_of(parser.parse_args(ask)).device == "cpu"
    assert plan_command.question_of(parser.parse_args([*ask, "--link", "50GB/s"])).device == "cuda"


def test_parameters_go_in_buckets_and_a_size_in_one_call() -> None:
    buckets = dataclasses.replace(TWO_HOSTS, elems=20_000_000, bucket_bytes=25 << 20)
    assert buckets.calls == [(3, 6553600), (1, 20_000_000 - 3 * 6553600)]
    assert TWO_HOSTS.calls == [(1, 25 << 18)]
    one = plans.seconds(TWO_HOSTS, "gloo", "direct", "none", plan_gpu.LIKELY)
    four = dataclasses.replace(TWO_HOSTS, elems=4 * TWO_HOSTS.elems, bucket_bytes=25 << 20)
    assert plans.seconds(four, "gloo", "direct", "none", plan_gpu.LIKELY) == pytest.approx(4 * one)


# --- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("question", "engines"),
    [
        (TWO_HOSTS, {"gloo"}),
        (Question(1, 2, 1024), {"gloo", "shm"}),
        (Question(2, 2, 1024, network=1e9), {"gloo", "two_level"}),
        (NVLINK, {"nccl", "p2p"}),
        (ALONE, {"nccl"}),
        (Question(2, 8, 1024, device="cuda", link=450e9, network=50e9), {"nccl"}),
    ],
)
def test_every_engine_of_the_place_is_predicted(question: Question, engines: set[str]) -> None:
    rows = plans.plan(question).rows
    assert {row.engine for row in rows} == engines
    assert {row.codec for row in rows} == {"none", "fp16"}
    for row in rows:
        assert 0 < row.best_s <= row.seconds <= row.worst_s < math.inf
        assert (row.host_bytes > 0) == (question.hosts > 1)
    for engine in engines - {"two_level"}:
        own = {row.algorithm for row in rows if row.engine == engine} - {"two_level"}
        assert own == {"direct", "oneshot", "ring"} | ({"native"} if engine in ("gloo", "nccl") else set())
        assert [row.codec for row in rows if row.engine == engine and row.auto].count("none") == 1


def test_codec_bf16_is_a_librarys_only() -> None:
    coded = {(row.engine, row.algorithm) for row in plans.plan(dataclasses.replace(NVLINK, codec="bf16")).rows}
    assert ("nccl", "native") in coded
    found = plans.plan(dataclasses.replace(TWO_HOSTS, codec="bf16"))
    assert {row.codec for row in found.rows} == {"none"}
    assert not found.compress
    assert "no algorithm has codec bf16" in plan_command.verdict(found)


def test_two_levels_are_had_on_cpus_and_asked_for_on_gpus() -> None:
    assert "two_level" in _native.ALGORITHMS
    assert [name for name in plans.NOT_BUILT if name in _native.ALGORITHMS] == []
    found = plans.plan(Question(2, 2, 25 << 18, network=0.125e9))
    assert {(row.note, row.auto) for row in found.rows if row.algorithm == "two_level"} == {("", True)}
    assert (found.best.algorithm, found.best.codec) == ("two_level", "fp16")
    for dtype, taken in (("bfloat16", True), ("float16", False)):
        short = plans.predict(Question(2, 2, 25 << 18, dtype, network=0.125e9))
        assert {row.auto for row in short if row.algorithm == "two_level"} == {taken}
    gpus = plans.plan(Question(2, 2, 25 << 18, device="cuda", link=50e9, network=12.5e9))
    two = [row for row in gpus.rows if row.algorithm == "two_level"]
    assert {(row.engine, row.note, row.auto) for row in two} == {("nccl", "", False)}


def test_ranks_beyond_what_dpcomm_serves_are_said() -> None:
    at, beyond = (plans.plan(Question(n, 1, 1 << 20, network=1e9)) for n in (_native.MAX_RANKS, 2 * _native.MAX_RANKS))
    assert not at.best.note
    assert beyond.best.note == "dpcomm serves 64 ranks at most"
    assert "predicted as if it served 128" in plan_command.verdict(beyond)


def test_the_hook_of_torch_is_never_the_best() -> None:
    """It is compared, but dpcomm does not have it."""
    for gbit in (0.1, 1, 10):
        assert plans.plan(dataclasses.replace(TWO_HOSTS, network=gbit / 8 * 1e9)).best.note == ""


# --- GPUs ------------------------------------------------------------------------------------------------------------


def test_known_machines_are_met_from_their_nominal_speeds() -> None:
    """docs/model.md's likely times of NCCL, from nominal speeds alone. Not those on NVLink in one host, where switches
    add up, which is not counted."""
    pcie = plan_machine.machine_of(1, 8, 32.0, None)
    assert plan_gpu.stock_us(pcie, 128 << 20, plan_gpu.LIKELY) == pytest.approx(9.4e3, rel=0.2)
    alone = plan_machine.machine_of(8, 1, None, 12.5)
    assert plan_gpu.stock_us(alone, 128 << 20, plan_gpu.LIKELY) == pytest.approx(20e3, rel=0.2)
    two = plan_machine.machine_of(2, 8, 450.0, 12.5)
    assert plan_gpu.stock_us(two, 25 << 20, plan_gpu.LIKELY) == pytest.approx(2.8e3, rel=0.25)
    assert plan_machine.stock_fixed_us(2, 8, True).likely == pytest.approx(50, rel=0.1)
    assert plan_machine.stock_fixed_us(8, 1, False).likely == pytest.approx(90, rel=0.1)


def test_flat_direct_pays_for_every_rank_of_a_host_and_two_levels_do_not() -> None:
    machine = plan_machine.machine_of(2, 8, 450.0, 12.5)
    size = 128 << 20
    flat = plan_gpu.direct_us(machine, size, plan_gpu.LIKELY)
    assert flat > 3 * plan_machine.two_level_us(machine, size, plan_gpu.LIKELY)
    wire = 2 * size * plan_gpu.CODED / plan_gpu.PLAIN / 2  # 2 W (H-1)/H
    assert plan_machine.two_level_us(machine, size, plan_gpu.LIKELY) > plan_gpu.us(wire, machine.nic.likely)


def test_two_levels_cost_the_host_a_group_for_each_part_of_a_slice() -> None:
    """A small call is what the host enqueues. Between H hosts: direct's. Inside, a slice: a kernel for each host's
    part, and two groups that talk to the G - 1 others."""
    fixed: dict[tuple[int, int], float] = {}
    for hosts, gpus in ((8, 1), (8, 8), (16, 8), (32, 8)):
        machine = plan_machine.machine_of(hosts, gpus, 450.0 if gpus > 1 else None, 50.0)
        fixed[hosts, gpus] = plan_machine.two_level_us(machine, 1024, plan_gpu.LIKELY)
    group = plan_gpu.HOST_GROUP_US[plan_gpu.LIKELY] + 2 * 7 * plan_gpu.HOST_TRANSFER_US[plan_gpu.LIKELY]
    inside = counts.SLICES * 8 * (plan_gpu.HOST_KERNEL_US[plan_gpu.LIKELY] + 2 * group)
    assert fixed[8, 8] - fixed[8, 1] == pytest.approx(inside)
    assert fixed[32, 8] - fixed[16, 8] == pytest.approx(2 * (fixed[16, 8] - fixed[8, 8]))  # linear in hosts


# --- what follows ----------------------------------------------------------------------------------------------------


def pairs(question: Question) -> list[plans.BreakEven]:
    return [each for each in plans.break_evens(question) if each.engine != "any" and each.bytes_per_s]


def check_both_sides(question: Question) -> None:
    """A little below a break-even the codec is faster, and a little above without."""
    for found in pairs(question):
        assert found.bytes_per_s is not None
        for factor, wins in ((0.99, True), (1.01, False)):
            at = plans.varied(question, factor * found.bytes_per_s)
            none, coded = (
                plans.seconds(at, found.engine, found.algorithm, codec, plan_gpu.LIKELY) for codec in ("none", "fp16")
            )
            assert (coded < none) == wins


@pytest.mark.parametrize(
    "question", [TWO_HOSTS, ALONE, Question(2, 2, 25 << 18, network=1e9), NVLINK], ids=["cpu", "gpu", "2x2", "nvlink"]
)
def test_on_both_sides_of_the_break_even_the_other_one_is_faster(question: Question) -> None:
    assert {each.algorithm for each in pairs(question)} == {"native"}  # dpcomm's own gain at every speed
    check_both_sides(question)


def test_a_slow_codec_has_break_evens_in_all_algorithms(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = plan_constants.GLOO.ours._replace(coded_us=4 * plan_constants.GLOO.ours.coded_us)
    monkeypatch.setattr(plan_constants, "GLOO", plan_constants.GLOO._replace(ours=slow))
    assert {each.algorithm for each in pairs(TWO_HOSTS)} == {"direct", "oneshot", "ring", "native"}
    check_both_sides(TWO_HOSTS)
    assert not plans.plan(dataclasses.replace(TWO_HOSTS, network=12.5e9)).compress


def test_where_there_is_no_line_there_is_no_break_even() -> None:
    assert plans.break_evens(Question(1, 2, 1 << 20)) == []


def test_a_codec_that_makes_nothing_less_pays_nowhere() -> None:
    evens = plans.break_evens(dataclasses.replace(ALONE, dtype="bfloat16"))
    assert evens
    assert {each.bytes_per_s for each in evens} == {0.0}


@pytest.mark.parametrize(
    ("question", "compress"),
    [
        (TWO_HOSTS, True),
        (dataclasses.replace(TWO_HOSTS, network=12.5e9), True),
        (Question(1, 2, 25 << 18), False),
        (ALONE, True),
        (dataclasses.replace(ALONE, dtype="bfloat16"), False),
        (dataclasses.replace(NVLINK, elems=1 << 10), False),
    ],
    ids=["1 Gb/s", "100 Gb/s", "shared memory", "a GPU a host", "16 bits", "small on NVLink"],
)
def test_do_not_compress_is_said_where_it_is_right(question: Question, compress: bool) -> None:
    found = plans.plan(question)
    assert found.compress == compress
    assert plan_command.verdict(found).startswith("compress: " if compress else "do not compress here: ")
    assert found.best_codec is not None
    assert compress == (found.best_codec.seconds <= plans.WORTH * found.best_none.seconds)


def test_a_gain_within_the_error_is_called_one() -> None:
    assert "overlap: measure" in plan_command.verdict(plans.plan(Question(1, 2, 25 << 18)))
    assert "overlap" not in plan_command.verdict(plans.plan(TWO_HOSTS))


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_question_of_the_issue(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = asked(monkeypatch, capsys, ISSUE)
    assert out.startswith(
        "predicted, not measured: 16 hosts x 8 ranks on cuda; link 400 Gb/s (50 GB/s); network 400 Gb/s"
    )
    assert "\ndo not compress here: " in out
    assert "Codec fp16 makes no fewer bytes of bfloat16." in out
    assert "two_level  fp16" in out


def test_json_has_everything(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(asked(monkeypatch, capsys, "--hosts 2 --network 1Gb/s --size 25MiB --json"))
    assert found["predicted"] is True
    assert found["question"]["network"] == 0.125e9
    assert found["compress"] is True
    assert found["verdict"].startswith("compress: ")
    assert {"engine", "algorithm", "codec", "seconds", "best_s", "worst_s", "host_bytes", "auto", "note"} == set(
        found["rows"][0]
    )
    assert found["break_even"][0]["engine"] == "any"


def test_the_picture_goes_to_1024_ranks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for question, least in ((TWO_HOSTS, 2), (Question(2, 8, 1024, device="cuda", link=5e10, network=5e10), 16)):
        for points in plan_picture.lines(question).values():
            assert [points[0][0], points[-1][0]] == [least, 1024]
    out = tmp_path / "plan.png"
    asked(monkeypatch, capsys, f"--hosts 2 --network 1Gb/s --size 25MiB --plot {out}")
    assert out.read_bytes().startswith(b"\x89PNG")


def test_a_picture_that_cannot_be_drawn_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    ask = "--hosts 2 --network 1Gb/s --size 25MiB --plot"
    assert "no such" in refused(monkeypatch, capsys, f"{ask} {tmp_path}/none/plan.png").lower()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install matplotlib" in refused(monkeypatch, capsys, f"{ask} {tmp_path}/plan.png")
    assert not (tmp_path / "plan.png").exists()
