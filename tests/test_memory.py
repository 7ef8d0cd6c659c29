"""What dpcomm takes of memory: arenas within their cap, up to 64 ranks, and nothing more while it runs.

Processes that stay small over many calls are in test_allreduce_processes.py.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import cases
import cpp_build
import pytest
import torch
from cases import Case
from process_memory import status_kib

import dpcomm

MIB = 2**20
CAP = 64 * MIB  # DPCOMM_ARENA_MB, of each rank, where nothing else is asked for


@pytest.mark.timeout(1500)  # the first test of a kind waits for the compiler
def test_engine_keeps_arenas_within_their_cap_and_allocates_nothing() -> None:
    """In C++, where every allocation of every thread can be counted; it has its own negative control."""
    folder = cpp_build.build("plain", ("test_memory",))
    done = cpp_build.call([str(folder / "test_memory")], 160)
    assert done.returncode == 0, f"status {done.returncode}\n{done.stdout[-8000:]}"
    assert " passed, 0 failed" in done.stdout


# --- arenas ----------------------------------------------------------------------------------------------------------


def available_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024


@contextmanager
def ranks(nranks: int) -> Iterator[list[dpcomm.Communicator]]:
    """Ranks as threads, with the arenas that a user gets who asks for nothing; closed and unmapped at the end."""
    comms = dpcomm.init_local(["cpu"] * nranks, timeout_s=40.0)
    try:
        yield comms
    finally:
        for comm in comms:
            comm.close()


@pytest.mark.parametrize("nranks", [2, 3, 8, 16], ids=lambda n: f"{n}ranks")
def test_arenas_touch_no_more_than_they_say(nranks: int) -> None:
    """The system's own count of shared pages; a rank's arena is touched as far as its slots are used."""
    gc.collect()
    before = status_kib("RssShmem")
    with ranks(nranks) as comms:
        arena = int(comms[0].describe()["arena_bytes"])
        cases.check_local(comms, Case((300_000,), "float32", "mean", "none", "direct"))
        touched = (status_kib("RssShmem") - before) * 1024
    assert arena <= CAP
    assert nranks * arena // 20 < touched <= nranks * arena  # control: the count sees them
    del comms
    gc.collect()
    assert (status_kib("RssShmem") - before) * 1024 < MIB  # given back


@pytest.mark.timeout(180)  # 64 threads on few processors
def test_64_ranks_fit_into_their_arenas() -> None:
    """64 real ranks, as threads: a small tensor, one of 1 MiB, and the ring, each to the bit."""
    need = 64 * CAP
    if available_bytes() < need:
        pytest.skip(f"64 arenas may take {need / 2**30:.0f} GiB, here are {available_bytes() / 2**30:.1f}")
    with ranks(64) as comms:
        assert max(int(comm.describe()["arena_bytes"]) for comm in comms) <= CAP
        for codec in ("none", "fp16"):
            cases.check_local(comms, Case((1000,), "float32", "mean", codec, "auto"))
            cases.check_local(comms, Case((MIB // 4,), "float32", "mean", codec, "direct"))
        cases.check_local(comms, Case((20_011,), "float32", "sum", "none", "ring"))


# --- Python objects --------------------------------------------------------------------------------------------------


def blocks_kept(shape: tuple[int, ...], calls: int, kept: list[object]) -> int:
    """Python's own memory blocks that are left after synchronous calls on every rank, warmed up.

    A list of tensors where there are several; `kept` holds on to something of each call of rank 0, if it is not empty.
    """
    comms = cases.local(2)
    xs = [[torch.ones(n) for n in shape] for _ in comms]

    def many(rank: int) -> None:
        for _ in range(calls):
            comms[rank].allreduce(xs[rank] if len(shape) > 1 else xs[rank][0], "mean")
            if kept and rank == 0:
                kept.append(object())

    with ThreadPoolExecutor(2) as threads:
        for _ in range(2):
            list(threads.map(many, range(2)))
        gc.collect()
        before = sys.getallocatedblocks()
        list(threads.map(many, range(2)))
        gc.collect()
        grown = sys.getallocatedblocks() - before
    for comm in comms:
        comm.close()
    return grown


@pytest.mark.parametrize(("shape", "calls"), [((1000,), 1000), ((100,) * 100, 300)], ids=["tensor", "list"])
def test_python_calls_keep_nothing(shape: tuple[int, ...], calls: int) -> None:
    others = 50  # blocks that the thread pool and the collector take or give back meanwhile
    assert blocks_kept(shape, calls, []) < others  # a call that keeps one object shows as `calls`
    assert blocks_kept(shape, calls, [None]) > calls - others  # control
