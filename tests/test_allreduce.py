"""Bits of an all-reduce between ranks that are threads: equal to the reference, for everything that can be asked for.

Each check also compares a hash of the result over all ranks (cases.check_bits).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any

import cases
import numpy as np
import pytest
import reference
import torch
from cases import ALGORITHMS, RANKS, Case, check_bits, check_local, tensor

import dpcomm

Comms = Callable[..., list[dpcomm.Communicator]]
KINDS = [("none", dtype) for dtype in cases.DTYPES] + [("fp16", dtype) for dtype in cases.ENCODED]
kinds = pytest.mark.parametrize(("codec", "dtype"), KINDS, ids=["-".join(kind) for kind in KINDS])


def ranks(*counts: int) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("nranks", counts, ids=lambda n: f"{n}ranks")


@pytest.fixture(scope="module")
def local() -> Iterator[Comms]:
    """local(nranks, arena_mb=..., simd=...): kept for the module, made again after a test that poisoned them."""
    kept: dict[Any, list[dpcomm.Communicator]] = {}

    def get(nranks: int, **options: Any) -> list[dpcomm.Communicator]:
        key = (nranks, *sorted(options.items()))
        if key in kept and not usable(kept[key]):
            del kept[key]
        if key not in kept:
            kept[key] = cases.local(nranks, **options)
        return kept[key]

    yield get
    for comms in kept.values():
        for comm in comms:
            comm.close()


def usable(comms: Sequence[dpcomm.Communicator]) -> bool:
    try:
        for comm in comms:
            comm.check()
    except dpcomm.Error:
        return False
    return True


def slice_elems(comm: dpcomm.Communicator, itemsize: int) -> int:
    """About how many elements of a chunk fit into one slot."""
    return int(comm.describe()["slot_bytes"]) // itemsize // 256 * 256


# --- everything at small sizes, some things at large ones ------------------------------------------------------------


@ranks(*RANKS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@kinds
def test_bits_equal_the_reference(local: Comms, codec: str, dtype: str, algorithm: str, nranks: int) -> None:
    sizes = (0, 1, 255, 256, 257, 509, 256 * nranks - 1, 256 * nranks, 256 * nranks + 1, 4099)
    for op, size in product(cases.operations(dtype, codec), sizes):
        for special in {False, dtype in cases.FLOATS}:
            check_local(local(nranks), Case((size,), dtype, op, codec, algorithm, special))


@ranks(2, 3, 4, 5, 8)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("codec", ["none", "fp16"])
def test_bits_around_slot_and_chunk_edges(local: Comms, codec: str, algorithm: str, nranks: int) -> None:
    comms = local(nranks, arena_mb=1)
    slot = slice_elems(comms[0], 4 if codec == "none" else 2)
    for size, off in product((slot, nranks * slot, 3 * nranks * slot), (-257, -1, 0, 1, 256)):
        check_local(comms, Case((size + off,), "float32", "mean", codec, algorithm))


@ranks(2, 3, 8)
@pytest.mark.parametrize("algorithm", ["direct", "oneshot", "ring"])
@pytest.mark.parametrize(("codec", "dtype"), [("none", "float32"), ("none", "bfloat16"), ("fp16", "float32")])
def test_bits_of_a_million_elements(local: Comms, codec: str, dtype: str, algorithm: str, nranks: int) -> None:
    check_local(local(nranks), Case((2**20 + 3,), dtype, "mean", codec, algorithm, special=True))


@ranks(17, 64)
@pytest.mark.parametrize("codec", ["none", "fp16"])
def test_bits_of_many_ranks(local: Comms, codec: str, nranks: int) -> None:
    for algorithm in ("direct", "oneshot", "ring"):
        check_local(local(nranks, arena_mb=8), Case((20_011,), "float32", "mean", codec, algorithm, special=True))


@pytest.mark.parametrize("sigma", [1e-42, 1e-30, 1e30, 3e38])
def test_fp16_keeps_every_magnitude(local: Comms, sigma: float) -> None:
    rng = np.random.default_rng(11)
    xs = [(rng.uniform(-1, 1, 1000) * sigma).astype(np.float32) for _ in range(3)]
    results = [tensor(x) for x in xs]
    dpcomm.allreduce_local(local(3), results, "mean", codec="fp16")
    check_bits([[y] for y in results], reference.allreduce([[x] for x in xs], "mean", codec="fp16"), sigma)


def test_result_is_whole_after_nan_and_inf_on_one_rank_only(local: Comms) -> None:
    xs = [torch.ones(1000) for _ in range(4)]
    xs[2][[100, 300]] = torch.tensor([float("nan"), float("-inf")])
    dpcomm.allreduce_local(local(4), xs, codec="fp16")
    for x in xs:
        assert torch.nonzero(~x.isfinite()).reshape(-1).tolist() == [100, 300]
        assert set(x[x.isfinite()].tolist()) == {4.0}


# --- lists, layouts, kinds of arrays ---------------------------------------------------------------------------------


@ranks(1, 2, 3, 5)
@kinds
def test_lists_start_new_groups_and_may_hold_empty_tensors(local: Comms, codec: str, dtype: str, nranks: int) -> None:
    for algorithm, counts in product(
        ALGORITHMS, [(0, 0), (1, 0, 255, 1), (257, 3, 0, 1021, 256), (7,) * 40, (9001, 2)]
    ):
        check_local(local(nranks), Case(counts, dtype, "sum", codec, algorithm, special=dtype in cases.FLOATS))


@pytest.mark.parametrize("bucket_cap_mb", [1e-3, 25.0])
def test_lists_of_mixed_dtypes_have_the_bits_of_single_calls(bucket_cap_mb: float) -> None:
    rng = np.random.default_rng(12)
    kinds_ = ["float32", "bfloat16", "float32", "int64", "float16", "bfloat16", "float32"]
    xs = [[cases.values(d, 300 + i, rng) for i, d in enumerate(kinds_)] for _ in range(2)]
    results = [[tensor(x) for x in segments] for segments in xs]
    comms = dpcomm.init_local(["cpu"] * 2, bucket_cap_mb=bucket_cap_mb)
    dpcomm.allreduce_local(comms, results)
    check_bits(results, reference.allreduce(xs), f"cap {bucket_cap_mb}")


@pytest.mark.parametrize("offset", [1, 3, 7])
@kinds
def test_odd_offsets_work_and_neighbours_are_not_touched(local: Comms, codec: str, dtype: str, offset: int) -> None:
    case = Case((1021,), dtype, "sum", codec, "direct")
    bases = [tensor(np.concatenate([x, x, x])) for x in (case.inputs(r)[0] for r in range(3))]
    before = [cases.array(base).copy() for base in bases]
    mine = slice(1021 + offset, 2042 - offset)
    dpcomm.allreduce_local(local(3), [base[mine] for base in bases], codec=codec)
    expected = reference.allreduce([[b[mine]] for b in before], codec=codec)[0]
    for base, old in zip(bases, before, strict=True):
        wanted = old.copy()
        wanted[mine] = expected
        check_bits([[base]], [wanted], f"offset {offset}")


# What the user passes, made of 1200 float32 numbers. All but the last two kinds are views of them.
LAYOUTS: dict[str, Callable[[np.ndarray[Any, Any]], Any]] = {
    "transposed": lambda x: torch.from_numpy(x).view(40, 30).t(),
    "strided": lambda x: torch.from_numpy(x)[::3],
    "channels_last": lambda x: torch.from_numpy(x).view(2, 5, 12, 10).to(memory_format=torch.channels_last),
    "row_of_columns": lambda x: torch.from_numpy(x).view(40, 30)[:, 3:7],
    "scalar": lambda x: torch.from_numpy(x)[5],
    "negative_bit": lambda x: torch._neg_view(torch.from_numpy(x)),
    "numpy": lambda x: x,
    "numpy_transposed": lambda x: x.reshape(40, 30).T,
    "numpy_reversed": lambda x: x[::-1],
    "numpy_fortran": lambda x: np.asfortranarray(x.reshape(40, 30)),
    "numpy_big_endian": lambda x: x.astype(">f4"),
    "numpy_unaligned": lambda x: np.frombuffer(bytearray(b"-" + x.tobytes()), np.uint8)[1:].view(np.float32),
}


def logical(x: Any) -> cases.Array:
    """The values in the order of their indices, in memory of their own."""
    flat = x.resolve_neg().reshape(-1).numpy() if isinstance(x, torch.Tensor) else np.asarray(x).reshape(-1)
    return flat.astype(np.float32, copy=True)


@pytest.mark.parametrize("codec", ["none", "fp16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_reduced_in_the_order_of_their_indices(local: Comms, layout: str, codec: str) -> None:
    rng = np.random.default_rng(13)
    memory = [rng.standard_normal(1200).astype(np.float32) for _ in range(3)]
    old = [m.copy() for m in memory]
    xs = [LAYOUTS[layout](m) for m in memory]
    inputs = [[logical(x)] for x in xs]
    dpcomm.allreduce_local(local(3), xs, codec=codec)
    check_bits([[logical(x)] for x in xs], reference.allreduce(inputs, codec=codec), layout)
    for m, o in zip(memory, old, strict=True):  # what the view leaves out has not changed
        assert np.count_nonzero(m != o) <= inputs[0][0].size


@pytest.mark.parametrize("op", ["sum", "mean"])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_numbers_are_reduced_by_parts(local: Comms, dtype: torch.dtype, op: str) -> None:
    xs = [torch.randn(777, dtype=dtype, generator=torch.Generator().manual_seed(r)) for r in range(3)]
    parts = [[torch.view_as_real(x.conj().resolve_conj()).numpy().reshape(-1).copy()] for x in xs]
    views = [x.conj() for x in xs]  # lazily conjugated
    dpcomm.allreduce_local(local(3), views, op)
    results = [[torch.view_as_real(v.resolve_conj()).reshape(-1)] for v in views]
    check_bits(results, reference.allreduce(parts, op), dtype)


# --- what must not change bits ---------------------------------------------------------------------------------------


CORPUS = [
    *(Case((5003,), d, op, "none", "direct", d in cases.FLOATS) for d in cases.DTYPES for op in cases.operations(d)),
    *(
        Case((5003, 17), "float32", op, "fp16", a, s)
        for op in ("sum", "mean")
        for a in ALGORITHMS
        for s in (False, True)
    ),
]


@ranks(2, 3)
@pytest.mark.parametrize("simd", dpcomm.info()["simd"])
def test_each_instruction_set_gives_the_same_bits(local: Comms, simd: str, nranks: int) -> None:
    comms = local(nranks, simd=simd)
    assert {comm.describe()["simd"] for comm in comms} == {simd}
    for case in CORPUS:
        check_local(comms, case)


@pytest.mark.parametrize("arena_mb", [1, 7, 64])
def test_slot_sizes_do_not_change_bits(local: Comms, arena_mb: int) -> None:
    for case in CORPUS:
        check_local(local(2, arena_mb=arena_mb), case)


def test_flushing_denormals_does_not_change_bits() -> None:
    denormal = Case((3000,), "float32", "mean", "none", special=True)
    scaled = [(x[0] * np.float32(1e-41)) for x in (Case((3000,)).inputs(r) for r in range(2))]
    expected = [denormal.expected(2), reference.allreduce([[x] for x in scaled], "mean", codec="fp16")]
    assert torch.set_flush_denormal(True)
    try:
        assert (torch.full((8,), 1e-40) * 1).tolist() == [0] * 8  # control: this thread does flush
        comms = cases.local(2)  # their threads inherit the setting
        results = [[tensor(x)] for x in scaled]
        dpcomm.allreduce_local(comms, [x[0] for x in results], "mean", codec="fp16")
        check_bits(results, expected[1], "fp16")
        with ThreadPoolExecutor(2) as threads:  # synchronous calls run in the caller's thread, which flushes, too
            xs = [tensor(denormal.inputs(r)[0]) for r in range(2)]
            list(threads.map(lambda comm, x: (torch.set_flush_denormal(True), comm.allreduce(x, "mean")), comms, xs))
        check_bits([[x] for x in xs], expected[0], "none")
        assert (torch.full((8,), 1e-40) * 1).tolist() == [0] * 8  # a call leaves the caller's setting alone
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("everywhere", [False, True], ids=["one-rank", "all-ranks"])
def test_a_flipped_bit_is_noticed(local: Comms, everywhere: bool) -> None:
    case = Case((700, 300), "bfloat16")
    results = cases.run_local(local(3), case)
    check_bits(results, case.expected(3), "control")
    for segments in results if everywhere else results[1:2]:
        segments[1].view(torch.int16)[299] ^= 1
    with pytest.raises(AssertionError, match="segment 1 differ, first at 299" if everywhere else "replicas differ"):
        check_bits(results, case.expected(3), "flipped")


# --- at random -------------------------------------------------------------------------------------------------------


def random_case(rng: np.random.Generator, seed: int) -> Case:
    codec = str(rng.choice(["none", "fp16"]))
    dtype = str(rng.choice(cases.DTYPES if codec == "none" else cases.ENCODED))
    counts = [int(2 ** rng.uniform(0, 15)) - 1 for _ in range(rng.integers(1, 7))]
    op, algorithm = rng.choice(cases.operations(dtype, codec)), rng.choice(ALGORITHMS)
    special = dtype in cases.FLOATS and bool(rng.integers(2))
    return Case(tuple(counts), dtype, str(op), codec, str(algorithm), special, seed)


def test_fuzz(local: Comms) -> None:
    rng = np.random.default_rng(2718)
    end = time.monotonic() + 8
    done = 0
    while done < 500 and time.monotonic() < end:
        case, nranks, arena_mb = random_case(rng, done), int(rng.choice(RANKS)), int(rng.choice([1, 4]))
        check_local(local(nranks, arena_mb=arena_mb), case)
        done += 1
    assert done >= 30


def test_ranks_are_not_left_one_call_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a rank cannot begin a call, those that have begun it end, instead of meeting its next one."""
    comms = dpcomm.init_local(["cpu"] * 3)

    def fail(*_: object) -> None:
        raise MemoryError("planted")

    monkeypatch.setattr(comms[1], "_submit", fail)
    xs = [torch.ones(1000) for _ in comms]
    with pytest.raises(MemoryError, match="planted"):
        dpcomm.allreduce_local(comms, xs)
    monkeypatch.undo()
    for comm, x in zip(comms, xs, strict=True):
        with pytest.raises(dpcomm.AbortedError, match="allreduce_local: MemoryError"):
            comm.allreduce(x)
        comm.close()
