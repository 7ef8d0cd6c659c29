"""Two processes on one GPU over CUDA IPC. They take turns on it: a hand-over takes milliseconds, so few cases."""

from __future__ import annotations

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
from cases import Case, digest, tensor
from faulty import Caught, check
from gpu.support import DEVICE, first_error, on_device, on_gpu, stream, to_the_end, torch_works, whole
from ranks import Pool
from ranks import fresh as fresh_ranks

import dpcomm

pytestmark = [*on_gpu, pytest.mark.timeout(120)]

Pools = Callable[[int], Pool]
TURNS_S = 60.0  # without progress: processes wait for their turn on the device
PROMPT_S = 2.0  # for what must happen soon after a time-out
FAIL_S = 2.0
LARGE = 4 << 20  # elements: 16 MiB
DEADLINE_S = 90.0  # of a rank; below the test's
CASES = [
    Case((size,), dtype, "sum", codec, algorithm, special=dtype in cases.FLOATS)
    for codec, dtype in [("none", "float32"), ("none", "bfloat16"), ("none", "int64"), ("fp16", "float32")]
    for algorithm in cases.ALGORITHMS
    for size in (0, 257, 20_011)
]
CASES += [Case((1_000_003,), op="mean", codec=c, algorithm="direct", special=True) for c in ("none", "fp16")]
LISTS = [Case((300, 0, 7, 1021), codec=c, op="mean", special=True) for c in ("none", "fp16")]
LISTS += [Case((5,) * 200, codec="fp16")]


def communicator(timeout_s: float = TURNS_S, **options: Any) -> dpcomm.Communicator:
    return dpcomm.Communicator(device=DEVICE, timeout_s=timeout_s, **options)


def back(xs: list[torch.Tensor]) -> str:
    return digest([x.cpu() for x in xs])


# --- bits ------------------------------------------------------------------------------------------------------------


def run_cases(rank: int, nranks: int, todo: list[Case], flip: bool = False) -> tuple[str, str, list[str]]:
    """Engine, arena, and one digest a case; `flip` plants a wrong bit on the last rank."""
    digests = []
    with communicator() as comm:
        for case in todo:
            xs = on_device(case.inputs(rank))
            comm.allreduce(whole(xs), case.op, **case.options)
            if flip and rank == nranks - 1:
                xs[0].view(torch.uint8)[0] ^= 1
            digests.append(back(xs))
        return comm.engine, comm.describe()["arena"], digests


def test_bits_equal_the_reference(pool: Pools) -> None:
    todo = CASES + LISTS
    wanted = [digest(case.expected(2)) for case in todo]
    for engine, _, digests in pool(2).run(run_cases, todo, deadline_s=DEADLINE_S):
        assert engine == "p2p"
        assert [case for case, got, want in zip(todo, digests, wanted, strict=True) if got != want] == []


def test_a_flipped_bit_shows_in_the_hashes(pool: Pools) -> None:
    (_, _, good), (_, _, bad) = pool(2).run(run_cases, [Case((1000,))], True, deadline_s=DEADLINE_S)
    assert good == [digest(Case((1000,)).expected(2))]
    assert good != bad


def test_bits_of_an_arena_in_host_memory() -> None:
    todo = [CASES[1], CASES[-1], LISTS[0]]
    outcomes = fresh_ranks(2, run_cases, todo, env={"DPCOMM_P2P_ARENA": "pinned"}, deadline_s=DEADLINE_S)
    for outcome in outcomes:
        assert outcome.error is None, outcome.error.trace
        assert outcome.value == ("p2p", "pinned", [digest(case.expected(2)) for case in todo])


def run_async(rank: int, nranks: int, todo: list[Case]) -> list[str]:
    """Through the group's own communicator. All asynchronous, the last one synchronous: it runs behind them."""
    xs = [on_device(case.inputs(rank)) for case in todo]
    *before, (last_x, last) = zip(xs, todo, strict=True)
    works = [dpcomm.allreduce(whole(x), case.op, **case.options, async_op=True) for x, case in before]
    dpcomm.allreduce(whole(last_x), last.op, **last.options)
    assert all(work.wait() for work in works)
    return [back(x) for x in xs]


def test_async_calls_give_the_same_bits_in_their_order(pool: Pools) -> None:
    todo = [Case((n,), codec=c, seed=n) for n in (5, 300_001, 1, 70_000) for c in ("none", "fp16")] + LISTS
    for result in pool(2).run(run_async, todo, deadline_s=DEADLINE_S):
        assert result == [digest(case.expected(2)) for case in todo]


def run_mixed(rank: int, nranks: int, case: Case) -> list[str]:
    """CPU and GPU tensors of one group: each kind has a communicator of its own."""
    xs = on_device(case.inputs(rank))
    ys = [tensor(x) for x in case.inputs(rank)]
    for x in (xs, ys):
        dpcomm.allreduce(whole(x), case.op, **case.options)
    return [back(xs), digest(ys)]


def test_one_group_serves_both_kinds_of_memory(pool: Pools) -> None:
    case = Case((5000,), op="mean", codec="fp16")
    assert pool(2).run(run_mixed, case, deadline_s=DEADLINE_S) == [[digest(case.expected(2))] * 2] * 2


