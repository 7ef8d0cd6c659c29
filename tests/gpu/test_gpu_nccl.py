"""Engine nccl on a GPU: everything with one rank, and ranks that share one GPU where NCCL allows it.

One rank is the native communicator alone (dpcomm itself moves nothing then): NCCL's communicator, streams, graphs and
all kernels run, and only messages to others are missing. Bits: what a codec makes of one contribution, twice.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import product
from typing import Any

import cases
import numpy as np
import pytest
import reference
import torch
from cases import Array, Case, check_bits, digest, tensor
from gpu.support import DEVICE, on_gpu, whole
from ranks import fresh as fresh_ranks

import dpcomm
from dpcomm import _native, cuda_arrays, nccl, nccl_library

WHY_NOT = nccl_library.reason() if torch.cuda.is_available() else "no GPU for torch"
pytestmark = [
    *on_gpu,
    pytest.mark.timeout(120),
    pytest.mark.skipif(bool(WHY_NOT), reason=f"no NCCL: {WHY_NOT}"),
]

KINDS = [("none", dtype) for dtype in cases.DTYPES] + [("fp16", dtype) for dtype in cases.ENCODED]
ALGORITHMS = ("auto", "direct", "oneshot", "ring")
ARENA_BYTES = 4 << 20  # several slices from 128 KiB on
TIMEOUT_S = 20.0
SIZES = (1, 255, 256, 257, 4099, 2**20 + 3)


@pytest.fixture
def one() -> Iterator[Any]:
    """The native communicator of one rank."""
    nccl_library.find()
    comm = _native.NcclComm(
        rank=0, device=0, wish=_native.NcclWish(ARENA_BYTES), pids=[os.getpid()], hosts=[""], sockets=[(-1, -1)]
    )
    comm.connect(_native.nccl_unique_id(), TIMEOUT_S)
    comm.verify(TIMEOUT_S, "one")
    yield comm
    comm.close(1.0)


def reduce(comm: Any, x: torch.Tensor, case: Case) -> Any:
    """Puts one call on torch's current stream."""
    plain = cuda_arrays.direct(x, 0)
    assert plain is not None
    numbers = (_native.DTYPES[case.dtype], _native.OPS[case.op], _native.CODECS[case.codec])
    stream = torch.cuda.current_stream().cuda_stream
    pending = comm.enqueue([plain[0]], [plain[1]], *numbers, _native.ALGORITHMS[case.algorithm], -1, stream)
    pending.join(stream, TIMEOUT_S)
    return pending


def expected(x: Array, case: Case) -> Array:
    """One rank's result: direct and oneshot encode it as a contribution, and again as a result; a ring has no turn.

    Native codes are cast and widened, with NCCL's all-reduce between them, which copies.
    """
    if case.algorithm == "native":
        return reference.native([x], case.op, case.codec)
    return x if case.algorithm == "ring" else reference.rank_order([x], case.op, case.codec)


@pytest.mark.parametrize(("codec", "dtype"), KINDS, ids=["-".join(kind) for kind in KINDS])
def test_one_rank_has_the_bits_of_its_codec(one: Any, codec: str, dtype: str) -> None:
    for size, algorithm in product(SIZES, ALGORITHMS):
        case = Case((size,), dtype, "sum", codec, algorithm)
        x = case.inputs(0)[0]
        there = tensor(x).to(DEVICE)
        assert reduce(one, there, case).synchronize(TIMEOUT_S)
        check_bits([[there.cpu()]], [expected(x, case)], case)


@pytest.mark.parametrize("dtype", cases.ENCODED)
@pytest.mark.parametrize("codec", ["fp16", "bf16"])
def test_one_rank_has_the_bits_of_native_codes(one: Any, codec: str, dtype: str) -> None:
    for size, special in product(SIZES, (False, True)):  # the largest takes several messages
        case = Case((size,), dtype, "mean", codec, "native", special=special)
        x = case.inputs(0)[0]
        there = tensor(x).to(DEVICE)
        assert reduce(one, there, case).synchronize(TIMEOUT_S)
        check_bits([[there.cpu()]], [expected(x, case)], case)


