"""Bits between virtual ranks on one GPU: equal to the reference and to the CPU's engine, on every rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import cases
import numpy as np
import pytest
import reference
import torch
from cases import ALGORITHMS, Case, check_bits, tensor
from gpu.support import DEVICE, RANKS, Comms, check_case, fresh, group, on_device, on_gpu, reduce_on

import dpcomm

pytestmark = on_gpu

KINDS = [("none", dtype) for dtype in cases.DTYPES] + [("fp16", dtype) for dtype in cases.ENCODED]
kinds = pytest.mark.parametrize(("codec", "dtype"), KINDS, ids=["-".join(kind) for kind in KINDS])
EXPLICIT = ("direct", "oneshot", "ring")
LARGE = 2**20 + 3
SEVERAL_SLOTS = 2**24 + 257  # 64 MiB of float32


def ranks(*counts: int) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("nranks", counts, ids=lambda n: f"{n}ranks")


def check_all_algorithms(comms: Comms, case: Case) -> None:
    """One case by each algorithm; the reference is asked once for each class of bits."""
    nranks = len(comms)
    inputs = [case.inputs(r) for r in range(nranks)]
    expected = {name: replace(case, algorithm=name).expected(nranks) for name in ("direct", "ring")}
    for algorithm in ALGORITHMS:
        one = replace(case, algorithm=algorithm)
        wanted = expected["ring" if algorithm == "ring" else "direct"]
        check_bits(reduce_on(comms, inputs, one), wanted, f"{nranks} virtual ranks, {one}")


@pytest.mark.timeout(300)  # under memcheck everything takes long
def test_a_few_bytes_of_everything() -> None:
    """Each kernel once. Also what gpu-check runs under compute-sanitizer."""
    with fresh(2, timeout_s=120.0) as comms:
        for (codec, dtype), algorithm in product(KINDS, EXPLICIT):
            check_case(comms, Case((1021, 3), dtype, "sum", codec, algorithm))


@kinds
@ranks(*RANKS)
def test_bits_equal_the_reference(codec: str, dtype: str, nranks: int) -> None:
    sizes = (0, 1, 255, 256, 257, 509, 256 * nranks - 1, 256 * nranks, 256 * nranks + 1, 4099)
    for op, size in product(cases.operations(dtype, codec), sizes):
        for special in {False, dtype in cases.FLOATS}:
            check_all_algorithms(group(nranks), Case((size,), dtype, op, codec, special=special))


@kinds
@ranks(2, 8)
def test_bits_of_a_million_elements_equal_the_cpus(codec: str, dtype: str, nranks: int) -> None:
    cpu = cases.local(nranks, arena_mb=16)
    try:
        for algorithm in EXPLICIT:
            case = Case((LARGE,), dtype, "sum", codec, algorithm, special=dtype in cases.FLOATS)
            inputs = [case.inputs(r) for r in range(nranks)]
            on_cpu = [tensor(segments[0]) for segments in inputs]
            dpcomm.allreduce_local(cpu, on_cpu, case.op, **case.options)
            check_bits(reduce_on(group(nranks), inputs, case), [cases.array(on_cpu[0])], f"{nranks} ranks, {case}")
    finally:
        for comm in cpu:
            comm.close()


@pytest.mark.parametrize("arena_mb", ["8", "64"])
@pytest.mark.parametrize("algorithm", EXPLICIT)
@pytest.mark.parametrize("codec", ["none", "fp16"])
def test_bits_of_messages_that_use_slots_again(codec: str, algorithm: str, arena_mb: str) -> None:
    """Slices beyond the number of slots wait for their readers. Beside the CPU's engine, at all edges of a group."""
    cpu = cases.local(2, arena_mb=16)
    generator = torch.Generator().manual_seed(5)
    whole = [torch.randn(SEVERAL_SLOTS + 1, generator=generator) for _ in range(2)]
    with fresh(2, {"DPCOMM_ARENA_MB": arena_mb}) as comms:
        for off in (-1, 0, 1):
            on_cpu = [x[: SEVERAL_SLOTS + off].clone() for x in whole]
            xs = [x.to(DEVICE) for x in on_cpu]
            dpcomm.allreduce_local(cpu, on_cpu, "mean", codec=codec, algorithm=algorithm)
            dpcomm.allreduce_local(comms, xs, "mean", codec=codec, algorithm=algorithm)
            assert all(torch.equal(x.cpu().view(torch.int32), on_cpu[0].view(torch.int32)) for x in xs), off
    for comm in cpu:
        comm.close()


