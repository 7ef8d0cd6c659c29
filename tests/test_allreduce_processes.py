"""Bits and memory between ranks that are processes: groups, asynchronous calls, and that calls allocate nothing."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import cases
import numpy as np
import pytest
import torch
import torch.distributed as dist
from cases import Case, digest, run_case, tensor
from process_memory import memory_limit, status_kib
from ranks import Pool

import dpcomm

Pools = Callable[[int], Pool]
CASES = [
    Case((size,), dtype, op, codec, algorithm, special=dtype in cases.FLOATS)
    for codec, dtype in [("none", "float32"), ("none", "bfloat16"), ("none", "int64"), ("fp16", "float32")]
    for op in cases.operations(dtype, codec)
    for algorithm in cases.ALGORITHMS
    for size in (0, 1, 257, 1021, 100_003)
] + [Case((2**20 + 3,), codec=c, algorithm="direct", special=True) for c in ("none", "fp16")]
LISTS = [Case((300, 0, 7, 1021), codec=c, op="mean", special=True) for c in ("none", "fp16")]
MIB = 1 << 20


def run_cases(rank: int, nranks: int, todo: list[Case], flip: bool = False) -> list[str]:
    """One digest a case; `flip` plants a wrong bit on the last rank."""
    digests = []
    with dpcomm.Communicator() as comm:
        for case in todo:
            xs = run_case(comm, rank, case)
            if flip and rank == nranks - 1:
                xs[0].view(torch.uint8)[0] ^= 1
            digests.append(digest(xs))
    return digests


@pytest.mark.parametrize("nranks", [2, 4], ids=lambda n: f"{n}ranks")
def test_bits_equal_the_reference(pool: Pools, nranks: int) -> None:
    todo = CASES + LISTS
    results = pool(nranks).run(run_cases, todo)
    for i, case in enumerate(todo):
        assert {per_rank[i] for per_rank in results} == {digest(case.expected(nranks))}, case


def test_a_flipped_bit_shows_in_the_hashes(pool: Pools) -> None:
    good, bad = pool(2).run(run_cases, [Case((1000,))], True)
    assert [good] == [[digest(Case((1000,)).expected(2))]]
    assert good != bad


def run_async(rank: int, nranks: int, todo: list[Case]) -> list[str]:
    """All asynchronous, the last one synchronous: it runs behind them."""
    xs = [[tensor(x) for x in case.inputs(rank)] for case in todo]
    *before, (last_x, last) = zip(xs, todo, strict=True)
    works = [dpcomm.allreduce(x, case.op, **case.options, async_op=True) for x, case in before]
    dpcomm.allreduce(last_x, last.op, **last.options)
    assert all(work.is_completed() for work in works)
    assert all(work.wait() for work in works)
    return [digest(x) for x in xs]


def test_async_calls_give_the_same_bits_in_their_order(pool: Pools) -> None:
    todo = [Case((n,), codec=c, seed=n) for n in (5, 300_001, 1, 70_000) for c in ("none", "fp16")] + LISTS
    for result in pool(2).run(run_async, todo):
        assert result == [digest(case.expected(2)) for case in todo]


def run_in_subgroup(rank: int, nranks: int, members: list[int], case: Case) -> list[str] | None:
    group = dist.new_group(members)
    if rank not in members:
        return None
    xs = [tensor(x) for x in case.inputs(members.index(rank))]
    dpcomm.allreduce(xs[0], case.op, **case.options, group=group)
    return [digest(xs)]


def test_a_subgroup_reduces_among_its_members(pool: Pools) -> None:
    case = Case((1000,), op="mean", codec="fp16")
    expected = [digest(case.expected(2))]
    assert pool(4).run(run_in_subgroup, [1, 3], case) == [None, expected, None, expected]


# --- memory ----------------------------------------------------------------------------------------------------------


def grow_over_calls(rank: int, nranks: int, calls: int) -> tuple[int, int]:
    """KiB that anonymous memory grows by over many 4 KiB calls, warmed up, and over a tenth of them that leak."""
    x, leak = torch.ones(1024), []
    with dpcomm.Communicator(codec="fp16") as comm:
        for _ in range(2000):
            comm.allreduce(x, "mean")
        gc.collect()
        start = status_kib("RssAnon")
        for _ in range(calls):
            comm.allreduce(x, "mean")
        flat = status_kib("RssAnon") - start
        for _ in range(calls // 10):
            leak.append(comm.allreduce(x, "mean").clone())
        return flat, status_kib("RssAnon") - start


def test_memory_is_flat_over_a_hundred_thousand_calls(pool: Pools) -> None:
    for flat, leaking in pool(2).run(grow_over_calls, 100_000):
        assert flat < 512  # KiB: five bytes a call
        assert leaking > 20_000  # control: 10,000 kept results of 4 KiB


def reduce_under_limit(rank: int, nranks: int) -> str:
    """Calls on 64 MiB with room for 8; an allocation of a segment's size would raise."""
    x, parts = torch.ones(16 * MIB), [torch.ones(8 * MIB), torch.ones(8 * MIB)]
    a = np.ones(16 * MIB, np.float32)
    with dpcomm.Communicator() as comm:
        comm.allreduce(torch.ones(1000), "mean", async_op=True).wait()  # the queue's thread has its stack
        with memory_limit(8 * MIB):
            for codec in ("none", "fp16"):
                for value in (x, parts, a):
                    comm.allreduce(value, "mean", codec=codec)
                    comm.allreduce(value, "mean", codec=codec, async_op=True).wait()
            with suppress(RuntimeError):
                return f"control: torch could allocate {torch.ones(16 * MIB).numel()} elements"
    return digest([x, *parts, a])


def test_calls_allocate_nothing_of_tensor_size(pool: Pools) -> None:
    ones = digest([torch.ones(48 * MIB)])
    assert pool(2).run(reduce_under_limit) == [ones] * 2


def free_gib() -> float:
    """Memory that this process may still take, by the system and by its control group."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / MIB
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):  # no such group, or "max"
        free = min(
            free, (int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())) / 2**30
        )
    return free


PERIOD = 65_521  # a prime: an offset that wraps at any power of two lands on another value


def tile(rank: int) -> cases.Array:
    """Whole numbers whose sums a half holds exactly."""
    return (np.arange(PERIOD) * (rank + 1) % 509).astype(np.float16)


@pytest.mark.timeout(240)  # touching 9 GB for the first time can take a virtual machine a minute
def test_more_than_two_to_the_31_elements() -> None:
    if free_gib() < 14:
        pytest.skip(f"needs 14 GiB of free memory, here are {free_gib():.1f}")
    count = 2**31 + 4099
    whole = count // PERIOD * PERIOD
    xs = [np.empty(count, np.float16) for _ in range(2)]
    for rank, x in enumerate(xs):
        x[:whole].reshape(-1, PERIOD)[...] = tile(rank)
        x[whole:] = tile(rank)[: count - whole]
    dpcomm.allreduce_local(cases.local(2, arena_mb=64), xs)
    total = tile(0) + tile(1)
    for x in xs:
        rows = x[:whole].view(np.uint16).reshape(-1, PERIOD)
        for begin in range(0, len(rows), 512):  # 64 MiB at a time
            assert bool((rows[begin : begin + 512] == total.view(np.uint16)).all()), f"rows from {begin}"
        assert np.array_equal(x[whole:], total[: count - whole])
