"""benchmarks/gpu_kernels.py where there is no GPU: its plan, bytes, table, JSON and goals, with a fake clock."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from numpy.typing import NDArray
from without_gpu import run_without_gpu

import dpcomm
from dpcomm import _native

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
SCRIPT = BENCHMARKS / "gpu_kernels.py"
sys.path.append(str(BENCHMARKS))
import gpu_kernels  # noqa: E402
import gpu_passes_device  # noqa: E402
import gpu_passes_plan as plans  # noqa: E402
from gpu_passes_plan import MIB, Row, Subject  # noqa: E402

CTAS = (8, 132)
ENVIRONMENT = {"gpu": "a GPU", "multiprocessors": 132, "driver": "1", "cuda": "13.0", "torch": "2"}
COPY_GB_S, HOOK_GB_S = 2500.0, 2000.0


def clock(size_bytes: int, fraction: float) -> Callable[[Subject, int], float]:
    """Times of a GPU whose passes reach that fraction of the copy's bandwidth."""

    def time_pass(subject: Subject, repeats: int) -> float:
        assert repeats >= 3
        if subject.kind == "empty":
            return 2.0
        speed = {"memcpy": COPY_GB_S, "hook": HOOK_GB_S}.get(subject.kind, COPY_GB_S * min(subject.ctas, 132) / 132)
        if subject.kind not in ("memcpy", "hook", "copy"):
            speed *= fraction
        return plans.moved_bytes(subject, size_bytes) / speed / 1e3

    return time_pass


def measured(size_bytes: int, fraction: float = 0.95, wrong: str = "") -> list[Row]:
    advanced: list[None] = []
    rows = plans.measure_size(
        size_bytes,
        CTAS,
        3,
        clock(size_bytes, fraction),
        lambda subject: subject.kind != wrong,
        lambda: advanced.append(None),
    )
    assert len(advanced) == 3 * len(plans.subjects(CTAS))
    return rows


# --- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "codec", "of_a_group"),
    [
        ("encode", "none", 1024 + 1024),
        ("encode", "fp16", 1024 + 513),
        ("decode", "fp16", 513 + 1024),
        ("add", "none", 3 * 1024),
        ("add", "fp16", 513 + 1024 + 513),
        ("reduce", "none", 4 * 1024),
        ("reduce", "fp16", 513 + 513 + 1024 + 513),
        ("cast", "fp16", 1024 + 512),
        ("cast", "bf16", 1024 + 512),
        ("widen", "bf16", 512 + 1024),
        ("copy", "none", 2 * 1024),
        ("memcpy", "none", 2 * 1024),
        ("hook", "none", 16 * 256),  # 6 + 4 + 6 bytes an element
        ("empty", "none", 0),
    ],
)
def test_bytes_that_must_move(kind: str, codec: str, of_a_group: int) -> None:
    subject = Subject(kind, 8, codec)
    assert plans.moved_bytes(subject, 1024) == of_a_group
    assert plans.moved_bytes(subject, 25 * MIB) == of_a_group * 25 * 1024


def test_bytes_of_sixteen_bit_tensors_and_of_lists() -> None:
    assert plans.moved_bytes(Subject("encode", 1, "fp16", "bfloat16"), 512) == 512 + 513
    assert plans.moved_bytes(Subject("encode", 1, "none", "bfloat16"), 512) == 2 * 512
    many = Subject("encode", 1, "fp16", many=True)
    counts = plans.counts_of(many, 40_000)
    assert counts == [4000, 4000, 2000]
    assert many.message_bytes(counts) == (16 + 16 + 8) * 513  # each tensor starts a group of its own


