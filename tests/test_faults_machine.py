"""Machines that lack something: instruction sets, memory for the arenas. The same bits, or the same error on all ranks.

Numbers in the names count the faults that dpcomm promises to answer; those that are missing have a test elsewhere.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import Case, digest, tensor
from faulty import Caught, catch, check, check_all, check_usable
from ranks import Pool
from stores import build

import dpcomm
from dpcomm import _native

Pools = Callable[[int], Pool]
GRACE_S = 1.0
CLONE_NEWNS, MS_BIND, MS_REC, MS_PRIVATE = 0x20000, 4096, 16384, 1 << 18
CASES = [
    Case((5003, 17, 0, 300), "float32", "mean", "fp16", "direct", special=True),
    Case((5003, 17, 0, 300), "float32", "mean", "none", "direct", special=True),
    Case((700, 3), "bfloat16", "sum", "none", "oneshot", special=True),
    Case((700, 3), "float16", "mean", "none", "auto", special=True),
    Case((999,), "int64", "max"),
]


@contextmanager
def environment(**wanted: str | None) -> Iterator[None]:
    """Some variables set, or taken away where the value is None."""
    before = {name: os.environ.get(name) for name in wanted}
    apply(wanted)
    try:
        yield
    finally:
        apply(before)


def apply(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


# --- instruction sets ------------------------------------------------------------------------------------------------


def reduce_with(rank: int, nranks: int, sets: list[str]) -> tuple[str, list[str]]:
    """The instruction set in use, and a hash of each case's result."""
    with environment(DPCOMM_SIMD=sets[rank]), dpcomm.Communicator(timeout_s=10.0) as comm:
        hashes = []
        for case in CASES:
            xs = [tensor(x) for x in case.inputs(rank)]
            comm.allreduce(xs, case.op, **case.options)
            hashes.append(digest(xs))
        return str(comm.describe()["simd"]), hashes


@pytest.mark.parametrize("first", dpcomm.info()["simd"])
def test_ranks_without_avx2_have_the_bits_of_those_with_it(pool: Pools, first: str) -> None:
    """Each rank may run on other instructions; `portable` are those of a machine without AVX2."""
    sets = [first, "portable"]
    wanted = [digest(case.expected(2)) for case in CASES]
    assert pool(2).run(reduce_with, sets) == [(name, wanted) for name in sets]


def construct_on_an_old_processor(rank: int, nranks: int, asked: str) -> tuple[Caught, float]:
    """Rank 1 runs where there is nothing but `portable`; afterwards it does not ask for more."""
    with environment(DPCOMM_SIMD=asked if rank == 1 else None), pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(_native, "simd", lambda: ["portable"])
        caught = catch(dpcomm.Communicator, timeout_s=10.0)
    with dpcomm.Communicator(timeout_s=10.0) as comm:
        return caught, float(comm.allreduce(torch.ones(3))[0])


@pytest.mark.parametrize("asked", ["avx512", "avx2", "neon"])
def test_68_instructions_that_one_processor_lacks_are_named_on_all_ranks(pool: Pools, asked: str) -> None:
    results = pool(2).run(construct_on_an_old_processor, asked)
    wanted = f"DPCOMM_SIMD='{asked}': this processor offers portable"
    check_all([caught for caught, _ in results], "ArgumentError", "rank 1", wanted, within_s=GRACE_S)
    assert [total for _, total in results] == [2.0] * 2


# --- memory ----------------------------------------------------------------------------------------------------------


def test_44_more_ranks_than_the_arena_can_serve() -> None:
    """The message says how much would do, and that does."""
    with environment(DPCOMM_ARENA_MB="1"):
        caught = build([dist.HashStore()] * 64)  # type: ignore[attr-defined]
        check_all(caught, "ArgumentError", "too small for 64 ranks", "Raise DPCOMM_ARENA_MB", within_s=20.0)
        here = catch(dpcomm.init_local, ["cpu"] * 64)
        check(here, "ArgumentError", "too small for 64 ranks", "Raise DPCOMM_ARENA_MB")
    needed = re.search(r"at least (\d+)", here.text)
    assert needed is not None
    with environment(DPCOMM_ARENA_MB=str(-(-int(needed[1]) // (1 << 20)))):
        check_usable(dpcomm.init_local(["cpu"] * 64, timeout_s=20.0))


def differ_in_arenas(rank: int, nranks: int) -> Caught:
    with environment(DPCOMM_ARENA_MB=str(8 + rank)):
        return catch(dpcomm.Communicator, timeout_s=10.0)


def test_other_arenas_on_one_rank_are_a_mismatch(pool: Pools) -> None:
    check_all(pool(2).run(differ_in_arenas), "MismatchError", "arena", within_s=GRACE_S)


def see_little_memory(meminfo: str) -> str:
    """For this thread the machine has no more memory than that file says; why not, where that is refused."""
    libc = ctypes.CDLL(None, use_errno=True)
    steps: list[tuple[str, Callable[[], int]]] = [
        ("unshare(CLONE_NEWNS)", lambda: libc.unshare(CLONE_NEWNS)),
        ("mount(/)", lambda: libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None)),
        ("mount(/proc/meminfo)", lambda: libc.mount(meminfo.encode(), b"/proc/meminfo", None, MS_BIND, None)),
    ]
    for name, step in steps:
        if step() != 0:
            return f"{name}: {os.strerror(ctypes.get_errno())}"
    return ""


def construct_in_little_memory(rank: int, nranks: int, meminfo: str) -> list[Any]:
    """What a construction raises; then one with small arenas, as the message advises. Or why it could not be tried."""
    outcome: list[Any] = []

    def construct() -> None:
        if refused := see_little_memory(meminfo):
            outcome.append(refused)
            return
        outcome.append(catch(dpcomm.Communicator, timeout_s=10.0))
        with environment(DPCOMM_ARENA_MB="1"), dpcomm.Communicator(timeout_s=10.0) as comm:
            outcome.append(float(comm.allreduce(torch.ones(3))[0]))

    thread = threading.Thread(target=construct)  # its view of the file system ends with it
    thread.start()
    thread.join()
    return outcome


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for a mount namespace")
def test_44_more_ranks_than_there_is_memory_for(pool: Pools, tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 4096 kB\nMemAvailable: 1024 kB\nSwapFree: 512 kB\n")
    results = pool(4).run(construct_in_little_memory, str(meminfo))
    if isinstance(results[0][0], str):
        pytest.skip(f"no mount namespace to be had: {results[0][0]}")
    caught = [outcome[0] for outcome in results]
    wanted = ("stage 'allocate'", "MiB of shared memory", "1.5 MiB left under /proc/meminfo", "DPCOMM_ARENA_MB lower")
    check_all(caught, "SystemResourceError", *wanted, within_s=GRACE_S)
    assert [c.failure.attributes["errno"] for c in caught] == [errno.ENOMEM] * 4
    assert [outcome[1] for outcome in results] == [4.0] * 4
