"""Constructions that cannot succeed: every rank raises the same error, soon, and nobody is left waiting.

Numbers in the names count the faults that dpcomm promises to answer; those that are missing have a test elsewhere.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from faulty import Caught, catch, check, check_all, check_usable, file_store
from ranks import Pool, fresh
from stores import Spy, at, build, with_spy_on_rank_1

import dpcomm

Pools = Callable[[int], Pool]
GRACE_S = 1.0
CLONE_NEWNET = 0x40000000


def hash_store() -> Any:
    return dist.HashStore()  # type: ignore[attr-defined]


# --- arguments, sizes, options ---------------------------------------------------------------------------------------


def test_34_more_ranks_than_the_engine_serves() -> None:
    store = hash_store()
    caught = build([store] * 65)
    check_all(caught, "UnsupportedError", "shm engine supports at most 64 ranks, got 65", within_s=10.0)
    check(catch(dpcomm.init_local, ["cpu"] * 65), "UnsupportedError", "at most 64 ranks, got 65")


@pytest.mark.parametrize(
    ("odd", "name", "text"),
    [
        ({"codec": "fp16"}, "MismatchError", "codec: rank 0 has 'none', rank 1 has 'fp16'"),
        ({"algorithm": "direct"}, "MismatchError", "algorithm: rank 0 has 'auto', rank 1 has 'direct'"),
        ({"bucket_cap_mb": 1.0}, "MismatchError", "bucket_cap_mb: rank 0 has 25.0, rank 1 has 1.0"),
        ({"timeout_s": -1.0}, "ArgumentError", "timeout_s=-1.0"),
        ({"codec": "zip"}, "ArgumentError", "unknown codec 'zip'"),
        ({"engine": "nccl"}, "ArgumentError", "CUDA not available"),
        ({"engine": "gloo"}, "MismatchError", "engine: rank 0 has 'auto', rank 1 has 'gloo'"),
        ({"device": "meta"}, "UnsupportedError", "device='meta': dpcomm serves memory of CPUs and CUDA devices"),
        ({"max_ctas": 8}, "ArgumentError", "max_ctas=8: a communicator on CPU has no CTAs"),
    ],
)
def test_an_odd_option_of_one_rank_fails_on_all(odd: dict[str, Any], name: str, text: str) -> None:
    caught = build([hash_store()] * 3, [{}, odd, {}])
    check_all(caught, name, text, within_s=GRACE_S)


def test_time_limits_may_differ() -> None:
    comms = build([hash_store()] * 2, [{"timeout_s": 5.0}, {"timeout_s": 6.0}])
    assert [comm.timeout_s for comm in comms] == [5.0, 6.0]
    check_usable(comms)


# --- places ----------------------------------------------------------------------------------------------------------


@contextmanager
def other_network() -> Iterator[None]:
    """This thread in a network namespace of its own: what a rank on another host looks like to abstract sockets."""
    libc = ctypes.CDLL(None, use_errno=True)
    with Path("/proc/self/ns/net").open() as home:
        if libc.unshare(CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "unshare(CLONE_NEWNET)")
        try:
            yield
        finally:
            assert libc.setns(home.fileno(), CLONE_NEWNET) == 0


def construct_apart(rank: int, nranks: int, folder: str, engine: str) -> Caught | str:
    def make() -> Caught:
        store = file_store(folder, nranks)
        return catch(dpcomm.Communicator, rank=rank, nranks=nranks, store=store, engine=engine, timeout_s=10.0)

    if rank != 1:
        return make()
    try:
        with other_network():
            return make()
    except OSError as error:
        return str(error)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for a network namespace")
@pytest.mark.parametrize(
    ("engine", "name", "texts"),
    [
        ("shm", "UnsupportedError", ("engine shm", "ranks [0] on ", "ranks [1] on ", "network namespace", "'gloo'")),
        # Tries the network, of which the second host has none; test_hosts.py has hosts with one.
        ("auto", "ArgumentError", ("rank 1, stage 'allocate-network'", "GLOO_SOCKET_IFNAME='lo'")),
    ],
)
def test_35_ranks_on_two_hosts(pool: Pools, tmp_path: Path, engine: str, name: str, texts: tuple[str, ...]) -> None:
    caught = pool(2).run(construct_apart, str(tmp_path), engine)
    if isinstance(caught[1], str):
        pytest.skip(f"no network namespace to be had: {caught[1]}")
    check_all(caught, name, *texts, within_s=GRACE_S)


# --- resources -------------------------------------------------------------------------------------------------------


@contextmanager
def limit(which: int, soft: int) -> Iterator[None]:
    before = resource.getrlimit(which)
    resource.setrlimit(which, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(which, before)


def construct_with_small_files(rank: int, nranks: int) -> tuple[Caught, float]:
    """Beyond RLIMIT_FSIZE the kernel would kill with SIGXFSZ; afterwards a construction succeeds."""
    with limit(resource.RLIMIT_FSIZE, 1 << 20 if rank == 1 else resource.RLIM_INFINITY):
        caught = catch(dpcomm.Communicator, timeout_s=10.0)
    with dpcomm.Communicator(timeout_s=10.0) as comm:
        return caught, float(comm.allreduce(torch.ones(3))[0])


def test_44_no_memory_for_one_rank(pool: Pools) -> None:
    results = pool(2).run(construct_with_small_files)
    wanted = ("rank 1, stage 'allocate'", "MiB of shared memory", "RLIMIT_FSIZE", "ulimit -f", "DPCOMM_ARENA_MB")
    check_all([caught for caught, _ in results], "SystemResourceError", *wanted, within_s=GRACE_S)
    assert [caught.failure.attributes["errno"] for caught, _ in results] == [errno.EFBIG] * 2
    assert [total for _, total in results] == [2.0] * 2


def construct_without_descriptors(rank: int, nranks: int) -> Caught:
    """Rank 1 has no descriptor left once it has said who it is."""
    base = dist.PrefixStore(f"emfile-{os.getppid()}", dist.distributed_c10d._get_default_store())  # type: ignore[attr-defined]
    with limit(resource.RLIMIT_NOFILE, resource.getrlimit(resource.RLIMIT_NOFILE)[0]):

        def exhaust(record: bytes) -> bytes:
            if rank == 1:
                free = os.dup(0)  # the lowest free number: no descriptor from there on
                os.close(free)
                resource.setrlimit(resource.RLIMIT_NOFILE, (free, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
            return record

        store = Spy(base, at("validate", exhaust))
        return catch(dpcomm.Communicator, rank=rank, nranks=nranks, store=store, timeout_s=10.0)


def test_45_no_descriptors_for_one_rank(pool: Pools) -> None:
    caught = pool(2).run(construct_without_descriptors)
    check_all(caught, "SystemResourceError", "rank 1, stage 'allocate'", "memfd_create", within_s=GRACE_S)
    assert [c.failure.attributes["errno"] for c in caught] == [errno.EMFILE] * 2


# --- who does not come, or comes in another order --------------------------------------------------------------------


def test_49_a_rank_that_never_comes() -> None:
    caught = build([hash_store()] * 2, [{"timeout_s": 1.0}] * 2, nranks=4)
    check_all(caught, "CommTimeoutError", "ranks [2, 3] did not reach stage 'hello' in 1 s", within_s=1 + GRACE_S)
    assert all(c.failure.attributes["waiting_for"] == (2, 3) for c in caught)


@pytest.mark.parametrize("stage", ["validate", "allocate", "probe", "bind", "verify"])
def test_49_a_rank_that_stops_on_the_way(stage: str) -> None:
    caught = build(with_spy_on_rank_1(3, at(stage, lambda record: None)), [{"timeout_s": 1.0}] * 3)
    check_all(caught, "CommTimeoutError", f"ranks [1] did not reach stage '{stage}' in 1 s", within_s=1 + GRACE_S)


def die_on_the_way(rank: int, nranks: int, folder: str) -> Caught:
    def die(record: bytes) -> bytes | None:
        if rank == 1:
            Path(folder, "died").write_text(str(time.monotonic()))
            os.kill(os.getpid(), signal.SIGKILL)
        return record

    store = Spy(file_store(folder, nranks), at("probe", die))
    return catch(dpcomm.Communicator, rank=rank, nranks=nranks, store=store, timeout_s=20.0)


def test_24_a_rank_killed_during_construction_is_named(tmp_path: Path) -> None:
    first, dead, last = fresh(3, die_on_the_way, str(tmp_path), process_group=False)
    died = float((tmp_path / "died").read_text())
    for outcome in (first, last):
        assert outcome.error is None, outcome.error.trace
        check(outcome.value, "PeerLostError", f"rank 1 (pid {dead.pid}) disappeared before stage 'probe'")
        assert outcome.value.ended - died < GRACE_S


def construct_crosswise(rank: int, nranks: int) -> list[Caught | float]:
    groups = [dist.new_group([0, 1]) for _ in range(2)]
    order = groups if rank == 0 else groups[::-1]
    caught: list[Caught | float] = [catch(dpcomm.Communicator, group, timeout_s=5.0) for group in order]
    with dpcomm.Communicator(groups[0], timeout_s=5.0) as comm:  # the same order from here on
        return [*caught, float(comm.allreduce(torch.ones(3))[0])]


def test_51_communicators_made_in_another_order(pool: Pools) -> None:
    results = pool(2).run(construct_crosswise)
    for i in range(2):
        caught = [result[i] for result in results]
        check_all(caught, "MismatchError", "communicator #", "group: rank 0 has '", "same order", within_s=GRACE_S)
    assert [result[2] for result in results] == [2.0] * 2
