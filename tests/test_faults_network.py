"""What breaks between hosts: links, hosts, ranks that stop, leave, disagree. Typed errors on all ranks, in time.

Workers of the other tests of faults are used again where they say nothing of one host. Numbers in the names count the
faults that dpcomm promises to answer.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import Case, digest, tensor
from faulty import Caught, catch, check, check_all, check_poisoned
from networks import Hosts, across, network
from ranks import Placement, fresh
from test_ddp_recover import fail_and_recover, go_on_poisoned
from test_faults_construction import construct_crosswise
from test_faults_mismatch import FAULTS, Ask, disagree, mismatch_then_again
from test_faults_peers import come_late, leave
from test_faults_process import end_with_work, interrupt_call, interrupt_construction, interrupt_wait, own_store, soon

import dpcomm

TIMEOUT_S = 1.5
GRACE_S = 1.0
SOON_S = 5.0  # constructions that fail: some tenths of a second, of processes that share two processors
LARGE = 2 << 20  # elements: 8 MiB


@pytest.fixture(scope="module")
def net() -> Iterator[Hosts]:
    with network(3) as made:
        yield made


def gloo(**options: Any) -> dpcomm.Communicator:
    comm = dpcomm.Communicator(**{"timeout_s": 20.0, "engine": "gloo", **options})
    assert comm.engine == "gloo"
    return comm


@contextmanager
def after(ready: Sequence[Path], *acts: tuple[float, Callable[[], None]]) -> Iterator[list[float]]:
    """Acts while the block runs, each some seconds after all these files are there; the list then holds when."""
    acted: list[float] = []
    over = threading.Event()

    def run() -> None:
        while not all(path.exists() for path in ready):
            if over.wait(0.02):
                return
        start = time.monotonic()
        for delay_s, act in acts:
            if over.wait(max(0.0, start + delay_s - time.monotonic())):
                return
            acted.append(time.monotonic())
            act()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield acted
    finally:
        over.set()
        thread.join(20.0)


def say_ready(folder: str, rank: int) -> None:
    Path(folder, f"ready{rank}").touch()


def stop_until_cut(folder: str, rank: int) -> None:
    """Says that this rank is ready, and returns when the file `cut` is there; in vain for 20 s, where it goes on."""
    say_ready(folder, rank)
    until = time.monotonic() + 20.0
    while not Path(folder, "cut").exists() and time.monotonic() < until:
        time.sleep(0.01)


# --- links -----------------------------------------------------------------------------------------------------------


def reduce_until_cut(rank: int, nranks: int, folder: str, elems: int, asynchronous: bool) -> tuple[Caught, float]:
    """The error, and how long the way out took. Nothing here asks torch: its connections are cut, too."""
    comm = gloo(timeout_s=TIMEOUT_S)
    x = torch.ones(elems)
    say_ready(folder, rank)

    def calls() -> None:
        while True:
            result = comm.allreduce(x, "mean", async_op=asynchronous)
            if asynchronous:
                result.wait()

    caught = catch(calls)
    check_poisoned(comm, "[TIMEOUT]")
    began = time.monotonic()
    comm.close()
    return caught, time.monotonic() - began


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize(
    ("places", "elems"),
    [((0, 1), LARGE), ((0, 1, 2), LARGE), ((0, 1, 2), 8 * LARGE)],
    ids=["2hosts", "3hosts", "3hosts-64MiB"],
)
def test_26_a_link_cut_in_a_call_is_a_timeout_on_all(
    net: Hosts, tmp_path: Path, places: tuple[int, ...], elems: int, asynchronous: bool
) -> None:
    """Host 1 is cut off: it waits for the others, they for it, and of three the other two for each other, too. Three
    let gloo add, which has more time for 64 MiB, but not for a message."""
    ready = [tmp_path / f"ready{rank}" for rank in range(len(places))]
    try:
        with after(ready, (1.0, lambda: net.link_down(1))) as cut:
            results = across(net, *places).run(reduce_until_cut, str(tmp_path), elems, asynchronous, deadline_s=15.0)
    finally:
        net.link_up(1)
    for rank, (caught, closing) in enumerate(results):
        check(caught, "CommTimeoutError", f"for {TIMEOUT_S:g} s")
        assert caught.began < cut[0] < caught.ended < cut[0] + TIMEOUT_S + 2.0
        assert closing < GRACE_S
        if len(places) == 2:
            assert caught.failure.attributes["waiting_for"] == (1 - rank,)


def reduce_slowly(rank: int, nranks: int) -> tuple[str, float, float]:
    with gloo(timeout_s=2.5) as comm:
        x = torch.full((8 * LARGE,), rank + 1.0)
        began = time.monotonic()
        comm.allreduce(x)
        return comm.describe()["bit_classes"][-1]["bit_class"], time.monotonic() - began, float(x[-1])


def test_26_a_slow_line_is_no_time_out(net: Hosts) -> None:
    """64 MiB at 0.2 Gb/s take longer than the time limit, which is for what stands still."""
    net.shape(0.2)
    try:
        results = across(net, 0, 1, 2).run(reduce_slowly, deadline_s=40.0)
    finally:
        net.shape(None)
    for bit_class, took, total in results:
        assert bit_class == "native"
        assert took > 3.0  # control: more than the limit
        assert total == 6.0


def reduce_once(rank: int, nranks: int) -> str:
    with gloo() as comm:
        comm.allreduce(torch.ones(1000))
        return comm.engine


def reduce_for(rank: int, nranks: int, folder: str, seconds: float) -> tuple[bool, float]:
    """Whether every result was right, and the longest pair of calls."""
    longest, right = 0.0, True
    with gloo(timeout_s=10.0) as comm:
        say_ready(folder, rank)
        end = time.monotonic() + seconds
        x = torch.ones(100_000)
        more = torch.ones(1)
        while more.item():
            began = time.monotonic()
            right = right and bool((comm.allreduce(x.fill_(rank + 1.0)) == 3.0).all())
            more[0] = float(time.monotonic() < end)
            comm.allreduce(more, "min")
            longest = max(longest, time.monotonic() - began)
    return right, longest


def test_26_a_short_cut_only_delays(net: Hosts, tmp_path: Path) -> None:
    ready = [tmp_path / f"ready{rank}" for rank in range(2)]
    try:
        with after(ready, (0.2, lambda: net.link_down(1)), (1.2, lambda: net.link_up(1))):
            results = across(net, 0, 1).run(reduce_for, str(tmp_path), 2.0, deadline_s=20.0)
    finally:
        net.link_up(1)
    assert [right for right, _ in results] == [True, True]
    assert min(longest for _, longest in results) > 0.3  # control: it was cut


# --- hosts and ranks that are gone or stopped ------------------------------------------------------------------------


def die_on_host(rank: int, nranks: int, folder: str, dying: list[int], number: int) -> tuple[Caught, dict[str, Any]]:
    comm = gloo()
    about = comm.describe()
    x = torch.ones(LARGE)
    if rank in dying:
        threading.Timer(0.5, end_self, (folder, number)).start()
    caught = catch(lambda: [comm.allreduce(x, "mean") for _ in range(1_000_000)])
    check_poisoned(comm, "[PEER_LOST]")
    return caught, about


def end_self(folder: str, number: int) -> None:
    Path(folder, f"ended{os.getpid()}").write_text(str(time.monotonic()))
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("places", "dying", "number"),
    [((0, 0, 1, 1), [2, 3], signal.SIGKILL), ((0, 1, 2), [1], signal.SIGTERM)],
    ids=["26-a-host-with-two-ranks-is-killed", "32-one-rank-is-terminated"],
)
def test_ranks_that_end_are_named_on_the_other_hosts(
    net: Hosts, tmp_path: Path, places: tuple[int, ...], dying: list[int], number: signal.Signals
) -> None:
    outcomes = fresh(len(places), die_on_host, str(tmp_path), dying, int(number), placement=Placement(net, places))
    assert [o.signal for o in outcomes] == [number if o.rank in dying else None for o in outcomes]
    pids = {outcomes[rank].pid: rank for rank in dying}
    ended = {pids[int(path.name.removeprefix("ended"))]: float(path.read_text()) for path in tmp_path.glob("ended*")}
    for outcome in outcomes:
        if outcome.rank in dying:
            continue
        assert outcome.error is None, outcome.error.trace
        caught, about = outcome.value
        check(caught, "PeerLostError", "disappeared")
        lost = caught.failure.attributes["rank"]
        assert lost in dying
        assert f"rank {lost} (pid {outcomes[lost].pid})" in caught.text
        assert {about["pids"][rank] for rank in dying} == set(pids)
        assert ended[lost] <= caught.ended < max(ended.values()) + 1.5


def stop_a_while(rank: int, nranks: int, folder: str) -> Caught:
    """Rank 1 stops in the middle of its calls; rank 0 sets it going again once it has its error."""
    with gloo(timeout_s=TIMEOUT_S) as comm:
        x = torch.ones(LARGE)
        pids = comm.describe()["pids"]
        if rank == 1:
            threading.Timer(0.3, end_self, (folder, signal.SIGSTOP)).start()
        try:
            caught = catch(lambda: [comm.allreduce(x, "mean") for _ in range(100_000)])
        finally:
            if rank == 0:
                os.kill(pids[1], signal.SIGCONT)
        check_poisoned(comm, "[TIMEOUT]")
    return caught


def test_25_a_rank_stopped_on_another_host_is_named(net: Hosts, tmp_path: Path) -> None:
    waited, stopped = across(net, 0, 1).run(stop_a_while, str(tmp_path))
    began = float(next(tmp_path.glob("ended*")).read_text())
    check(waited, "CommTimeoutError", "waiting for rank 1")
    assert waited.failure.attributes["waiting_for"] == (1,)
    assert waited.ended < began + TIMEOUT_S + 2.0
    assert stopped.failure.name in ("AbortedError", "CommTimeoutError")  # its own deadline has passed while it slept
    assert stopped.ended - waited.ended < GRACE_S


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_22_a_rank_of_another_host_that_never_calls_is_named(net: Hosts, asynchronous: bool) -> None:
    results = across(net, 0, 1).run(come_late, asynchronous)
    (pid, late), (_, waited) = results[1], results[0]
    check(waited, "CommTimeoutError", f"rank 1 (pid {pid}", "last seq 1", f"for {TIMEOUT_S:g} s")
    assert waited.failure.attributes["waiting_for"] == (1,)
    assert TIMEOUT_S - 0.2 < waited.seconds < TIMEOUT_S + 2.0
    check(late, "AbortedError", "communicator aborted at seq 2", "[TIMEOUT]", within_s=GRACE_S)


def test_23_a_rank_of_another_host_that_closes_is_named(net: Hosts) -> None:
    first, second = across(net, 0, 1).run(leave, "close")
    assert second is None
    check(first, "PeerLostError", "rank 1 closed its connection (clean shutdown) at seq 2", within_s=GRACE_S)
    assert first.failure.attributes["rank"] == 1


# --- ranks that disagree ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", FAULTS)
def test_disagreement_between_hosts_is_named_on_all(net: Hosts, fault: str) -> None:
    """`disagree` looks at the tensors: a refused call has not written to them."""
    first, second, text = FAULTS[fault]
    caught = across(net, 0, 1).run(disagree, [first, second], False)
    check_all(caught, "MismatchError", text, "seq 4)", within_s=GRACE_S)


def test_18_the_odd_one_of_three_hosts_is_named(net: Hosts) -> None:
    asks = [Ask((40_000,)), Ask((40_000,)), Ask((12,))]
    caught = across(net, 0, 1, 2).run(disagree, asks, True)
    check_all(caught, "MismatchError", "rank 2 has 12", "has 40000", within_s=GRACE_S)


def test_a_new_communicator_between_hosts_works_after_a_mismatch(net: Hosts) -> None:
    assert across(net, 0, 1).run(mismatch_then_again) == [3.0] * 2


# --- constructions that cannot succeed -------------------------------------------------------------------------------


def construct(rank: int, nranks: int, odd: dict[str, Any], env: dict[str, str]) -> tuple[Caught, str]:
    """Rank 1 has other options, or another environment; afterwards all make one that works."""
    before = dict(os.environ)
    if rank == 1:
        os.environ.update(env)
    try:
        caught = catch(dpcomm.Communicator, **{"timeout_s": 20.0, **(odd if rank == 1 else {})})
    finally:
        os.environ.clear()
        os.environ.update(before)
    return caught, reduce_once(rank, nranks)


@pytest.mark.parametrize(
    ("odd", "env", "name", "texts"),
    [
        ({"codec": "fp16"}, {}, "MismatchError", ["codec: rank 0 has 'none', rank 1 has 'fp16'"]),
        ({"engine": "gloo"}, {}, "MismatchError", ["engine: rank 0 has 'auto', rank 1 has 'gloo'"]),
        ({"engine": "shm"}, {}, "MismatchError", ["engine: rank 0 has 'auto', rank 1 has 'shm'"]),
        ({"timeout_s": -1.0}, {}, "ArgumentError", ["timeout_s=-1.0"]),
        ({}, {"GLOO_SOCKET_IFNAME": "nosuch0"}, "ArgumentError", ["rank 1", "GLOO_SOCKET_IFNAME='nosuch0'", "eth0"]),
    ],
    ids=["codec", "gloo-and-auto", "shm-and-auto", "time-out", "no-such-interface"],
)
def test_an_odd_option_between_hosts_fails_on_all(
    net: Hosts, odd: dict[str, Any], env: dict[str, str], name: str, texts: list[str]
) -> None:
    results = across(net, 0, 1, 2).run(construct, odd, env)
    check_all([caught for caught, _ in results], name, *texts, within_s=SOON_S)
    assert [engine for _, engine in results] == ["gloo"] * 3


def test_an_interface_that_the_others_do_not_reach_fails_on_all(net: Hosts) -> None:
    results = across(net, 0, 1, 2).run(construct, {}, {"GLOO_SOCKET_IFNAME": "lo"})
    caught = [caught for caught, _ in results]
    assert len({(c.failure.name, c.text.partition(": ")[0]) for c in caught}) == 1, [c.text for c in caught]
    for one in caught:
        assert one.failure.name in ("UnsupportedError", "SystemResourceError", "PeerLostError"), one.failure.trace
        assert "GLOO_SOCKET_IFNAME" in one.text
        assert "127.0.0.1" in one.text
    assert [engine for _, engine in results] == ["gloo"] * 3


def stay_away(rank: int, nranks: int) -> Caught | None:
    store = own_store(f"away-{os.getppid()}")
    return catch(gloo, rank=rank, nranks=nranks, store=store, timeout_s=1.0) if rank != 1 else None


def test_49_a_host_that_never_comes(net: Hosts) -> None:
    """Before ranks have met nobody knows of hosts: the error is that of one host."""
    first, absent, last = across(net, 0, 1, 2).run(stay_away)
    assert absent is None
    check_all([first, last], "CommTimeoutError", "ranks [1] did not reach stage 'hello' in 1 s", within_s=1 + GRACE_S)


def construct_while_cut(rank: int, nranks: int, folder: str) -> Caught:
    stop_until_cut(folder, rank)
    return catch(gloo, rank=rank, nranks=nranks, store=own_store(f"cut-{os.getppid()}"), timeout_s=1.0)


def test_49_a_host_that_is_cut_off_before_it_comes(net: Hosts, tmp_path: Path) -> None:
    """It says so when its time is up, though the store's client waits until the link is back; see test_hosts.py."""
    ready = [tmp_path / f"ready{rank}" for rank in range(3)]
    try:
        acts = ((0.0, lambda: net.link_down(1)), (0.0, (tmp_path / "cut").touch), (6.0, lambda: net.link_up(1)))
        with after(ready, *acts) as acted:
            first, cut, last = across(net, 0, 1, 2).run(construct_while_cut, str(tmp_path), deadline_s=25.0)
    finally:
        net.link_up(1)
    words = "ranks [1] did not reach stage 'hello' in 1 s"
    check_all([first, last], "CommTimeoutError", words, within_s=1 + GRACE_S)
    check(cut, "CommTimeoutError", "rank 1 on ", "the torch store did not answer within the 1 s", within_s=1 + GRACE_S)
    assert len(acted) == 2, "the link was back before all had ended"


