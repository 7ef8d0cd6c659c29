"""What engines between hosts take of memory: their scratch within its cap for any number of ranks, also while they run.

Memory over many calls: test_gloo.py. Arenas of engine shm: test_memory.py.
"""

from __future__ import annotations

import gc
import logging
import os
import socket
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import torch.distributed as dist
from process_memory import status_kib
from ranks import fresh

import dpcomm
from dpcomm import _native, carriers

MIB = 1 << 20
CAP = 64 * MIB  # DPCOMM_ARENA_MB, of each rank, where nothing else is asked for


class NoCarrier:
    """For an engine that makes no call."""

    def adds(self, dtype: str) -> bool:
        return False

    def abort(self) -> None: ...
    def close(self) -> None: ...


@contextmanager
def engine(nranks: int, scratch_bytes: int) -> Iterator[_native.CarriedComm]:
    """Rank 0 of so many, of which the others are only ends of sockets."""
    with ExitStack() as stack:
        sockets = [(-1, -1)]
        for _ in range(1, nranks):
            control, headers = (socket.socketpair() for _ in range(2))
            for theirs in (control[1], headers[1]):
                stack.enter_context(theirs)
            sockets.append((control[0].detach(), headers[0].detach()))
        comm = _native.CarriedComm(
            rank=0,
            wish=_native.CarriedWish(scratch_bytes),
            pids=[os.getpid()] * nranks,
            hosts=[""] * nranks,
            sockets=sockets,
            carrier=NoCarrier(),
            simd="portable",
            engine="gloo",
        )
        stack.callback(comm.close, 0.0)
        yield comm


def scratch(nranks: int, scratch_bytes: int) -> int:
    """How much of it an engine will use at most, as it says."""
    with engine(nranks, scratch_bytes) as comm:
        used = comm.describe()["arena_bytes"]
        assert isinstance(used, int)
        return used


def test_scratch_is_within_its_cap_for_any_number_of_ranks() -> None:
    used = {nranks: scratch(nranks, CAP) for nranks in range(2, _native.MAX_RANKS + 1)}
    assert max(used.values()) <= CAP, used
    assert min(used[nranks] for nranks in range(4, 65)) > CAP // 2, used  # control: it is no smaller than it may be
    assert all(scratch(nranks, 2 * CAP) > CAP for nranks in (8, 64))  # control: more is seen


def test_a_cap_that_holds_not_even_the_smallest_slots_is_refused() -> None:
    for nranks in (2, 64):
        with pytest.raises(dpcomm.ArgumentError, match=f"too small for {nranks} ranks. Raise DPCOMM_ARENA_MB"):
            scratch(nranks, 64 * 1024)


# --- measured --------------------------------------------------------------------------------------------------------


@contextmanager
def peak_growth() -> Iterator[list[int]]:
    """By how many bytes the resident memory of this process grew at most while the block ran; filled in at its end."""
    found: list[int] = []
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before = status_kib("VmRSS")
    yield found
    found.append((status_kib("VmHWM") - before) * 1024)


