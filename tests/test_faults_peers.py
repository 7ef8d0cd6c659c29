"""Ranks that come late, stop, leave or die: typed errors on all others, soon, with the name of the culprit.

Numbers in the names count the faults that dpcomm promises to answer; those that are missing have a test elsewhere.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from faulty import Caught, catch, check, check_poisoned, file_store
from ranks import Pool, fresh

import dpcomm

Pools = Callable[[int], Pool]
TIMEOUT_S = 1.5
LARGE = 4 << 20  # elements: 16 MiB, some milliseconds a call
GRACE_S = 1.0  # for what must happen "within a second"


# --- late and stopped ------------------------------------------------------------------------------------------------


def come_late(rank: int, nranks: int, asynchronous: bool) -> tuple[int, Caught]:
    """Rank 1 makes its call only when the others have given up."""
    with dpcomm.Communicator(timeout_s=TIMEOUT_S) as comm:
        x = torch.ones(1000)
        comm.allreduce(x)
        if rank == 1:
            dist.barrier()
        y = torch.full((LARGE,), 5.0)
        call = (lambda: comm.allreduce(y, async_op=True).wait()) if asynchronous else (lambda: comm.allreduce(y))
        caught = catch(call)
        assert (y == 5.0).all(), "a call that failed at its start wrote to its tensor"
        if rank != 1:
            dist.barrier()
        check_poisoned(comm, "[TIMEOUT]", "rank 1 (pid ")
    return os.getpid(), caught


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("nranks", [2, 4], ids=lambda n: f"{n}ranks")
def test_22_a_rank_that_never_calls_is_named(pool: Pools, nranks: int, asynchronous: bool) -> None:
    results = pool(nranks).run(come_late, asynchronous)
    pid, late = results.pop(1)
    for _, caught in results:
        check(caught, "CommTimeoutError", f"rank 1 (pid {pid}, state ", "last seq 1", f"for {TIMEOUT_S:g} s")
        assert caught.failure.attributes["waiting_for"] == (1,)
        assert caught.seconds < TIMEOUT_S + GRACE_S
    assert max(caught.seconds for _, caught in results) > TIMEOUT_S - 0.2  # the first one's time ends all others' waits
    assert any("waiting for rank 1" in caught.text for _, caught in results)
    check(late, "AbortedError", "communicator aborted at seq 2", "[TIMEOUT]", within_s=GRACE_S)


def stop(rank: int, nranks: int) -> Caught:
    """Rank 1 stops in the middle of its calls; rank 0 sets it going again once it has its error."""
    with dpcomm.Communicator(timeout_s=TIMEOUT_S) as comm:
        x = torch.ones(LARGE)
        pids = comm.describe()["pids"]
        if rank == 1:
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGSTOP)).start()
        try:
            caught = catch(lambda: [comm.allreduce(x, "mean") for _ in range(100_000)])
        finally:
            if rank == 0:
                os.kill(pids[1], signal.SIGCONT)
        check_poisoned(comm, "[TIMEOUT]", f"rank 1 (pid {pids[1]}")
    return caught


def test_25_a_stopped_rank_is_named_and_learns_it_later(pool: Pools) -> None:
    waited, stopped = pool(2).run(stop)
    check(waited, "CommTimeoutError", "waiting for rank 1 (pid ", "T (stopped)")
    assert waited.seconds < 0.2 + TIMEOUT_S + GRACE_S
    check(stopped, "AbortedError", "[TIMEOUT]")
    assert stopped.ended - waited.ended < GRACE_S


# --- gone ------------------------------------------------------------------------------------------------------------


def leave(rank: int, nranks: int, how: str) -> Caught | None:
    """Rank 1 leaves after two calls; the others wait for it in their third."""
    comm = dpcomm.Communicator(timeout_s=20.0)
    for _ in range(2):
        comm.allreduce(torch.ones(1000))
    dist.barrier()  # nobody is still in a call when the first failure ends all of them
    if rank == 1:
        if how == "close":
            comm.close()
        return None
    caught = catch(comm.allreduce, torch.ones(1000))
    check_poisoned(comm, "[PEER_LOST]", "rank 1 closed its connection")
    return caught


def check_left(caught: list[Caught]) -> None:
    for one in caught:
        check(one, "PeerLostError", "rank 1 closed its connection (clean shutdown) at seq 2")
        assert one.failure.attributes["rank"] == 1


def test_23_a_rank_that_closes_is_named(pool: Pools) -> None:
    """Its process goes on, so nothing but the communicator itself can tell."""
    caught = pool(4).run(leave, "close")
    assert caught.pop(1) is None
    check_left(caught)
    assert max(c.seconds for c in caught) < GRACE_S


def test_23_a_rank_that_exits_is_named() -> None:
    outcomes = fresh(2, leave, "exit")
    assert [o.exitcode for o in outcomes] == [0, 0]
    check_left([outcomes[0].value])
    assert outcomes[0].value.ended < outcomes[1].ended + GRACE_S


def die(rank: int, nranks: int, folder: str, how: str) -> tuple[Caught, int]:
    """Rank 1 is killed in the middle of its calls; the kernel sees to it that it says nothing."""
    comm = dpcomm.Communicator(timeout_s=20.0)
    x = torch.ones(LARGE)
    if rank == 1:
        if how == "with-children":  # as a DataLoader's workers: they live on and hold what they inherited
            for _ in range(2):
                if os.fork() == 0:
                    time.sleep(60)
                    os._exit(0)
        threading.Timer(0.3, kill_self, (folder, how)).start()
    caught = catch(lambda: [comm.allreduce(x, "mean") for _ in range(1_000_000)])
    check_poisoned(comm, "[PEER_LOST]", "rank 1 (pid ")
    return caught, comm.describe()["pids"][1]


def kill_self(folder: str, how: str) -> None:
    Path(folder, "died").write_text(json.dumps(time.monotonic()))
    os.kill(os.getpid(), signal.SIGSEGV if how == "segfault" else signal.SIGKILL)


@pytest.mark.parametrize(
    ("nranks", "how"), [(2, "alone"), (2, "with-children"), (2, "segfault"), (3, "alone"), (3, "with-children")]
)
def test_24_a_killed_rank_is_named_within_a_second(tmp_path: Path, nranks: int, how: str) -> None:
    outcomes = fresh(nranks, die, str(tmp_path), how)
    dead = outcomes.pop(1)
    assert dead.signal == (signal.SIGSEGV if how == "segfault" else signal.SIGKILL)
    died = json.loads((tmp_path / "died").read_text())
    for outcome in outcomes:
        assert outcome.error is None, outcome.error.trace
        caught, pid = outcome.value
        check(caught, "PeerLostError", f"rank 1 (pid {dead.pid}) disappeared", "OOM")
        assert caught.failure.attributes["rank"] == 1
        assert pid == dead.pid
        assert 0 <= caught.ended - died < GRACE_S


def dpcomm_sockets() -> set[str]:
    return {word for word in Path("/proc/net/unix").read_text().split() if "dpcomm" in word}


def shared_files() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir() if "dpcomm" in path.name}


def shared_mib() -> float:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("Shmem:"))) / 1024


def die_together(rank: int, nranks: int, folder: str) -> None:
    store = file_store(folder, nranks)
    comms = [dpcomm.Communicator(rank=rank, nranks=nranks, store=store) for _ in range(10)]  # to be seen in the total
    for comm in comms:
        comm.allreduce(torch.ones(LARGE))
    arenas = sum(comm.describe()["arena_bytes"] for comm in comms)
    Path(folder, f"said{rank}").write_text(json.dumps([arenas, shared_mib()]))
    comms[0].allreduce(torch.ones(1))  # both have written
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGKILL)).start()
    while True:
        comms[0].allreduce(torch.ones(LARGE))


def test_nothing_is_left_after_kill_9(tmp_path: Path) -> None:
    files, sockets, before = shared_files(), dpcomm_sockets(), shared_mib()
    outcomes = fresh(2, die_together, str(tmp_path), process_group=False)
    assert {o.signal for o in outcomes} == {signal.SIGKILL}
    said = [json.loads((tmp_path / f"said{rank}").read_text()) for rank in range(2)]
    arenas = sum(size for size, _ in said) / (1 << 20)
    assert arenas > 8  # MiB
    assert max(shared for _, shared in said) - before > arenas / 2  # control: it was there
    end = time.monotonic() + 10
    while (left := shared_mib() - before) > arenas / 2 or dpcomm_sockets() - sockets:
        assert time.monotonic() < end, f"{left:.1f} MiB of shared memory, sockets {dpcomm_sockets() - sockets}"
        time.sleep(0.05)
    assert shared_files() <= files