def test_51_communicators_between_hosts_made_in_another_order(net: Hosts) -> None:
    results = across(net, 0, 1).run(construct_crosswise)
    for i in range(2):
        caught = [result[i] for result in results]
        check_all(caught, "MismatchError", "communicator #", "same order", within_s=SOON_S)
    assert [result[2] for result in results] == [2.0] * 2


# --- processes -------------------------------------------------------------------------------------------------------


def test_30_ctrl_c_ends_a_call_between_hosts_and_poisons(net: Hosts) -> None:
    _, peer = soon(lambda _: across(net, 0, 1).run(interrupt_call))
    check(peer, "AbortedError", "rank 0 gave up at seq 1: interrupted", within_s=GRACE_S)


def test_30_ctrl_c_ends_a_wait_between_hosts_but_not_the_call(net: Hosts) -> None:
    soon(lambda _: across(net, 0, 1).run(interrupt_wait))


def test_30_ctrl_c_ends_a_construction_between_hosts(net: Hosts) -> None:
    _, peer = soon(lambda attempt: across(net, 0, 1).run(interrupt_construction, attempt))
    check(peer, "AbortedError", "KeyboardInterrupt", within_s=GRACE_S)


def test_50_70_between_hosts_the_group_may_go_first(net: Hosts, capfd: pytest.CaptureFixture[str]) -> None:
    """A call after `destroy_process_group`, then an exit with another one pending."""
    for outcome in fresh(2, end_with_work, placement=Placement(net, (0, 1))):
        assert outcome.error is None, outcome.error.trace
        assert outcome.exitcode == 0
    said = capfd.readouterr().err
    assert "Traceback" not in said
    assert "terminate" not in said