def run_large_calls(rank: int, nranks: int, engine: str) -> tuple[int, int, int]:
    """Growth over calls of 100 MiB of every kind, from before the scratch is touched; how much of it there is, as the
    communicator says; and growth in a call with a copy of the tensor.
    """
    x = torch.ones(100 * MIB // 4)
    with dpcomm.Communicator(engine=engine, timeout_s=40.0) as comm:
        with peak_growth() as grown:
            for codec in ("none", "fp16"):
                for algorithm in ("auto", "direct", "ring", "oneshot"):
                    comm.allreduce(x, "mean", codec=codec, algorithm=algorithm)
        assert bool((x == 1).all())
        with peak_growth() as with_copy:
            comm.allreduce(x.clone(), "mean")
        return grown[0], int(comm.describe()["arena_bytes"]), with_copy[0]


@pytest.mark.parametrize("nranks", [2, 3], ids=lambda n: f"{n}ranks")
@pytest.mark.parametrize("engine", ["gloo", "torch"])
def test_calls_of_100_mib_take_no_more_than_the_scratch(engine: str, nranks: int) -> None:
    """What engine torch stages is within it."""
    for outcome in fresh(nranks, run_large_calls, engine):
        assert outcome.error is None, outcome.error.trace
        grown, said, with_copy = outcome.value
        assert said <= CAP
        assert CAP // 4 < grown <= CAP, f"{grown / MIB:.0f} MiB"  # control: it is seen at all
        assert with_copy >= 99 * MIB  # control: so is a copy of the tensor


# --- what gloo does not let go of ------------------------------------------------------------------------------------


class Stuck:
    """A group of gloo's whose all-reduces go on until they are let go."""

    def __init__(self) -> None:
        self.ended = False

    def rank(self) -> int:
        return 1

    def size(self) -> int:
        return 3

    def recv(self, *_: Any) -> NoReturn:
        raise RuntimeError("Connection closed by peer")

    def allreduce(self, _: list[torch.Tensor]) -> Stuck:
        return self

    def is_completed(self) -> bool:
        return self.ended


@pytest.mark.parametrize("ended", [False, True], ids=["stuck", "ended"])
def test_an_abort_that_leaves_gloo_at_work_says_so_once_and_keeps_its_group(
    ended: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(carriers, "END_S", 0.2)
    kept: list[Any] = []
    monkeypatch.setattr(carriers, "_abandoned", kept)
    group = Stuck()
    carrier = carriers.GlooCarrier()
    carrier.connect(carriers.GlooGroups(group, group))
    x = torch.ones(8)
    carrier.add(0, [(-1, x.data_ptr(), 16), (-1, x.data_ptr() + 16, 16)], "float32")
    group.ended = ended
    began = time.monotonic()
    carrier.abort()
    carrier.abort()
    carrier.close()
    assert time.monotonic() - began < 2.0
    if ended:
        assert not caplog.records
        assert not kept
        return
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "rank 1: 2 of gloo's own all-reduces have not ended 0.2 s after" in record.getMessage()
    assert "Keep those tensors" in record.getMessage()
    ((groups, works),) = kept
    assert groups.up is group
    assert works == [group, group]


# --- communicators that are dropped while a call runs ----------------------------------------------------------------


def drop(rank: int, nranks: int, in_carrier: bool) -> tuple[list[bool], float]:
    """Lets go of communicator, Work and tensor of a call under way. The collector finds them on this thread, or on the
    one that runs the call. Says at each wait of the call whether the tensor was there, and the sum.
    """
    there: list[bool] = []
    wait = carriers.GlooCarrier.wait

    def collect_and_wait(self: carriers.GlooCarrier, ticket: int, timeout_s: float) -> carriers.Arrival:
        if in_carrier:
            gc.collect()
        there.append(tensor() is not None)
        return wait(self, ticket, timeout_s)

    gc.disable()
    comm = dpcomm.Communicator(engine="gloo", timeout_s=10.0)
    dropped, x = weakref.ref(comm), torch.full((1 << 20,), rank + 1.0)
    tensor = weakref.ref(x)
    if rank == 1:  # calls when rank 0's call has begun and is held by nobody else, and keeps everything
        dist.barrier()
        time.sleep(0.5)
        comm.allreduce(x)
        result = float(x[0])
        dist.barrier()
        comm.close()
        return [True], result
    carriers.GlooCarrier.wait = collect_and_wait  # type: ignore[method-assign]
    summed = torch.empty(0).set_(x.untyped_storage())  # unlike a view it does not hold the tensor itself
    comm.allreduce(x, async_op=True)
    del comm, x
    dist.barrier()
    if not in_carrier:
        gc.collect()  # waits for the call
        assert dropped() is None
    until = time.monotonic() + 10.0
    names = {"dpcomm-calls", "dpcomm-abort"}
    while names & {thread.name for thread in threading.enumerate()} and time.monotonic() < until:
        time.sleep(0.01)
    assert not names & {thread.name for thread in threading.enumerate()}, "it was not closed"
    while tensor() is not None and time.monotonic() < until:
        time.sleep(0.01)
    assert dropped() is None
    assert tensor() is None, "the tensor is kept for ever"
    dist.barrier()
    return there, float(summed[0])


@pytest.mark.parametrize("in_carrier", [False, True], ids=["found-by-the-caller", "found-by-the-call"])
def test_what_a_dropped_communicator_works_on_lives_until_its_call_has_ended(in_carrier: bool) -> None:
    first, second = fresh(2, drop, in_carrier, deadline_s=30.0)
    for outcome in (first, second):
        assert outcome.error is None, outcome.error.trace
        there, result = outcome.value
        assert there
        assert all(there), "the tensor went while the call worked on it"
        assert result == 3.0