def run_streams(rank: int, nranks: int, calls: int) -> list[float]:
    """One communicator, two streams in turn; each tensor is the mean of equal values from its second call on."""
    streams = [stream() for _ in range(2)]
    xs = [torch.full((1000,), float(10 * i + rank), device=DEVICE) for i in range(2)]
    torch.cuda.synchronize()
    with communicator() as comm:
        for call in range(calls):
            with torch.cuda.stream(streams[call % 2]):
                comm.allreduce(xs[call % 2], "mean")
                xs[call % 2].add_(1)
        torch.cuda.synchronize()
        comm.check()
    return [value for x in xs for value in sorted(set(x.tolist()))]


def test_two_streams_take_turns(pool: Pools) -> None:
    assert pool(2).run(run_streams, 40, deadline_s=DEADLINE_S) == [[20.5, 30.5]] * 2


def replay(rank: int, nranks: int, count: int) -> tuple[str, str]:
    """A graph of one call, replayed, and the same calls made one by one."""
    hashes = []
    with communicator() as comm:
        for graphed in (True, False):
            x = torch.arange(5000, dtype=torch.float32, device=DEVICE) * (rank + 1)
            comm.allreduce(torch.ones(10, device=DEVICE))
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            if graphed:
                with torch.cuda.graph(graph):
                    x.mul_(0.75).add_(rank)
                    comm.allreduce(x, "mean")
            for _ in range(count):
                if graphed:
                    graph.replay()
                else:
                    x.mul_(0.75).add_(rank)
                    comm.allreduce(x, "mean")
            torch.cuda.synchronize()
            hashes.append(back([x]))
    return hashes[0], hashes[1]


def test_a_graph_replays_in_both_processes(pool: Pools) -> None:
    results = pool(2).run(replay, 50, deadline_s=DEADLINE_S)
    assert len({h for pair in results for h in pair}) == 1


# --- failures --------------------------------------------------------------------------------------------------------


def come_late(rank: int, nranks: int) -> tuple[Caught | None, bool, str, list[float]]:
    """Rank 1 makes its call only when rank 0 has given up. Afterwards both make a new communicator."""
    caught, nans = None, False
    with communicator(FAIL_S) as comm:
        comm.allreduce(torch.ones(1000, device=DEVICE))
        torch.cuda.synchronize()
        dist.barrier()
        if rank == 0:
            y = torch.full((LARGE,), 5.0, device=DEVICE)
            caught = first_error(comm, lambda: to_the_end(comm, y), FAIL_S + 20)
            torch.cuda.synchronize()
            nans = bool(y.isnan().all())
        dist.barrier()
    works = torch_works()
    with communicator() as comm:
        z = torch.full((3,), rank + 1.0, device=DEVICE)
        comm.allreduce(z)
        return caught, nans, works, z.tolist()


def test_a_rank_that_never_calls_is_named_and_the_context_lives(pool: Pools) -> None:
    (caught, nans, works, after), (_, _, peer_works, peer_after) = pool(2).run(come_late, deadline_s=DEADLINE_S)
    assert caught is not None
    check(caught, "CommTimeoutError", "rank 1")
    assert caught.failure.attributes["waiting_for"] == (1,)
    assert FAIL_S - 0.2 < caught.seconds < FAIL_S + PROMPT_S
    assert nans, "after a failure the output must be NaN, so that nobody takes it for a result"
    assert (works, peer_works) == ("", "")
    assert after == peer_after == [3.0] * 3


def disagree(rank: int, nranks: int) -> tuple[Caught, str]:
    with communicator() as comm:
        comm.allreduce(torch.ones(1000, device=DEVICE))
        x = torch.ones(1000 + rank, device=DEVICE)
        caught = first_error(comm, lambda: to_the_end(comm, x), 30.0)
        dist.barrier()
    return caught, torch_works()


def test_ranks_that_disagree_find_out(pool: Pools) -> None:
    for caught, works in pool(2).run(disagree, deadline_s=DEADLINE_S):
        assert caught.failure.name in ("MismatchError", "AbortedError"), caught.failure.trace
        assert "MISMATCH" in caught.text
        assert works == ""


def die(rank: int, nranks: int) -> tuple[str, str, float, str]:
    """Rank 1 is killed while kernels run; what rank 0 is told, after how long, and whether its context lives."""
    comm = communicator()
    x = torch.ones(LARGE, device=DEVICE)
    comm.allreduce(x, "mean")
    torch.cuda.synchronize()
    dist.barrier()
    began = time.monotonic()
    if rank == 1:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGKILL)).start()
    try:
        while time.monotonic() - began < 40:
            for _ in range(10):
                comm.allreduce(x, "mean")
            torch.cuda.synchronize()
        name, text = "", "no error"
    except RuntimeError as error:  # dpcomm's own, or torch's where the context is lost
        name, text = type(error).__name__, str(error)
    return name, text, time.monotonic() - began, torch_works()


def test_a_killed_process_is_an_error_and_no_hang(record_property: Callable[[str, object], None]) -> None:
    """Whether the survivor's context lives depends on the driver: it is recorded, not required."""
    survivor, victim = fresh_ranks(2, die, deadline_s=DEADLINE_S)
    assert victim.signal == signal.SIGKILL
    assert survivor.error is None, survivor.error.trace
    name, text, seconds, context = survivor.value
    record_property("survivor_error", f"{name}: {text}")
    record_property("survivor_context", context or "lives")
    record_property("seconds", round(seconds, 2))
    assert name in ("PeerLostError", "AbortedError") or "CUDA" in text, f"{name}: {text}"
    assert seconds < 0.5 + 10
