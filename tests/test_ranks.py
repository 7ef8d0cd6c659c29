"""The harness itself: results, tracebacks, deaths, deadlines, and that nothing is left behind."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist

Pools = Callable[[int], ranks.Pool]


class Typed(RuntimeError):
    """An exception with an attribute, as dpcomm's have them."""

    def __init__(self, message: str, rank: int = -1) -> None:
        super().__init__(message)
        self.rank = rank


def gather(rank: int, nranks: int, offset: int) -> list[int]:
    x = torch.tensor([rank + offset])
    seen = [torch.zeros_like(x) for _ in range(nranks)]
    dist.all_gather(seen, x)
    return [int(v) for v in seen]


def pid(rank: int, nranks: int) -> int:
    return os.getpid()


def fail_on_one(rank: int, nranks: int) -> None:
    if rank == 1:
        raise Typed("planted", rank=1)
    dist.barrier()  # waits for the one that has failed


def hang_on_one(rank: int, nranks: int) -> None:
    if rank == 1:
        threading.Event().wait(60)


def leave_a_child(rank: int, nranks: int) -> int:
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return child


def end_differently(rank: int, nranks: int) -> Any:
    if rank == 0:
        return "value", os.environ["DPCOMM_TEST_OF_RANKS"], dist.is_initialized()
    if rank == 1:
        raise Typed("planted", rank=7)
    sys.exit(5)


def test_pool_returns_results_in_rank_order_and_stays(pool: Pools) -> None:
    assert pool(2).run(gather, 10) == [[10, 11]] * 2
    assert pool(2).run(pid) == pool(2).run(pid)


def test_pool_raises_the_exception_of_the_first_rank_with_its_traceback(pool: Pools) -> None:
    before = pool(2).run(pid)
    with pytest.raises(Typed, match="planted") as caught:
        pool(2).run(fail_on_one)
    assert caught.value.rank == 1
    assert "in fail_on_one" in str(caught.value.__cause__)
    assert not set(pool(2).run(pid)) & set(before)  # new processes
    assert all(gone(p) for p in before)


def test_pool_ends_at_its_deadline_and_shows_stacks(pool: Pools) -> None:
    began = time.monotonic()
    with pytest.raises(ranks.DeadlineError, match=r"ranks \[1\] of 2(.|\n)*in hang_on_one"):
        pool(2).run(hang_on_one, deadline_s=1.0)
    assert time.monotonic() - began < 20


def test_fresh_says_what_became_of_each_rank() -> None:
    value, error, left = ranks.fresh(3, end_differently, process_group=False, env={"DPCOMM_TEST_OF_RANKS": "set"})
    assert value.value == ("value", "set", False)
    assert value.exitcode == error.exitcode == 0
    assert error.error is not None
    assert (error.error.name, error.error.message) == ("Typed", "planted")
    assert error.error.attributes["rank"] == 7
    assert "RuntimeError" in error.error.bases
    assert left.exitcode == 5
    assert left.error is None


def test_fresh_survives_a_kill_and_leaves_no_grandchildren() -> None:
    lives, dead = ranks.fresh(2, leave_a_child, process_group=False)
    assert dead.signal == signal.SIGKILL
    assert lives.exitcode == 0
    assert gone(lives.value)


def gone(number: int) -> bool:
    """Whether the process ends within 5 seconds: signals take effect at their own pace."""
    try:
        return wait_exit(os.pidfd_open(number))
    except ProcessLookupError:
        return True


def wait_exit(process: int) -> bool:
    try:
        return bool(wait([process], 5.0))
    finally:
        os.close(process)
