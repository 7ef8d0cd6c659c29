"""Ranks on several hosts (network namespaces with links of their own): which engine, which bits, and how long.

The first part is about the hosts themselves: a test that believes in a slow or broken link needs one that is.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import cases
import pytest
import torch
import torch.distributed as dist
from cases import Case, digest
from faulty import Caught, catch, check, check_all
from heard import heard
from networks import NAMES, Hosts, across, network
from ranks import Pool
from test_allreduce_processes import run_async, run_cases
from test_ddp import train, train_beside_stock
from test_faults_network import after, stop_until_cut

import dpcomm
from dpcomm import carriers
from dpcomm.rendezvous import STAGES, Rendezvous

Pools = Callable[[int], Pool]
MIB = 1 << 20
LIMIT_S = 10.0


@pytest.fixture(scope="module")
def net() -> Iterator[Hosts]:
    with network(3) as made:
        yield made


@pytest.fixture
def shaped(net: Hosts) -> Iterator[Hosts]:
    net.shape(1)
    yield net
    net.shape(None)


# --- the hosts -------------------------------------------------------------------------------------------------------


def connect(net: Hosts, there: int | None, here: int) -> tuple[socket.socket, socket.socket]:
    """Two ends of a connection that host `here` has made to host `there`, or to the switch."""
    address = net.store_host if there is None else net.address(there)
    listener = net.inside(lambda: socket.create_server((address, 0)), there)
    with listener:
        end = net.inside(lambda: socket.create_connection(listener.getsockname(), LIMIT_S), here)
        other, caller = listener.accept()
    assert caller[0] == net.address(here)
    other.settimeout(LIMIT_S)
    return end, other


def receive(end: socket.socket, count: int) -> None:
    while count > 0:
        count -= len(end.recv(min(count, MIB)))


def seconds_both_ways(net: Hosts, count: int) -> float:
    """How long two hosts take to send each other this many bytes at the same time."""
    ends = connect(net, 1, 0)
    with ends[0], ends[1], ThreadPoolExecutor(4) as threads:
        began = time.monotonic()
        done = [threads.submit(end.sendall, bytes(count)) for end in ends]
        done += [threads.submit(receive, end, count) for end in ends]
        for one in done:
            one.result(3 * LIMIT_S)
        return time.monotonic() - began


def least_both_ways(net: Hosts, count: int, below: float) -> float:
    """The least of some measurements, no more once it is below: the machine may be busy for a while."""
    least = float("inf")
    for _ in range(30):
        least = min(least, seconds_both_ways(net, count))
        if least < below:
            break
    return least


def test_a_shaped_link_carries_its_rate_each_way(shaped: Hosts) -> None:
    """10 MiB and 5 % of headers at 1 Gb/s, less what the buckets at both ends hold at first."""
    line = 8 * 10 * MIB / 1e9
    assert 0.9 * line < least_both_ways(shaped, 10 * MIB, 1.6 * line) < 1.6 * line
    shaped.shape(None)
    assert least_both_ways(shaped, 10 * MIB, 0.6 * line) < 0.6 * line  # control: nothing else limits it


def test_a_cut_link_carries_nothing_until_it_is_mended(net: Hosts) -> None:
    end, other = connect(net, 1, 0)
    with end, other:
        end.sendall(b"before")
        assert other.recv(100) == b"before"
        other.settimeout(0.3)
        net.link_down(1)
        try:
            end.sendall(b"after")  # to a queue
            with pytest.raises(TimeoutError):
                other.recv(100)
        finally:
            net.link_up(1)
        other.settimeout(LIMIT_S)
        assert other.recv(100) == b"after"


def test_hosts_see_each_other_and_nothing_else(net: Hosts) -> None:
    def interfaces() -> list[str]:
        return sorted(name for _, name in socket.if_nameindex())

    assert [net.inside(interfaces, host) for host in range(3)] == [["eth0", "lo"]] * 3
    outside = socket.create_server(("127.0.0.1", 0))
    with outside, pytest.raises(ConnectionRefusedError):
        net.inside(lambda: socket.create_connection(outside.getsockname(), LIMIT_S), 0)


KILLED = "import os, signal, hosts\nwith hosts.hosts(2):\n    os.kill(os.getpid(), signal.SIGKILL)"


def test_hosts_of_a_killed_process_are_removed_by_the_next(net: Hosts) -> None:
    child = subprocess.Popen([sys.executable, "-c", KILLED], env={**os.environ, "PYTHONPATH": ":".join(sys.path)})
    assert child.wait(LIMIT_S) == -signal.SIGKILL

    def left(pid: int) -> set[str]:
        return {path.name for path in NAMES.glob(f"dp{pid}n*")}

    assert len(left(child.pid)) == 3  # control
    before = left(os.getpid())
    with network(1):
        assert left(os.getpid()) > before
    assert left(os.getpid()) == before  # those of the living stay
    assert not left(child.pid)


# --- which engine ----------------------------------------------------------------------------------------------------


def describe(rank: int, nranks: int) -> tuple[dict[str, Any], list[str]]:
    """What a communicator says of itself, and what it logs while it is made."""
    with heard(logging.INFO) as said, dpcomm.Communicator(timeout_s=20.0) as comm:
        return comm.describe(), said


def test_between_hosts_auto_takes_gloo_and_says_why(net: Hosts) -> None:
    results = across(net, 0, 1).run(describe)
    for about, _ in results:
        assert about["engine"] == "gloo"
        for words in ("no shared memory", "ranks [0] on ", "ranks [1] on "):
            assert words in about["why"]
    (line,) = [line for _, said in results for line in said]  # one rank speaks for all
    assert re.match(r"communicator #\d+ of 2 ranks: engine gloo between 2 hosts \(.*: rank 0; .*: rank 1\): ", line)
    assert "no shared memory between rank 0 on " in line
    assert line.endswith(
        "; shm and p2p need one host, two_level ranks that share one, nccl GPUs, torch is only where asked for"
    )


def test_on_one_host_auto_takes_shm(pool: Pools) -> None:
    results = pool(2).run(describe)
    assert [about["engine"] for about, _ in results] == ["shm"] * 2
    (line,) = [line for _, said in results for line in said]
    assert re.match(
        r"communicator #\d+ of 2 ranks: engine shm on [^;]+: all ranks share one host and [^;]+; gloo", line
    )


def ask_for_shm(rank: int, nranks: int) -> Caught:
    return catch(dpcomm.Communicator, engine="shm", timeout_s=10.0)


def test_35_shm_between_hosts_is_refused_on_all(net: Hosts) -> None:
    caught = across(net, 0, 1).run(ask_for_shm)
    where = ("engine shm", "ranks [0] on ", "ranks [1] on ", "network namespace", "'gloo'")
    check_all(caught, "UnsupportedError", *where, within_s=5.0)


# --- which bits ------------------------------------------------------------------------------------------------------

SOME = [
    Case((size,), codec=codec, op="mean", algorithm=algorithm, special=True)
    for codec in ("none", "fp16")
    for algorithm in cases.ALGORITHMS
    for size in (0, 1, 257, 100_003, MIB + 3)
] + [Case((300, 0, 7, 1021), codec=codec, special=True) for codec in ("none", "fp16")]


@pytest.mark.parametrize("places", [(0, 1), (0, 1, 2)], ids=lambda p: "on-hosts-" + "".join(map(str, p)))
def test_bits_between_hosts_equal_the_reference(net: Hosts, places: tuple[int, ...]) -> None:
    results = across(net, *places).run(run_cases, SOME)
    for i, case in enumerate(SOME):
        found = {per_rank[i] for per_rank in results}
        assert len(found) == 1, case
        assert case.added_by_gloo(len(places)) or found == {digest(case.expected(len(places)))}, case


def test_a_flipped_bit_between_hosts_shows_in_the_hashes(net: Hosts) -> None:
    good, bad = across(net, 0, 1).run(run_cases, [Case((1000,))], True)
    assert [good] == [[digest(Case((1000,)).expected(2))]]
    assert good != bad


def test_async_calls_between_hosts_keep_their_order(net: Hosts) -> None:
    todo = [Case((n,), codec=c, seed=n) for n in (5, 300_001, 1) for c in ("none", "fp16")]
    for result in across(net, 0, 1).run(run_async, todo):
        assert result == [digest(case.expected(2)) for case in todo]


@pytest.mark.parametrize("codec", ["none", "fp16"])
def test_training_between_hosts_has_the_references_gradients(net: Hosts, codec: str) -> None:
    """Which are those of one process that knows all ranks' inputs."""
    first, second = across(net, 0, 1).run(train, "small-buckets", codec, 4)
    assert first == second