@pytest.mark.parametrize("size_mib", [1, 25, 64, 256])
@pytest.mark.parametrize("ctas", [1, 2, 64, 132])
@pytest.mark.parametrize("codec", ["none", "fp16"])
def test_every_cta_has_as_many_slices(size_mib: int, ctas: int, codec: str) -> None:
    subject = Subject("encode", ctas, codec)
    of_a_group = _native.wire_bytes(1, _native.DTYPES["float32"], _native.CODECS[codec])
    slice_bytes = plans.slice_bytes(subject, size_mib * MIB)
    assert slice_bytes % of_a_group == 0
    assert 0 < slice_bytes < plans.MOST_SLICE_BYTES + of_a_group
    groups, in_a_slice = size_mib * 1024, slice_bytes // of_a_group
    shares = [0] * ctas
    for number in range(-(-groups // in_a_slice)):
        shares[number % ctas] += min(in_a_slice, groups - number * in_a_slice)
    ideal = groups / ctas
    rounds = -(-groups // (in_a_slice * ctas))
    assert max(shares) < ideal + rounds  # rounding of a slice to whole groups, once a round


# --- measuring -------------------------------------------------------------------------------------------------------


def test_every_pass_is_measured_once_for_each_number_of_ctas() -> None:
    rows = measured(25 * MIB)
    keys = [(row.kind, row.codec, row.dtype, row.tensors, row.ctas) for row in rows]
    assert len(set(keys)) == len(keys) == 3 + len(CTAS) * (1 + 14 + 4) + 4
    assert ("widen", "bf16", "float32", 1, 4 * max(CTAS)) in keys
    for ctas in CTAS:
        assert ("reduce", "fp16", "float32", 1, ctas) in keys
        assert ("decode", "none", "bfloat16", 1, ctas) in keys
        assert ("encode", "fp16", "float32", 1639, ctas) in keys


def test_figures_of_a_row_agree_with_each_other() -> None:
    for row in measured(25 * MIB, fraction=0.9):
        if row.kind == "empty":
            assert (row.gb_s, row.of_memcpy, row.of_copy) == (0, None, None)
            continue
        assert row.gb_s == pytest.approx(row.moved_bytes / row.median_us / 1e3)
        if row.kind in ("encode", "decode", "add", "reduce"):
            assert row.of_copy == pytest.approx(0.9)
            assert row.of_memcpy == pytest.approx(0.9 * row.ctas / 132)
            assert row.correct
    memcpy = next(row for row in measured(MIB) if row.kind == "memcpy")
    assert memcpy.gb_s == pytest.approx(2500)
    assert (memcpy.of_memcpy, memcpy.of_copy, memcpy.correct) == (None, None, None)


@pytest.mark.parametrize(("us", "repeats"), [(0, 200), (1, 200), (20, 100), (2000, 3), (1e6, 3)])
def test_repetitions_fill_a_timing(us: float, repeats: int) -> None:
    assert plans.repeats_for(us) == repeats


def test_rounds_begin_with_different_subjects_and_medians_count() -> None:
    first: list[Subject] = []
    calls: list[Subject] = []
    every = len(plans.subjects((8,)))

    def time_pass(subject: Subject, repeats: int) -> float:
        calls.append(subject)
        number = len(calls) - every  # the first ones choose the repetitions
        if number > 0 and number % every == 1:
            first.append(subject)
        return (10.0, 10.0, 11.0, 90.0)[max(0, (len(calls) - 1) // every)]

    rows = plans.measure_size(MIB, (8,), 3, time_pass, lambda _: True, lambda: None)
    assert len(set(first)) == 3
    assert {row.median_us for row in rows} == {11.0}
    assert {row.least_us for row in rows} == {10.0}


# --- goals -----------------------------------------------------------------------------------------------------------


def test_goals_are_reached_missed_or_not_measured() -> None:
    rows = measured(25 * MIB, 0.9) + measured(64 * MIB, 0.9)
    at_64, at_25, hook, native = plans.outcomes(rows)
    assert (at_64.reached, at_25.reached) == (False, True)
    assert str(at_64).endswith("missed")
    assert str(at_25).endswith("reached")
    # 16 bytes an element at 2000 GB/s against 2 * 1537/256 at 0.9 * 2500 GB/s
    assert hook.measured == "1.50x"
    assert hook.reached
    assert native.measured == "1.50x"  # 12 bytes at 0.9 * 2500 GB/s
    assert native.reached
    assert [each.reached for each in plans.outcomes(measured(25 * MIB, 0.7))[2:]] == [False, False]
    assert [each.reached for each in plans.outcomes(measured(MIB))] == [None] * 4
    assert str(plans.outcomes([])[0]).endswith("not measured")


def test_one_slow_pass_misses_the_goal() -> None:
    rows = [
        dataclasses.replace(row, of_memcpy=0.8) if (row.kind, row.codec, row.ctas) == ("add", "fp16", 132) else row
        for row in measured(64 * MIB, 0.99)
    ]
    assert plans.outcomes(measured(64 * MIB, 0.99))[0].reached
    missed = plans.outcomes(rows)[0]
    assert not missed.reached
    assert missed.measured == "80.0% (add fp16, 64 MiB, 132 CTAs)"


# --- what is right ---------------------------------------------------------------------------------------------------


def numbers(count: int) -> list[NDArray[np.float32]]:
    """Of very different size, so that the largest of a group decides what others lose."""
    found = []
    for seed in (1, 2):
        generator = np.random.default_rng(seed)
        found.append(np.ldexp(generator.standard_normal(count), generator.integers(-30, 31, count)).astype(np.float32))
    return found


def test_numbers_are_finite_and_grouping_matters() -> None:
    first, second = numbers(9000)
    made = gpu_passes_device.spread_numbers(9000, torch.Generator().manual_seed(1)).numpy()
    for values in (first, second, made):
        assert np.isfinite(values).all()
        assert not np.array_equal(reference.through_fp16(values)[100:], reference.through_fp16(values[100:]))


def test_expected_bits_of_reduce_are_those_of_the_cpu_engine() -> None:
    first, second = numbers(64_000)
    for codec in ("none", "fp16"):
        comms = dpcomm.init_local(["cpu"] * 2)
        xs = [torch.from_numpy(values.copy()) for values in (first, second)]
        dpcomm.allreduce_local(comms, xs, "mean", codec=codec, algorithm="direct")
        expected = gpu_passes_device.expected_bits(Subject("reduce", 1, codec), first, second, [64_000])
        assert np.array_equal(xs[0].numpy().view(np.uint32), expected)
        for comm in comms:
            comm.close()


def test_expected_bits_of_the_other_passes() -> None:
    first, second = numbers(9000)
    through = reference.through_fp16

    def expected(subject: Subject, counts: list[int]) -> NDArray[np.float32]:
        bits = gpu_passes_device.expected_bits(subject, first, second, counts)
        return np.asarray(bits.view(np.float32))

    assert np.array_equal(expected(Subject("encode", 1, "none"), [9000]), first)
    assert np.array_equal(expected(Subject("decode", 1, "fp16"), [9000]), through(first))
    assert np.array_equal(expected(Subject("add", 1, "fp16"), [9000]), through(through(second) + first))
    assert np.array_equal(expected(Subject("add", 1, "none"), [9000]), second + first)
    many = expected(Subject("encode", 1, "fp16", many=True), [4000, 4000, 1000])
    assert np.array_equal(
        many, np.concatenate([through(first[:4000]), through(first[4000:8000]), through(first[8000:])])
    )
    assert not np.array_equal(many, through(first))  # groups of a list begin anew with each tensor
    wide = np.where(np.abs(first) < 60000, first, np.float32(1))  # plain half precision holds no more
    for codec, wire in (("fp16", np.dtype(np.float16)), ("bf16", reference.BFLOAT16)):
        bits = gpu_passes_device.expected_bits(Subject("cast", 1, codec), wide, wide, [9000])
        assert np.array_equal(bits.view(np.float32), reference.widen(reference.narrow(wide / np.float32(2), wire)))
    halves = reference.to_bf16(first)
    bits = gpu_passes_device.expected_bits(Subject("encode", 1, "fp16", "bfloat16"), halves, halves, [9000])
    assert np.array_equal(bits, reference.to_bf16(through(reference.from_bf16(halves))))


# --- the command -----------------------------------------------------------------------------------------------------


def test_plan_follows_the_arguments() -> None:
    full = gpu_kernels.plan_of(gpu_kernels.parse_arguments([]), 132)
    assert full == gpu_kernels.Plan((MIB, 25 * MIB, 64 * MIB, 256 * MIB), (1, 2, 4, 8, 16, 32, 64, 132), 9, False)
    quick = gpu_kernels.plan_of(gpu_kernels.parse_arguments(["--quick"]), 40)
    assert quick == gpu_kernels.Plan((MIB, 25 * MIB), (8, 40), 3, False)
    asked = gpu_kernels.parse_arguments(["--sizes", "4,2", "--ctas", "64,3", "--rounds", "5", "--hot"])
    assert gpu_kernels.plan_of(asked, 40) == gpu_kernels.Plan((4 * MIB, 2 * MIB), (3,), 5, True)
    with pytest.raises(SystemExit, match="40 multiprocessors"):
        gpu_kernels.plan_of(gpu_kernels.parse_arguments(["--ctas", "64"]), 40)


def test_table_json_and_plot(tmp_path: Path) -> None:
    plan = gpu_kernels.Plan((MIB, 25 * MIB), CTAS, 3, False)
    rows = measured(MIB, wrong="add") + measured(25 * MIB)
    head = gpu_kernels.header(ENVIRONMENT, plan).splitlines()
    assert "not a network figure" in head[1]
    assert all(len(gpu_kernels.line(row)) == len(head[-1]) for row in rows)
    assert {gpu_kernels.line(row).split()[-1] for row in rows if row.kind == "add"} == {"NO", "yes"}
    written = json.loads(json.dumps(gpu_kernels.document(ENVIRONMENT, plan, rows)))
    assert written["environment"] == ENVIRONMENT
    assert written["plan"]["ctas"] == [8, 132]
    assert len(written["rows"]) == len(rows)
    assert [goal["reached"] for goal in written["goals"]] == [None, True, True, True]
    gpu_kernels.draw(rows, "GPU", tmp_path / "new" / "passes.png")
    assert (tmp_path / "new" / "passes.png").read_bytes().startswith(b"\x89PNG")


def test_without_a_gpu_it_stops_with_the_reason() -> None:
    done = run_without_gpu(SCRIPT, "--quick")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("gpu_kernels: there is no GPU to measure on here (")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [(["--sizes", "1,x"], "'1,x'"), (["--ctas", "0"], "'0'"), (["--rounds", "0"], "--rounds must be at least 1")],
    ids=["sizes", "ctas", "rounds"],
)
def test_bad_arguments_are_refused_in_plain_words(arguments: list[str], complaint: str) -> None:
    done = run_without_gpu(SCRIPT, *arguments)
    assert done.returncode == 2
    assert complaint in done.stderr


# --- the launcher ----------------------------------------------------------------------------------------------------

without_cuda = pytest.mark.skipif(not _native.cuda_built, reason="this build of the extension has no CUDA")


def encode_call() -> _native.CudaPass:
    call = _native.CudaPass()
    call.counts, call.tensors, call.messages = [256], [[4096]], [[8192]]
    call.message_bytes = _native.pass_message_bytes(call)
    return call


@without_cuda
def test_messages_have_room_for_every_slice() -> None:
    call = encode_call()
    assert call.message_bytes == 1024
    call.counts, call.codec, call.slice_bytes = [256 * 5], _native.CODECS["fp16"], 2 * 513
    assert _native.pass_message_bytes(call) == 3 * 1152  # 2 groups a slice, rounded up to 128 bytes
    call.kind = _native.PASSES["copy"]
    assert _native.pass_message_bytes(call) == 256 * 5 * 4


@without_cuda
@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        ("ctas", 0, "ctas and repeats must be at least 1"),
        ("repeats", 0, "ctas and repeats must be at least 1"),
        ("slice_bytes", 0, "slice_bytes must be at least 1"),
        ("counts", [256, 256], "each tensor needs a count"),
        ("counts", [0], "counts must be at least 1"),
        ("messages", [[4096, 8192]], "wrong number of messages"),
        ("messages", [], "as many sets"),
        ("message_bytes", 1023, "messages are too small"),
        ("kind", 99, "unknown"),
        ("dtype", _native.DTYPES["int32"], "no kernel for this dtype"),
    ],
)
def test_wrong_calls_are_refused_before_the_device_is_asked(field: str, value: object, complaint: str) -> None:
    call = encode_call()
    setattr(call, field, value)
    with pytest.raises((dpcomm.ArgumentError, dpcomm.UnsupportedError), match=complaint):
        _native.run_pass(call)


@pytest.mark.gpu
@pytest.mark.timeout(300)
def test_a_quick_run_gives_the_reference_s_bits(tmp_path: Path) -> None:
    written = tmp_path / "rows.json"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--sizes", "1", "--ctas", "1,3", "--rounds", "1", "--json", str(written)],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    if done.returncode == 2 and "this torch" in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr
    rows = json.loads(written.read_text())["rows"]
    assert {row["correct"] for row in rows if row["kind"] in ("encode", "decode", "add", "reduce")} == {True}