# --- steps that fail -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["plain", "find-unused"])
@pytest.mark.parametrize("fault", ["mismatch", "time-out"])
def test_27_between_hosts_the_steps_after_recover_are_undisturbed(net: Hosts, fault: str, variant: str) -> None:
    """`fail_and_recover` compares each later step with the reference."""
    (first, kind, ends), (second, _, also) = across(net, 0, 1).run(fail_and_recover, variant, fault, 3, deadline_s=20.0)
    word, name = ("MISMATCH", "MismatchError") if fault == "mismatch" else ("TIMEOUT", "CommTimeoutError")
    assert f"[dpcomm:{word}] " in first.text
    assert kind == name
    assert "[dpcomm:" in second.text
    assert ends == also


def test_28_between_hosts_later_steps_name_the_first_cause(net: Hosts) -> None:
    for (failed, *after), kind in across(net, 0, 1).run(go_on_poisoned):
        assert "[dpcomm:MISMATCH] " in failed.text
        assert kind == "MismatchError"
        assert all("[dpcomm:ABORTED] " in caught.text for caught in after)


def share_group(rank: int, nranks: int, case: Case) -> list[str]:
    """A communicator that fails leaves torch's group as it was, and the next one is as good as new."""
    broken = gloo(timeout_s=5.0)
    check(catch(broken.allreduce, torch.ones(4 + rank)), "MismatchError", "numel")
    x = torch.tensor([float(rank)])
    dist.all_reduce(x)
    assert x.item() == sum(range(nranks))
    with gloo() as comm:
        (y,) = (tensor(v) for v in case.inputs(rank))
        comm.allreduce(y, case.op, **case.options)
    return [digest([y])]


def test_a_failure_leaves_the_users_group_alone(net: Hosts) -> None:
    case = Case((100_003,), codec="fp16", op="mean", special=True)
    assert across(net, 0, 1, 2).run(share_group, case) == [[digest(case.expected(3))]] * 3