def test_training_between_hosts_has_the_bits_of_stock_ddp(net: Hosts) -> None:
    for stock, ours in across(net, 0, 1).run(train_beside_stock):
        assert ours == stock


# --- a host that is cut off while a communicator is made -------------------------------------------------------------

BUILD_S = 3.0
STAGES_BETWEEN_HOSTS = (
    "hello",
    "validate",
    *(f"{stage}-network" for stage in ("allocate", "probe", "bind", "share", "verify")),
)


def await_link(net: Hosts, here: int) -> None:
    """A link that was cut is back at once, but addresses that could not be asked for are unreachable a while."""
    until = time.monotonic() + LIMIT_S
    for there, caller in ((0, here), (None, here), (here, 0)):
        while True:
            try:
                ends = connect(net, there, caller)
                break
            except OSError:
                assert time.monotonic() < until, "the link does not come back"
                time.sleep(0.1)
        for end in ends:
            end.close()


def construct_and_be_cut(rank: int, nranks: int, folder: str, moment: str) -> Caught:
    """Rank 1 stops at a moment of the construction until its link is cut."""
    default = dist.distributed_c10d._get_default_store()
    while isinstance(default, dist.PrefixStore):  # type: ignore[attr-defined]
        default = default.underlying_store
    own = dist.TCPStore(default.host, default.port, is_master=False)  # type: ignore[attr-defined]

    def stop() -> None:
        if rank == 1:
            stop_until_cut(folder, rank)

    publish, groups, connect = Rendezvous._publish, carriers.gloo_groups, carriers.GlooCarrier.connect

    def stop_and_publish(self: Rendezvous, index: int, record: Any) -> None:
        if STAGES[index] == moment:
            stop()
        publish(self, index, record)

    def stop_and_connect(*args: Any) -> Any:
        if moment == "connect":
            stop()
        return groups(*args)

    def connect_and_stop(self: carriers.GlooCarrier, group: Any) -> None:
        connect(self, group)
        if moment == "first-call":
            stop()

    with (
        mock.patch.object(Rendezvous, "_publish", stop_and_publish),
        mock.patch.object(carriers, "gloo_groups", stop_and_connect),
        mock.patch.object(carriers.GlooCarrier, "connect", connect_and_stop),
    ):
        store = dist.PrefixStore(folder, own)  # type: ignore[attr-defined]
        return catch(dpcomm.Communicator, rank=rank, nranks=nranks, store=store, engine="gloo", timeout_s=BUILD_S)


