"""A process that is interrupted, forks, closes in the middle or ends: its own communicators, and those of its peers.

Numbers in the names count the faults that dpcomm promises to answer; those that are missing have a test elsewhere.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import cases
import pytest
import torch
import torch.distributed as dist
from faulty import Caught, catch, check, check_poisoned
from ranks import Outcome, Pool, fresh

import dpcomm

Pools = Callable[[int], Pool]
LARGE = 4 << 20  # elements: 16 MiB, some milliseconds a call
GRACE_S = 1.0  # for what must happen "within a second"


def own_store(name: str) -> Any:
    """A store of its own on that of the process group: communicators built on it are independent of the group."""
    return dist.PrefixStore(name, dist.distributed_c10d._get_default_store())  # type: ignore[attr-defined]


# --- interrupted -----------------------------------------------------------------------------------------------------


def interrupt_after(delay_s: float) -> list[float]:
    """Sends this process a Ctrl-C later; the list then holds when."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with it ignored
    sent: list[float] = []

    def send() -> None:
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    threading.Timer(delay_s, send).start()
    return sent


def soon(run: Callable[[int], list[Any]], within_s: float = 0.4) -> list[Any]:
    """The ranks' results of a run, called with 0, 1, ..., in which a Ctrl-C ended rank 0's wait in that time: a busy
    machine has five tries. 0.2 s where nothing else runs."""
    for attempt in range(5):
        results = run(attempt)
        name, seconds = results[0]
        assert name == "KeyboardInterrupt"
        if seconds < within_s:
            break
    assert seconds < within_s
    return results


def interrupt_call(rank: int, nranks: int) -> tuple[str, float] | Caught:
    with dpcomm.Communicator(timeout_s=20.0) as comm:
        x = torch.full((1000,), 3.0)
        if rank == 1:
            dist.barrier()
            return catch(comm.allreduce, x)
        sent = interrupt_after(0.3)
        caught = catch(comm.allreduce, x)
        dist.barrier()
        assert (x == 3.0).all()
        check_poisoned(comm, "gave up at seq 1: interrupted")
        return caught.failure.name, caught.ended - sent[0]


def test_30_ctrl_c_ends_a_call_and_poisons(pool: Pools) -> None:
    _, peer = soon(lambda _: pool(2).run(interrupt_call))
    check(peer, "AbortedError", "rank 0 gave up at seq 1: interrupted", within_s=GRACE_S)


def interrupt_wait(rank: int, nranks: int) -> tuple[str, float] | None:
    with dpcomm.Communicator(timeout_s=20.0) as comm:
        x = torch.ones(1000)
        if rank == 1:
            dist.barrier()
            comm.allreduce(x)
            return None
        sent = interrupt_after(0.3)
        work = comm.allreduce(x, async_op=True)
        caught = catch(work.wait)
        dist.barrier()
        assert work.wait(10.0), "the call goes on"
        assert (x == 2.0).all()
        return caught.failure.name, caught.ended - sent[0]


def test_30_ctrl_c_ends_a_wait_but_not_the_call(pool: Pools) -> None:
    soon(lambda _: pool(2).run(interrupt_wait))


def interrupt_construction(rank: int, nranks: int, attempt: int) -> tuple[str, float] | Caught:
    """Rank 0 waits for rank 1 to come; whoever comes after the Ctrl-C learns of it at once."""
    store = own_store(f"interrupted-{os.getppid()}-{attempt}")
    if rank == 1:
        dist.barrier()
        return catch(dpcomm.Communicator, rank=1, nranks=2, store=store, timeout_s=20.0)
    sent = interrupt_after(0.3)
    caught = catch(dpcomm.Communicator, rank=0, nranks=2, store=store, timeout_s=20.0)
    dist.barrier()
    return caught.failure.name, caught.ended - sent[0]


def test_30_ctrl_c_ends_a_construction(pool: Pools) -> None:
    _, peer = soon(lambda attempt: pool(2).run(interrupt_construction, attempt))
    check(peer, "AbortedError", "KeyboardInterrupt", within_s=GRACE_S)


# --- closed, forked, at exit -----------------------------------------------------------------------------------------


def test_59_close_waits_for_calls_in_flight_then_aborts_them() -> None:
    comms = cases.local(2)
    x = torch.full((1000,), 3.0)
    work = comms[0].allreduce(x, async_op=True)
    began = time.monotonic()
    comms[0].close()
    assert 4.5 < time.monotonic() - began < 6.5
    for caught in (catch(work.wait, 5.0), catch(comms[1].allreduce, torch.ones(1000))):
        check(caught, "AbortedError", "closed while operations were in flight", within_s=GRACE_S)
    assert (x == 3.0).all()


def test_59_close_does_not_cut_off_what_can_end() -> None:
    comms = cases.local(2)
    works = [[c.allreduce(torch.ones(LARGE), async_op=True) for _ in range(5)] for c in comms]
    closers = [threading.Thread(target=comm.close) for comm in comms]
    for closer in closers:
        closer.start()
    for closer in closers:
        closer.join(20.0)
    assert all(work.wait(0.0) for ws in works for work in ws)


def use_in_child(rank: int, nranks: int) -> tuple[int, list[Any]]:
    with dpcomm.Communicator(timeout_s=10.0) as comm:
        comm.allreduce(torch.ones(10))
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                caught = [catch(comm.allreduce, torch.ones(10), async_op=a) for a in (False, True)]
                caught += [catch(f) for f in (comm.check, comm.describe, comm.stats)]  # none has the memory
                comm.close()  # nothing of the parent's
                os.write(writer, json.dumps([(c.failure.name, c.text) for c in caught]).encode())
            finally:
                os._exit(0)
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            said = json.loads(pipe.read())
        assert os.waitpid(child, 0)[1] == 0
        x = torch.full((10,), rank + 1.0)
        assert comm.allreduce(x).tolist() == [3.0] * 10, "the child has disturbed its parent's communicator"
        return os.getpid(), [child, said]


def test_60_a_forked_child_is_told_and_its_parent_is_undisturbed(pool: Pools) -> None:
    for pid, (child, said) in pool(2).run(use_in_child):
        assert len(said) == 5
        for name, text in said:
            assert name == "ForkError"
            assert text.startswith("[dpcomm:FORK] ")
            assert f"created in pid {pid}, used in pid {child}" in text
            assert "spawn" in text


def end_with_work(rank: int, nranks: int) -> None:
    """A group destroyed first, then an exit with calls under way that can never end, and nothing closed."""
    comm = dpcomm.Communicator(timeout_s=60.0)
    dist.destroy_process_group()
    assert comm.allreduce(torch.ones(3)).tolist() == [2.0] * 3  # 50: it has channels of its own
    if rank == 0:
        globals()["_kept"] = comm, comm.allreduce(torch.ones(LARGE), async_op=True)


def test_50_70_exit_is_quiet_with_the_group_gone_and_calls_pending(capfd: pytest.CaptureFixture[str]) -> None:
    outcomes: list[Outcome] = fresh(2, end_with_work)
    for outcome in outcomes:
        assert outcome.error is None, outcome.error.trace
        assert outcome.exitcode == 0
    said = capfd.readouterr()
    assert "Traceback" not in said.err
    assert "terminate" not in said.err
