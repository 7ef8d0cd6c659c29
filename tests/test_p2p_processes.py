"""Engine p2p between processes, on the stand-in CUDA runtime: bits, lists, order, what `init_local` and `info` say.

`ranks.py` plays the ranks; each has taken the extension of `stand_in.py` before it imports dpcomm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import cases
import numpy as np
import pytest
import stand_in
from cases import Case, check_bits, digest
from ranks import Pool, fresh
from stand_in import GpuArray

import dpcomm
from dpcomm import _native

pytestmark = [
    pytest.mark.timeout(900),  # the first test waits for the compiler
    pytest.mark.skipif(bool(stand_in.WHY_NOT), reason=stand_in.WHY_NOT),
]
Pools = Callable[[int], Pool]
CODINGS = [("none", dtype) for dtype in cases.DTYPES] + [("fp16", dtype) for dtype in cases.ENCODED]
CASES = [
    Case((size,), dtype, op, codec, algorithm, special=dtype in cases.FLOATS)
    for codec, dtype in CODINGS
    for op in cases.operations(dtype, codec)
    for algorithm in cases.ALGORITHMS
    for size in (1, 1021)
] + [Case((size,), codec=c, algorithm=a) for c in ("none", "fp16") for a in cases.ALGORITHMS for size in (0, 100_003)]
LISTS = [Case((300, 0, 7, 1021), codec=c, op="mean", special=True) for c in ("none", "fp16")] + [Case((7, 40) * 60)]


@pytest.fixture(scope="module")
def gpus() -> Iterator[Pools]:
    """gpus(n): ranks on two GPUs, by turns."""
    pools: dict[int, Pool] = {}

    def pool(nranks: int) -> Pool:
        if nranks not in pools or pools[nranks].broken:
            pools[nranks] = Pool(nranks, env=stand_in.environment())
        return pools[nranks]

    yield pool
    for each in pools.values():
        each.close()


def run_cases(rank: int, nranks: int, todo: list[Case], flip: bool = False) -> list[str]:
    """One digest a case, by the native half: NumPy's interface has no bfloat16. All are on their way at once."""
    digests: list[str] = []
    with dpcomm.Communicator(device=f"cuda:{rank % 2}", timeout_s=20.0) as comm:
        assert comm._native is not None
        memory, works = [], []
        for case in todo:
            xs = [x.copy() for x in case.inputs(rank)]
            numbers = (_native.DTYPES[case.dtype], _native.OPS[case.op], _native.CODECS[case.codec])
            places = [x.ctypes.data for x in xs], [x.size for x in xs]
            algorithm = _native.ALGORITHMS[case.algorithm]
            works.append(comm._native.enqueue(*places, *numbers, algorithm, -1, 0))
            memory.append(xs)
        for xs, work in zip(memory, works, strict=True):
            assert work.synchronize(20.0)
            if flip and rank == nranks - 1:
                xs[0].view(np.uint8)[0] ^= 1
            digests.append(digest(xs))
    return digests


@pytest.mark.parametrize("nranks", [2, 3], ids=lambda n: f"{n}ranks")
def test_bits_equal_the_reference(gpus: Pools, nranks: int) -> None:
    todo = CASES + LISTS
    results = gpus(nranks).run(run_cases, todo)
    for i, case in enumerate(todo):
        assert {per_rank[i] for per_rank in results} == {digest(case.expected(nranks))}, case


def test_a_flipped_bit_shows_in_the_hashes(gpus: Pools) -> None:
    good, bad = gpus(2).run(run_cases, [Case((1000,))], True)
    assert [good] == [[digest(Case((1000,)).expected(2))]]
    assert good != bad


def run_arrays(rank: int, nranks: int, todo: list[Case]) -> tuple[list[str], dict[str, Any]]:
    """Through the Python face: one array or a list, synchronous and asynchronous by turns."""
    with dpcomm.Communicator(device=f"cuda:{rank % 2}", engine="p2p") as comm:
        all_xs = []
        for i, case in enumerate(todo):
            xs = [GpuArray(x) for x in case.inputs(rank)]
            work = comm.allreduce(xs if len(xs) > 1 else xs[0], case.op, **case.options, async_op=i % 2 == 1)
            assert i % 2 == 0 or work.wait(20.0)
            all_xs.append(xs)
        comm.allreduce(GpuArray(np.ones(3, np.float32)), async_op=True).wait(20.0)  # behind all that went before
        return [digest([x.x for x in xs]) for xs in all_xs], {**comm.describe(), **comm.stats()}


def test_arrays_and_lists_of_them(gpus: Pools) -> None:
    todo = [c for c in CASES + LISTS if c.dtype in ("float32", "int64") and c.algorithm in ("auto", "ring")]
    for rank, (digests, facts) in enumerate(gpus(2).run(run_arrays, todo)):
        assert digests == [digest(case.expected(2)) for case in todo]
        assert (facts["engine"], facts["arena"], facts["device"]) == ("p2p", "device", rank % 2)
        peers = ["ipc", "ipc"]
        peers[rank] = "own"
        assert facts["peers"] == peers
        assert facts["calls"] == facts["sequence"] >= len(todo)


def run_local(rank: int, nranks: int, devices: list[int], case: Case) -> list[list[bytes]]:
    comms = dpcomm.init_local(devices, timeout_s=20.0)
    all_xs = []
    for _ in range(3):
        xs = [[GpuArray(x) for x in case.inputs(r)] for r in range(len(devices))]
        dpcomm.allreduce_local(comms, [x if len(x) != 1 else x[0] for x in xs], case.op, **case.options)
        all_xs.append(xs)
    works = [comm.allreduce(GpuArray(np.ones(3, np.float32)), async_op=True) for comm in comms]
    assert all(work.wait(20.0) for work in works)
    for comm in comms:
        comm.close()
    for xs in all_xs:
        check_bits([[x.x for x in of_rank] for of_rank in xs], case.expected(len(devices)), f"{devices}, {case}")
    return []


@pytest.mark.parametrize("devices", [[0, 0], [0, 1, 0], [1, 1, 0, 0]], ids=str)
def test_ranks_of_one_process(gpus: Pools, devices: list[int]) -> None:
    for case in (Case((70_000,), op="mean", codec="fp16"), LISTS[0], Case((5,), algorithm="ring")):
        gpus(2).run(run_local, devices, case)


def describe_machine(rank: int, nranks: int) -> tuple[list[str], str, list[str]]:
    with dpcomm.Communicator(device="cuda:0") as comm:
        x = GpuArray(np.full(1000, rank + 1.0, np.float32))
        comm.allreduce(x, async_op=True).wait(20.0)
        assert (x.x == sum(range(1, nranks + 1))).all()
        uuids = [str(device["uuid"]) for device in _native.cuda_devices()]
        return uuids, str(comm.describe()["device_name"]), list(comm.describe()["peers"])


def test_ordinals_may_name_other_gpus_in_other_processes() -> None:
    """CUDA_VISIBLE_DEVICES: what a rank calls cuda:0 is another GPU than its peer's; UUIDs tell."""
    outcomes = fresh(2, describe_machine, env=[stand_in.environment(f"visible={v}") for v in ("0:1", "1:0")])
    (first, name, peers), (second, _, _) = (o.value for o in outcomes)
    assert first == second[::-1]
    assert (name, peers) == ("Stand-in GPU", ["own", "ipc"])