def test_bits_do_not_depend_on_ctas() -> None:
    for max_ctas in (1, 3):
        with fresh(2, max_ctas=max_ctas) as comms:
            assert comms[0].describe()["max_ctas"] == max_ctas
            for codec, algorithm in product(("none", "fp16"), EXPLICIT):
                check_case(comms, Case((100_003, 17), "float32", "mean", codec, algorithm, special=True))


@pytest.mark.parametrize("codec", ["none", "fp16"])
def test_bits_of_an_arena_in_host_memory(codec: str) -> None:
    with fresh(4, {"DPCOMM_P2P_ARENA": "pinned"}) as comms:
        assert {comm.describe()["arena"] for comm in comms} == {"pinned"}
        for algorithm, size in product(EXPLICIT, (0, 1, 257, 100_003)):
            check_case(comms, Case((size,), "float32", "mean", codec, algorithm, special=True))


# --- lists and layouts -----------------------------------------------------------------------------------------------


@kinds
@ranks(2, 8)
def test_lists_start_new_groups_and_may_hold_empty_tensors(codec: str, dtype: str, nranks: int) -> None:
    """Up to 96 segments travel with the launch, more in a table."""
    for counts in [(0, 0), (1, 0, 255, 1), (257, 3, 0, 1021, 256), (7,) * 96, (5, 300) * 65, (9001, 2)]:
        check_all_algorithms(group(nranks), Case(counts, dtype, "sum", codec, special=dtype in cases.FLOATS))


def test_a_list_of_thousands() -> None:
    counts = tuple(int(n) for n in np.random.default_rng(3).integers(0, 300, 2500))
    check_all_algorithms(group(2), Case(counts, "float32", "mean", "fp16"))


@pytest.mark.parametrize("bucket_cap_mb", [1e-3, 25.0])
def test_lists_of_mixed_dtypes_have_the_bits_of_single_calls(bucket_cap_mb: float) -> None:
    rng = np.random.default_rng(12)
    kinds_ = ["float32", "bfloat16", "float32", "int64", "float16", "bfloat16", "float32"]
    xs = [[cases.values(d, 300 + i, rng) for i, d in enumerate(kinds_)] for _ in range(2)]
    with fresh(2, bucket_cap_mb=bucket_cap_mb) as comms:
        results = reduce_on(comms, xs, Case((1, 1), algorithm="auto"))
    check_bits(results, reference.allreduce(xs), f"cap {bucket_cap_mb}")


@pytest.mark.parametrize("offset", [1, 3, 7])
@kinds
def test_odd_offsets_work_and_neighbours_are_not_touched(codec: str, dtype: str, offset: int) -> None:
    mine = slice(1021 + offset, 2042 - offset)
    case = Case((3 * 1021,), dtype, "sum", codec)
    before = [case.inputs(r)[0] for r in range(4)]
    expected = reference.allreduce([[b[mine]] for b in before], codec=codec)[0]
    for algorithm in ("direct", "oneshot"):
        bases = on_device(before)
        dpcomm.allreduce_local(group(4), [base[mine] for base in bases], codec=codec, algorithm=algorithm)
        for base, old in zip(bases, before, strict=True):
            wanted = old.copy()
            wanted[mine] = expected
            check_bits([[base.cpu()]], [wanted], f"offset {offset}, {algorithm}")


# Views of 1200 float32 numbers.
LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transposed": lambda x: x.view(40, 30).t(),
    "strided": lambda x: x[::3],
    "channels_last": lambda x: x.view(2, 5, 12, 10).to(memory_format=torch.channels_last),
    "row_of_columns": lambda x: x.view(40, 30)[:, 3:7],
    "scalar": lambda x: x[5],
    "negative_bit": lambda x: torch._neg_view(x),
}


