"""Engine p2p between processes when something goes wrong, on the stand-in CUDA runtime: typed errors on all ranks.

Ranks that disagree, stop, die, leave or fork; machines on which GPUs do not reach each other, on one rank or on all.
What only one process sees (launches, streams, memory) is tested in C++: tests/cpp/test_p2p_faults.cpp.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import stand_in
import torch.distributed as dist
from faulty import Caught, catch, check, check_all
from heard import heard
from rank_process import Failure
from ranks import Outcome, Pool, fresh
from stand_in import GpuArray

import dpcomm

pytestmark = [
    pytest.mark.timeout(900),  # the first test waits for the compiler
    pytest.mark.skipif(bool(stand_in.WHY_NOT), reason=stand_in.WHY_NOT),
]
WITHIN_S = 1.0
TIMEOUT_S = 1.5
BEFORE = 3  # calls that go well, so that the sequence number in a message means something
LONG_S = 20.0


@pytest.fixture(scope="module")
def gpus() -> Iterator[Callable[[], Pool]]:
    """gpus(): two ranks, a GPU each."""
    pools: list[Pool] = []

    def pool() -> Pool:
        if not pools or pools[-1].broken:
            pools.append(Pool(2, env=stand_in.environment()))
        return pools[-1]

    yield pool
    for each in pools:
        each.close()


def join(rank: int, timeout_s: float = LONG_S) -> dpcomm.Communicator:
    return dpcomm.Communicator(device=f"cuda:{rank % 2}", timeout_s=timeout_s)


def ones(count: int = 1000) -> GpuArray:
    return GpuArray(np.ones(count, np.float32))


def reduce(comm: dpcomm.Communicator, x: Any = None, op: str = "sum", **options: Any) -> None:
    """One call, waited for on the host: what failed on the device is raised."""
    comm.allreduce(ones() if x is None else x, op, async_op=True, **options).wait(LONG_S)


def reduce_for_ever(comm: dpcomm.Communicator) -> None:
    while True:
        reduce(comm)


def check_poisoned(comm: dpcomm.Communicator, *cause: str) -> None:
    """Every further call raises AbortedError at once and names the first cause."""
    for asynchronous in (False, True):
        x = ones(300)
        again = catch(comm.allreduce, x, async_op=asynchronous)
        check(again, "AbortedError", *cause, within_s=WITHIN_S)
        assert (x.x == 1).all(), "a refused call wrote to its array"
    catch(comm.check)


# --- disagreement ----------------------------------------------------------------------------------------------------


class Ask(NamedTuple):
    """What one rank asks for. Several counts make a list of arrays."""

    counts: tuple[int, ...] = (1000,)
    dtype: str = "float32"
    op: str = "sum"
    codec: str = "none"
    algorithm: str = "auto"


# The words are those of engine shm: tests/test_faults_mismatch.py.
FAULTS: dict[str, tuple[Ask, Ask, str]] = {
    "empty-meets-full": (Ask((0,)), Ask((8,)), "numel: rank 0 has 0, rank 1 has 8"),
    "numel": (Ask((4,)), Ask((8,)), "numel: rank 0 has 4, rank 1 has 8"),
    "numel-of-many-slots": (Ask((1 << 20,)), Ask((5,)), "numel: rank 0 has 1048576, rank 1 has 5"),
    "number-of-tensors": (Ask((8,)), Ask((4, 4)), "number of tensors: rank 0 has 1, rank 1 has 2"),
    "sizes-of-tensors": (Ask((300, 500)), Ask((500, 300)), "rank 0 and rank 1 have as many elements, but in tens"),
    "dtype": (Ask(), Ask(dtype="int32"), "dtype: rank 0 has float32, rank 1 has int32"),
    "op": (Ask(op="mean"), Ask(op="sum"), "op: rank 0 has mean, rank 1 has sum"),
    "codec": (Ask(), Ask(codec="fp16"), "codec: rank 0 has none, rank 1 has fp16"),
    "algorithm": (Ask(algorithm="direct"), Ask(algorithm="oneshot"), "algorithm: rank 0 has direct, rank 1 has on"),
}


def disagree(rank: int, nranks: int, asks: list[Ask]) -> Caught:
    ask = asks[rank]
    with join(rank, 5.0) as comm:
        for _ in range(BEFORE):
            reduce(comm)
        xs = [GpuArray(np.ones(n, ask.dtype)) for n in ask.counts]
        dist.barrier()
        x = xs if len(xs) > 1 else xs[0]
        caught = catch(reduce, comm, x, ask.op, codec=ask.codec, algorithm=ask.algorithm)
        if ask.dtype == "float32":
            assert all(np.isnan(x.x).all() for x in xs), "what was not reduced could be taken for a result"
        check_poisoned(comm, "communicator aborted at seq", "because: [MISMATCH]")
    return caught


@pytest.mark.parametrize("fault", FAULTS)
def test_disagreement_is_named_on_all_ranks(gpus: Callable[[], Pool], fault: str) -> None:
    first, second, text = FAULTS[fault]
    caught = gpus().run(disagree, [first, second])
    check_all(caught, "MismatchError", text, f"seq {BEFORE + 1})", within_s=WITHIN_S)


# --- late, stopped, gone ---------------------------------------------------------------------------------------------


def come_late(rank: int, nranks: int) -> tuple[int, Caught]:
    with join(rank, TIMEOUT_S) as comm:
        reduce(comm)
        if rank == 1:
            dist.barrier()
        caught = catch(reduce, comm)
        if rank == 0:
            dist.barrier()
        check_poisoned(comm, "[TIMEOUT]", "rank 1 (pid ")
    return os.getpid(), caught


def test_a_rank_that_never_calls_is_named(gpus: Callable[[], Pool]) -> None:
    (_, waited), (pid, late) = gpus().run(come_late)
    check(waited, "CommTimeoutError", f"waiting for rank 1 (pid {pid}, state ", "last seq 1", f"for {TIMEOUT_S:g} s")
    assert waited.failure.attributes["waiting_for"] == (1,)
    assert TIMEOUT_S - 0.2 < waited.seconds < TIMEOUT_S + WITHIN_S
    check(late, "AbortedError", "communicator aborted at seq 2", "[TIMEOUT]", within_s=WITHIN_S)


def stop(rank: int, nranks: int) -> Caught:
    """Rank 1 stops in the middle of its calls; rank 0 sets it going again once it has its error."""
    with join(rank, TIMEOUT_S) as comm:
        pids = comm.describe()["pids"]
        if rank == 1:
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGSTOP)).start()
        try:
            caught = catch(reduce_for_ever, comm)
        finally:
            if rank == 0:
                os.kill(pids[1], signal.SIGCONT)
        check_poisoned(comm, "[TIMEOUT]", f"rank 1 (pid {pids[1]}")
    return caught


def test_a_stopped_rank_is_named_with_its_state(gpus: Callable[[], Pool]) -> None:
    waited, _ = gpus().run(stop)
    check(waited, "CommTimeoutError", "waiting for rank 1", "state T (stopped)")


def reduce_until_it_fails(rank: int, nranks: int, folder: str, how: str) -> Caught:
    """Rank 1 leaves in the middle of the calls: killed, by closing, or by the exit of its process."""
    comm = join(rank)
    for _ in range(50):
        reduce(comm)
    if rank != 1:
        return catch(reduce_for_ever, comm)
    time.sleep(0.3)  # the others are in their call
    Path(folder, "left").write_text(json.dumps(time.monotonic()))
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "close":
        comm.close()
    raise SystemExit(0)


@pytest.mark.parametrize(
    ("how", "text"),
    [("kill", "disappeared"), ("close", "closed its connection (clean shutdown) at seq 50"), ("exit", "rank 1")],
)
def test_a_rank_that_leaves_is_named_within_a_second(tmp_path: Path, how: str, text: str) -> None:
    outcomes = fresh(3, reduce_until_it_fails, str(tmp_path), how, env=stand_in.environment())
    left = json.loads((tmp_path / "left").read_text())
    assert [o.exitcode for o in outcomes] == [0, -9 if how == "kill" else 0, 0]
    for rank in (0, 2):
        assert outcomes[rank].error is None, outcomes[rank].error
        caught = outcomes[rank].value
        check(caught, "PeerLostError", text, "rank 1")
        assert caught.failure.attributes["rank"] == 1
        assert caught.ended - left < WITHIN_S, f"took {caught.ended - left:.2f} s"


def fork(rank: int, nranks: int) -> list[tuple[str, str]]:
    with join(rank) as comm:
        reduce(comm)
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                caught = [catch(comm.allreduce, ones(), async_op=a) for a in (False, True)]
                caught += [catch(f) for f in (comm.check, comm.describe, comm.stats)]
                comm.close()  # nothing of the parent's
                os.write(writer, json.dumps([(c.failure.name, c.text) for c in caught]).encode())
            except BaseException as error:  # noqa: BLE001 - the parent reports it
                os.write(writer, json.dumps([("child", repr(error))]).encode())
            finally:
                os._exit(0)
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            said = json.loads(pipe.read())
        os.waitpid(child, 0)
        reduce(comm)  # the parent's goes on
    return [(str(name), str(text)) for name, text in said]


def test_a_forked_child_may_not_use_it(gpus: Callable[[], Pool]) -> None:
    for said in gpus().run(fork):
        assert [name for name, _ in said] == ["ForkError"] * 5, said
        assert all("spawn start method" in text for _, text in said)


# --- machines --------------------------------------------------------------------------------------------------------


class Made(NamedTuple):
    """How a construction ended: with an arena of this kind, or an error."""

    arena: str
    caught: Caught | None
    warnings: list[str]


def make(rank: int, nranks: int, timeout_s: float) -> Made:
    """A construction and, if it succeeds, a call."""
    with heard() as warnings:
        try:
            made = join(rank, timeout_s)
        except dpcomm.Error as error:
            now = time.monotonic()
            return Made("", Caught(Failure.of(error), now, now), warnings)
        with made as comm:
            x = GpuArray(np.full(5000, rank + 1.0, np.float32))
            reduce(comm, x)
            assert (x.x == nranks * (nranks + 1) / 2).all()
            return Made(str(comm.describe()["arena"]), None, warnings)


def construct(machines: list[str], **more: str) -> list[Made]:
    env = [stand_in.environment(machine, **more) for machine in machines]
    outcomes: list[Outcome] = fresh(len(machines), make, 6.0, env=env)
    assert [(o.error, o.exitcode) for o in outcomes] == [(None, 0)] * len(machines)
    return [o.value for o in outcomes]


BROKEN = {
    "no-ipc": (["ipc=fail", "ipc=fail"], "cudaIpcGetMemHandle"),
    "no-ipc-on-one": (["", "ipc=fail"], "cudaIpcGetMemHandle"),
    "no-peers": (["peers=none", "peers=none"], "no peer access"),
    "drops": (["peers=drop", "peers=drop"], "does not carry data"),
    "drops-on-one": (["peers=drop", ""], "does not carry data"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_ranks_fall_back_to_host_memory_together(case: str) -> None:
    machines, text = BROKEN[case]
    first, *others = construct(machines)
    assert [made.arena for made in (first, *others)] == ["pinned"] * len(machines)
    assert [len(made.warnings) for made in (first, *others)] == [1] + [0] * len(others)
    for fragment in ("peer-to-peer memory does not work", text, "DPCOMM_P2P_ARENA=pinned"):
        assert fragment in first.warnings[0]


@pytest.mark.parametrize("case", ["no-ipc-on-one", "drops"])
def test_or_all_refuse(case: str) -> None:
    machines, text = BROKEN[case]
    for made in construct(machines, DPCOMM_P2P_ARENA="device"):
        assert made.caught is not None
        assert made.caught.failure.name == "P2PUnavailableError", made.caught.failure.trace
        assert text in made.caught.text


def test_pinned_memory_can_be_asked_for() -> None:
    assert construct(["", ""], DPCOMM_P2P_ARENA="pinned") == [Made("pinned", None, [])] * 2


@pytest.mark.parametrize(
    ("machines", "name", "text"),
    [
        (["driver=none", "driver=none"], "ArgumentError", "CUDA not available"),
        (["", "driver=none"], "ArgumentError", "CUDA not available"),
        (["image=none", "image=none"], "VersionError", "do not run on GPU"),
        (["", "image=none"], "VersionError", "CUDAARCHS"),
        (["memory_mib=1", ""], "SystemResourceError", "bytes of GPU memory"),
    ],
    ids=["no-driver", "no-driver-on-one", "no-image", "no-image-on-one", "no-memory-on-one"],
)
def test_what_one_rank_lacks_all_are_told(machines: list[str], name: str, text: str) -> None:
    for made in construct(machines):
        assert made.caught is not None
        check(made.caught, name, text)
