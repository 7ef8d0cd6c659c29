"""Hosts with several ranks each, in calls: ranks that die, stop, leave or are cut off. Typed errors on all, in time.

Numbers in the names count the faults that dpcomm promises to answer; those that are missing have a test elsewhere.
Of four ranks 0 and 1 are on one host, 2 and 3 on another; of three, 2 is alone.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from faulty import Caught, catch, check, check_all, check_poisoned
from networks import Hosts, across, network
from ranks import Placement, fresh
from test_faults_hosts import GRACE_S, LARGE, TWO_BY_TWO, two_level
from test_faults_mismatch import Ask, disagree
from test_faults_network import after, end_self, say_ready
from test_faults_peers import come_late, leave

import dpcomm

TIMEOUT_S = 1.5  # of calls that cannot end well; come_late has it, too


@pytest.fixture(scope="module")
def net() -> Iterator[Hosts]:
    with network(2) as made:
        yield made


# --- gone, stopped, cut off ------------------------------------------------------------------------------------------


def die_in_a_call(rank: int, nranks: int, folder: str, victim: int, codec: str) -> Caught:
    comm = two_level(codec=codec)
    x = torch.ones(LARGE)
    if rank == victim:
        threading.Timer(0.5, end_self, (folder, signal.SIGKILL)).start()
    caught = catch(lambda: [comm.allreduce(x, "mean") for _ in range(1_000_000)])
    check_poisoned(comm, "[PEER_LOST]", f"rank {victim} (pid ")
    return caught


@pytest.mark.parametrize(("victim", "codec"), [(1, "none"), (2, "fp16")], ids=["one-of-two", "alone-on-its-host"])
def test_24_a_rank_killed_in_a_call_over_two_levels_is_named_on_all(
    net: Hosts, tmp_path: Path, victim: int, codec: str
) -> None:
    outcomes = fresh(3, die_in_a_call, str(tmp_path), victim, codec, placement=Placement(net, (0, 0, 1)))
    dead = outcomes.pop(victim)
    assert dead.signal == signal.SIGKILL
    died = float(next(tmp_path.glob("ended*")).read_text())
    for outcome in outcomes:
        assert outcome.error is None, outcome.error.trace
        check(outcome.value, "PeerLostError", f"rank {victim} (pid {dead.pid}", "disappeared")
        assert outcome.value.failure.attributes["rank"] == victim
        assert 0 <= outcome.value.ended - died < GRACE_S


def stop(rank: int, nranks: int, folder: str, victim: int, in_call: bool) -> Caught:
    """The victim stops itself after a call, or somewhere in the middle of one; another sets it going again."""
    with two_level(timeout_s=TIMEOUT_S) as comm:
        pids = comm.describe()["pids"]
        x = torch.ones(LARGE)
        comm.allreduce(x.clone())
        dist.barrier()
        if rank == victim and in_call:
            threading.Timer(0.3, end_self, (folder, signal.SIGSTOP)).start()
        elif rank == victim:
            end_self(folder, signal.SIGSTOP)
        try:
            caught = catch(lambda: [comm.allreduce(x, "mean") for _ in range(1_000_000)])
        finally:
            if rank == (3 if victim == 0 else 0):
                os.kill(pids[victim], signal.SIGCONT)
        check_poisoned(comm, "[TIMEOUT]")
    return caught


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_25_a_rank_stopped_between_calls_over_two_levels_is_named_on_all(
    net: Hosts, tmp_path: Path, victim: int
) -> None:
    caught = across(net, *TWO_BY_TWO).run(stop, str(tmp_path), victim, False)
    if caught[victim].failure.name == "AbortedError":  # it came when all was over; or it hears of that in its call
        check(caught.pop(victim), "AbortedError", "[TIMEOUT]")
    for one in caught:
        check(one, "CommTimeoutError", f"rank {victim} (pid ", f"for {TIMEOUT_S:g} s", within_s=TIMEOUT_S + GRACE_S)
        assert one.failure.attributes["waiting_for"] == (victim,)


@pytest.mark.parametrize("victim", [0, 3])
def test_25_a_rank_stopped_in_a_call_over_two_levels_ends_it_on_all(net: Hosts, tmp_path: Path, victim: int) -> None:
    """Ranks wait for each other in chains, and the first whose time is up says for whom: all have its words."""
    caught = across(net, *TWO_BY_TWO).run(stop, str(tmp_path), victim, True)
    began = float(next(tmp_path.glob("ended*")).read_text())
    stopped = caught.pop(victim)
    assert stopped.failure.name in ("AbortedError", "CommTimeoutError"), stopped.failure.trace
    for one in caught:
        check(one, "CommTimeoutError", f"for {TIMEOUT_S:g} s")
        assert began < one.ended < began + TIMEOUT_S + GRACE_S
    (late,) = {one.failure.attributes["waiting_for"] for one in caught}
    assert late


def reduce_until_cut(rank: int, nranks: int, folder: str, codec: str) -> tuple[Caught, float]:
    """The error, and how long the way out took. Nothing here asks torch: its connections are cut, too."""
    comm = two_level(timeout_s=TIMEOUT_S, codec=codec)
    x = torch.ones(LARGE)
    say_ready(folder, rank)
    caught = catch(lambda: [comm.allreduce(x, "mean") for _ in range(1_000_000)])
    check_poisoned(comm, "[TIMEOUT]")
    began = time.monotonic()
    comm.close()
    return caught, time.monotonic() - began


@pytest.mark.parametrize("codec", ["none", "fp16"])
def test_26_a_link_cut_in_a_call_over_two_levels_is_a_timeout_on_all(net: Hosts, tmp_path: Path, codec: str) -> None:
    ready = [tmp_path / f"ready{rank}" for rank in range(4)]
    try:
        with after(ready, (1.0, lambda: net.link_down(1))) as cut:
            results = across(net, *TWO_BY_TWO).run(reduce_until_cut, str(tmp_path), codec, deadline_s=25.0)
    finally:
        net.link_up(1)
    for caught, closing in results:
        check(caught, "CommTimeoutError", f"for {TIMEOUT_S:g} s")
        assert caught.began < cut[0] < caught.ended < cut[0] + TIMEOUT_S + GRACE_S
        assert closing < GRACE_S


def test_22_a_rank_that_never_calls_over_two_levels_is_named(net: Hosts) -> None:
    results = across(net, *TWO_BY_TWO).run(come_late, False)
    pid, late = results.pop(1)
    for _, caught in results:
        check(caught, "CommTimeoutError", f"rank 1 (pid {pid}", "last seq 1")
        assert caught.failure.attributes["waiting_for"] == (1,)
    check(late, "AbortedError", "communicator aborted at seq 2", "[TIMEOUT]", within_s=GRACE_S)


def test_23_a_rank_that_closes_over_two_levels_is_named(net: Hosts) -> None:
    caught = across(net, *TWO_BY_TWO).run(leave, "close")
    assert caught.pop(1) is None
    for one in caught:
        check(one, "PeerLostError", "rank 1 closed its connection (clean shutdown) at seq 2", within_s=GRACE_S)


@pytest.mark.parametrize("odd", [0, 1, 3])
def test_18_the_odd_one_of_two_hosts_is_named(net: Hosts, odd: int) -> None:
    """`disagree` looks at the tensors: a refused call has not written to them."""
    asks = [Ask((12,)) if rank == odd else Ask((40_000,)) for rank in range(4)]
    caught = across(net, *TWO_BY_TWO).run(disagree, asks, odd == 0)
    check_all(caught, "MismatchError", f"rank {odd} has 12", "has 40000", within_s=GRACE_S)


# --- the process group -----------------------------------------------------------------------------------------------


def outlive_the_group(rank: int, nranks: int) -> None:
    """Calls after `destroy_process_group`; then two are closed, two left to the exit with calls under way."""
    every = ("two_level", "gloo") * 2
    comms = [dpcomm.Communicator(engine=engine, timeout_s=60.0) for engine in every]
    assert [comm.engine for comm in comms] == list(every)
    dist.destroy_process_group()
    for comm in comms:
        assert comm.allreduce(torch.ones(LARGE))[-1].item() == nranks
    for comm in comms[:2]:
        comm.close()
        comm.close()
    if rank == 0:
        globals()["_kept"] = comms, [comm.allreduce(torch.ones(LARGE), async_op=True) for comm in comms[2:]]


def test_50_70_on_several_hosts_the_group_may_go_first(net: Hosts, capfd: pytest.CaptureFixture[str]) -> None:
    for outcome in fresh(3, outlive_the_group, placement=Placement(net, (0, 0, 1))):
        assert outcome.error is None, outcome.error.trace
        assert outcome.exitcode == 0
    said = capfd.readouterr().err
    assert "Traceback" not in said
    assert "terminate" not in said


# --- two communicators -----------------------------------------------------------------------------------------------


CROSSWISE_S = 3.0  # also for constructions, of which each rank makes two


def use_crosswise(rank: int, nranks: int) -> tuple[Caught, list[str]]:
    """The next call of rank 0 is on one communicator, that of all others on the other one."""
    with two_level(timeout_s=CROSSWISE_S) as a, two_level(timeout_s=CROSSWISE_S) as b:
        names = [comm.describe()["name"] for comm in (a, b)]
        # Control: asynchronous calls in opposite order end well.
        works = [comm.allreduce(torch.ones(3), async_op=True) for comm in ((a, b) if rank == 0 else (b, a))]
        assert all(work.wait(10.0) for work in works)
        caught = catch((a if rank == 0 else b).allreduce, torch.ones(LARGE))
        dist.barrier()
        return caught, names


def test_two_communicators_over_two_levels_used_in_opposite_order_time_out(net: Hosts) -> None:
    """Whichever two ranks meet so, on one host or on two: both are named, as describe() has them."""
    caught, names = zip(*across(net, *TWO_BY_TWO).run(use_crosswise), strict=True)
    assert len(set(names[0])) == 2
    assert names == (names[0],) * 4
    check_all(caught, "CommTimeoutError", within_s=CROSSWISE_S + GRACE_S)
    for rank, one in enumerate(caught):
        mine, other = names[0] if rank == 0 else names[0][::-1]
        assert f"comm={mine} " in one.text
        assert f"it has begun call 2 of communicator {other}, which this rank has not made" in one.text