@pytest.mark.parametrize("codec", ["none", "fp16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_reduced_in_the_order_of_their_indices(layout: str, codec: str) -> None:
    generator = torch.Generator().manual_seed(13)
    memory = [torch.randn(1200, generator=generator).to(DEVICE) for _ in range(2)]
    old = [m.clone() for m in memory]
    xs = [LAYOUTS[layout](m) for m in memory]
    inputs = [[logical(x)] for x in xs]
    dpcomm.allreduce_local(group(2), xs, codec=codec)
    check_bits([[logical(x)] for x in xs], reference.allreduce(inputs, codec=codec), layout)
    for m, o in zip(memory, old, strict=True):  # what the view leaves out has not changed
        assert int((m != o).sum()) <= inputs[0][0].size


def logical(x: torch.Tensor) -> cases.Array:
    """The values in the order of their indices, in memory of their own."""
    return np.asarray(x.resolve_neg().reshape(-1).cpu().numpy().copy())


def test_complex_numbers_are_reduced_by_parts() -> None:
    generator = torch.Generator().manual_seed(7)
    xs = [torch.randn(777, dtype=torch.complex64, generator=generator) for _ in range(2)]
    parts = [[torch.view_as_real(x.conj().resolve_conj()).numpy().reshape(-1).copy()] for x in xs]
    views = [x.to(DEVICE).conj() for x in xs]  # lazily conjugated
    dpcomm.allreduce_local(group(2), views, "mean")
    results = [[torch.view_as_real(v.resolve_conj()).reshape(-1).cpu()] for v in views]
    check_bits(results, reference.allreduce(parts, "mean"), "complex64")


# --- values, control, size -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [1e-42, 1e-30, 1e30, 3e38])
def test_fp16_keeps_every_magnitude(sigma: float) -> None:
    rng = np.random.default_rng(11)
    xs = [[(rng.uniform(-1, 1, 1000) * sigma).astype(np.float32)] for _ in range(4)]
    results = reduce_on(group(4), xs, Case((1000,), op="mean", codec="fp16"))
    check_bits(results, reference.allreduce(xs, "mean", codec="fp16"), sigma)


def test_groups_that_are_not_finite_are_counted() -> None:
    xs = [torch.ones(1000, device=DEVICE) for _ in range(2)]
    xs[1][300] = float("nan")
    with fresh(2, codec="fp16") as comms:
        dpcomm.allreduce_local(comms, xs)
        torch.cuda.synchronize()
        assert sum(comm.stats()["nonfinite_groups"] for comm in comms) >= 1
    for x in xs:
        assert torch.nonzero(~x.isfinite()).reshape(-1).tolist() == [300]


@pytest.mark.parametrize("everywhere", [False, True], ids=["one-rank", "all-ranks"])
def test_a_flipped_bit_is_noticed(everywhere: bool) -> None:
    case = Case((700, 300), "bfloat16")
    results = reduce_on(group(4), [case.inputs(r) for r in range(4)], case)
    check_bits(results, case.expected(4), "control")
    for segments in results if everywhere else results[1:2]:
        segments[1].view(torch.int16)[299] ^= 1
    with pytest.raises(AssertionError, match="segment 1 differ, first at 299" if everywhere else "replicas differ"):
        check_bits(results, case.expected(4), "flipped")


PERIOD = 65_521  # a prime: an offset that wraps at any power of two lands on another value


def blocks(x: torch.Tensor) -> Iterator[torch.Tensor]:
    """Rows of one period each, 64 MiB at a time."""
    rows = x[: x.numel() // PERIOD * PERIOD].view(-1, PERIOD)
    for begin in range(0, len(rows), 512):
        yield rows[begin : begin + 512]


@pytest.mark.timeout(120)
def test_more_than_two_to_the_31_elements() -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < 11 << 30:
        pytest.skip(f"needs 11 GiB of free GPU memory, here are {free / 2**30:.1f}")
    count, step = 2**31 + 17, torch.arange(PERIOD, device=DEVICE)
    tiles = [(step * (r + 1) % 509).half() for r in range(2)]  # whole numbers whose sums a half holds exactly
    xs: list[Any] = [torch.empty(count, dtype=torch.float16, device=DEVICE) for _ in range(2)]
    rest = count % PERIOD
    for x, tile in zip(xs, tiles, strict=True):
        for rows in blocks(x):
            rows.copy_(tile.expand_as(rows))
        x[-rest:] = tile[:rest]
    dpcomm.allreduce_local(group(2), xs)
    total = tiles[0] + tiles[1]
    for x in xs:
        assert all(bool((rows == total).all()) for rows in blocks(x))
        assert torch.equal(x[-rest:], total[:rest])