def test_a_wrong_bit_is_noticed(one: Any) -> None:
    case = Case((4099,), codec="fp16")
    x = case.inputs(0)[0]
    there = tensor(x).to(DEVICE)
    assert reduce(one, there, case).synchronize(TIMEOUT_S)
    wrong = there.cpu()
    wrong.view(torch.int32)[17] ^= 1
    with pytest.raises(AssertionError):
        check_bits([[wrong]], [expected(x, case)], case)


@pytest.mark.parametrize(("codec", "algorithm"), [("none", "auto"), ("fp16", "auto"), ("fp16", "native")])
def test_a_graph_is_replayed(one: Any, codec: str, algorithm: str) -> None:
    case = Case((2**18 + 3,), codec=codec, algorithm=algorithm)
    x = torch.zeros(case.counts, device=DEVICE)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        reduce(one, x, case)
    for i in range(3):
        values = np.random.default_rng(i).standard_normal(case.counts).astype(np.float32)
        x.copy_(torch.from_numpy(values))
        graph.replay()
        torch.cuda.synchronize()
        check_bits([[x.cpu()]], [expected(values, case)], f"replay {i} of {case}")
    del graph  # before the communicator closes


def test_calls_are_in_the_order_of_the_stream(one: Any) -> None:
    x = torch.zeros(1 << 20, device=DEVICE)
    torch.cuda._sleep(50_000_000)  # type: ignore[no-untyped-call]
    x += 1
    reduce(one, x, Case(tuple(x.shape), codec="fp16"))
    x *= 3
    assert torch.equal(x.cpu(), torch.full((1 << 20,), 3.0))


def test_statistics_count_what_is_not_finite(one: Any) -> None:
    x = torch.ones(4096, device=DEVICE)
    x[300] = float("nan")
    x[3000] = float("inf")
    assert reduce(one, x, Case(tuple(x.shape), codec="fp16")).synchronize(TIMEOUT_S)
    assert torch.isnan(x[300])
    assert torch.isinf(x[3000])
    assert one.stats(False)["nonfinite_groups"] >= 2


# --- ranks that are processes ----------------------------------------------------------------------------------------

PROCESSES = [
    Case((size,), codec=codec, algorithm=algorithm)
    for size, codec, algorithm in product((257, 2**18 + 3), ("none", "fp16"), ALGORITHMS)
] + [Case((size,), codec=codec, algorithm="native") for size in (257, 2**18 + 3) for codec in ("fp16", "bf16")]


def run_cases(rank: int, nranks: int) -> list[str]:
    device = f"cuda:{rank % torch.cuda.device_count()}"
    digests = []
    with dpcomm.Communicator(engine="nccl", device=device, timeout_s=TIMEOUT_S) as comm:
        for case in PROCESSES:
            xs = [tensor(x).to(device) for x in case.inputs(rank)]
            comm.allreduce(whole(xs), case.op, **case.options)
            digests.append(digest([x.cpu() for x in xs]))
    return digests


def why_no_two_ranks() -> str:
    if torch.cuda.device_count() >= 2 or WHY_NOT:
        return WHY_NOT
    version = nccl_library.find().version
    shares = tuple(int(part) for part in version.split(".")) >= nccl.SHARES_SINCE
    return "" if shares else f"one GPU, which NCCL {version} gives to one rank only"


@pytest.mark.skipif(bool(why_no_two_ranks()), reason=why_no_two_ranks())
def test_two_processes_have_the_bits_of_the_reference() -> None:
    outcomes = fresh_ranks(2, run_cases, env={nccl.SHARES_GPU: "1"})
    assert [o.error for o in outcomes] == [None, None]
    for case, *digests in zip(PROCESSES, *(o.value for o in outcomes), strict=True):
        assert len(set(digests)) == 1, case
        if case.codec != "none" or case.algorithm != "auto":  # NCCL's own sums are in its own order; two have only one
            assert digests[0] == digest([tensor(x) for x in case.expected(2)]), case