@pytest.mark.parametrize("moment", [*STAGES_BETWEEN_HOSTS, "connect", "first-call"])
def test_26_a_construction_ends_in_time_on_a_host_that_is_cut_off(net: Hosts, tmp_path: Path, moment: str) -> None:
    """The store's client would wait until the link is back, 7 s later."""
    ready = [tmp_path / "ready1"]
    acts = ((0.0, lambda: net.link_down(1)), (0.0, (tmp_path / "cut").touch), (7.0, lambda: net.link_up(1)))
    try:
        with after(ready, *acts) as acted:
            caught = across(net, 0, 1).run(construct_and_be_cut, str(tmp_path), moment, deadline_s=25.0)
    finally:
        net.link_up(1)
        await_link(net, 1)
    assert len(acted) == 2, [one.text for one in caught]  # the link was not back before all had ended
    for one in caught:
        check(one, "CommTimeoutError", within_s=BUILD_S + 3.0)
    assert "rank 1 on " in caught[1].text
    assert acted[0] < caught[1].ended


# --- how long --------------------------------------------------------------------------------------------------------


def measure(rank: int, nranks: int, codecs: list[str]) -> tuple[str, list[float]]:
    """The engine, and the least seconds of an 8 MiB call with each codec."""
    x = torch.ones(2 * MIB)
    with dpcomm.Communicator(timeout_s=20.0) as comm:
        best = [float("inf")] * len(codecs)
        for _ in range(12):
            for i, codec in enumerate(codecs):
                dist.barrier()
                began = time.monotonic()
                comm.allreduce(x, "mean", codec=codec, algorithm="direct")
                best[i] = min(best[i], time.monotonic() - began)
        return comm.engine, best


def test_at_a_gigabit_fp16_takes_two_thirds_of_the_time_at_most(shaped: Hosts) -> None:
    """Each of two ranks sends half its values and half the results: 8 MiB of float32, 67 ms of the line, or half."""
    line = 8 * 8 * MIB / 1e9
    (engine, (plain, half)), _ = across(shaped, 0, 1).run(measure, ["none", "fp16"])
    assert engine == "gloo"
    assert plain > 0.9 * line  # control: the line is that slow
    assert plain > 1.5 * half, f"none {plain * 1e3:.1f} ms, fp16 {half * 1e3:.1f} ms"
    assert plain < 2 * line
    shaped.shape(None)
    _, ((fast,), _) = zip(*across(shaped, 0, 1).run(measure, ["none"]), strict=True)
    assert fast < 0.6 * line  # control: and nothing but the line was
