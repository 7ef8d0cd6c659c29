"""Constructions on hosts with several ranks each that cannot succeed, or not as usual: all ranks fare alike, in time.

Numbers in the names count the faults that dpcomm promises to answer; those that are missing have a test elsewhere.
Ranks 0 and 1 are on one host, 2 and 3 on another. What happens in calls: test_faults_hosts_calls.py.
"""

from __future__ import annotations

import errno
import random
import resource
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from faulty import catch, check_all
from heard import heard
from networks import Hosts, across, network
from test_faults_construction import limit

import dpcomm
from dpcomm import _native, carriers, reach
from dpcomm.bootstrap import SECRET_BYTES
from dpcomm.network import ENDPOINT, Meeting
from dpcomm.records import Outcome
from dpcomm.rendezvous import STAGES, Rendezvous

TWO_BY_TWO = (0, 0, 1, 1)
GRACE_S = 5.0  # for what takes 0.1 to 0.3 s where nothing else runs
PATIENCE_S = 30.0  # of constructions: none below takes that long
MIB = 1 << 20
LARGE = 2 * MIB  # elements: 8 MiB
NAME_BYTES = 32  # of an abstract socket


@pytest.fixture(scope="module")
def net() -> Iterator[Hosts]:
    with network(2) as made:
        yield made


def two_level(**options: Any) -> dpcomm.Communicator:
    comm = dpcomm.Communicator(**{"timeout_s": 20.0, **options})
    assert comm.engine == "two_level"
    return comm


@contextmanager
def at_stage(stage: str, act: Callable[[Any], Any]) -> Iterator[None]:
    """This rank acts when it has done a stage, before the others learn that; it publishes what `act` returns."""
    publish = Rendezvous._publish

    def act_and_publish(self: Rendezvous, index: int, record: Any) -> None:
        publish(self, index, act(record) if STAGES[index] == stage else record)

    with mock.patch.object(Rendezvous, "_publish", act_and_publish):
        yield


def sum_of_ones(engine: str) -> tuple[str, float]:
    with dpcomm.Communicator(engine=engine, timeout_s=20.0) as comm:
        return comm.engine, float(comm.allreduce(torch.ones(1000))[-1])


# --- constructions that cannot succeed -------------------------------------------------------------------------------


def construct(rank: int, nranks: int, odd: int, options: dict[str, Any], env: dict[str, str]) -> list[Any]:
    """One rank has other options, or another environment; afterwards all make one that works."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in env.items() if rank == odd else ():
            patch.setenv(name, value)
        wanted = {"timeout_s": PATIENCE_S, "engine": "two_level", **(options if rank == odd else {})}
        caught = catch(dpcomm.Communicator, **wanted)
    return [caught, sum_of_ones("auto")]


def check_joint(results: list[Any], name: str, *words: str, within_s: float = GRACE_S) -> None:
    """The same error on all ranks, and a communicator afterwards."""
    check_all([caught for caught, _ in results], name, *words, within_s=within_s)
    assert [again for _, again in results] == [("two_level", 4.0)] * 4


@pytest.mark.parametrize(
    ("odd", "options", "env", "name", "words"),
    [
        (1, {"intra_codec": "fp16"}, {}, "MismatchError", ["intra_codec: rank 0 has 'none', rank 1 has 'fp16'"]),
        (3, {"engine": "auto"}, {}, "MismatchError", ["engine: rank 0 has 'two_level', rank 3 has 'auto'"]),
        (3, {"engine": "gloo"}, {}, "MismatchError", ["engine: rank 0 has 'two_level', rank 3 has 'gloo'"]),
        (2, {"intra_codec": "zip"}, {}, "ArgumentError", ["rank 2, stage 'validate'", "unknown intra_codec 'zip'"]),
        # Rank 1 still reaches rank 0; rank 2 does not reach rank 1.
        (1, {}, {"GLOO_SOCKET_IFNAME": "lo"}, "PeerLostError", ["rank 2 on ", "to rank 1 on ", " at 127.0.0.1"]),
        (1, {}, {"GLOO_SOCKET_IFNAME": "nosuch0"}, "ArgumentError", ["rank 1", "GLOO_SOCKET_IFNAME='nosuch0'"]),
    ],
    ids=["intra-codec", "auto", "gloo", "unknown-intra-codec", "39-interface-of-one-host", "39-no-such-interface"],
)
def test_what_one_rank_has_otherwise_fails_on_all(
    net: Hosts, odd: int, options: dict[str, Any], env: dict[str, str], name: str, words: list[str]
) -> None:
    check_joint(across(net, *TWO_BY_TWO).run(construct, odd, options, env), name, *words)


def ask_for(rank: int, nranks: int, engine: str) -> list[Any]:
    return [catch(dpcomm.Communicator, engine=engine, timeout_s=PATIENCE_S), sum_of_ones("auto")]


def test_35_shm_on_hosts_with_several_ranks_names_who_is_where(net: Hosts) -> None:
    results = across(net, *TWO_BY_TWO).run(ask_for, "shm")
    check_joint(results, "UnsupportedError", "engine shm", "ranks [0, 1] on ", "ranks [2, 3] on ", "network namespace")


class Counted(_native.ShmBuilder):
    """Counts those that are made: each has memory to share."""

    made = 0

    def __init__(self, *args: Any) -> None:
        Counted.made += 1
        super().__init__(*args)


def construct_another_version(rank: int, nranks: int, what: str, value: object) -> list[Any]:
    Counted.made = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_native, "ShmBuilder", Counted)
        if rank == 3:
            patch.setattr(_native, what, value)
        caught = catch(dpcomm.Communicator, timeout_s=PATIENCE_S)
        before = Counted.made
    return [caught, sum_of_ones("auto"), before]


@pytest.mark.parametrize(("what", "value", "word"), [("version", "9.9.9", "dpcomm 9.9.9"), ("LAYOUT", 77, "layout 77")])
def test_42_another_dpcomm_on_another_host_is_named_before_memory_is_shared(
    net: Hosts, what: str, value: object, word: str
) -> None:
    *others, odd = across(net, *TWO_BY_TWO).run(construct_another_version, what, value)
    caught = [result[0] for result in (*others, odd)]
    check_all(caught, "VersionError", word, "Install one version everywhere", within_s=GRACE_S)
    assert {one.text.partition(" runs ")[0] for one in caught[:3]} == {"[dpcomm:VERSION] rank 3"}
    assert [result[1:] for result in (*others, odd)] == [[("two_level", 4.0), 0]] * 4


def test_memory_to_share_is_counted() -> None:
    """Control of the test above."""
    Counted.made = 0
    Counted(0, 2, _native.ShmWish(8 * MIB, 1, fewer_channels=True, crowded=True), "")
    assert Counted.made == 1


# --- one rank that fails alone ---------------------------------------------------------------------------------------


def construct_blind(rank: int, nranks: int, blind: list[int], engine: str) -> Any:
    """Some ranks reach nobody on their host: they can pass it no descriptor."""
    probe = _native.ShmBuilder.probe

    def reach_nobody(self: Any, endpoints: list[bytes]) -> list[bool]:
        reached = probe(self, endpoints)
        return [peer >= rank for peer in range(nranks)] if len(endpoints) == nranks else reached

    with pytest.MonkeyPatch.context() as patch:
        if rank in blind:
            patch.setattr(_native.ShmBuilder, "probe", reach_nobody)
        try:
            comm = dpcomm.Communicator(engine=engine, timeout_s=PATIENCE_S)
        except dpcomm.UnsupportedError as error:
            return str(error)
    with comm:
        return comm.engine, comm.describe().get("hosts"), float(comm.allreduce(torch.ones(1000))[-1])


@pytest.mark.parametrize(
    ("blind", "engine", "hosts"),
    [([1], "auto", [[0], [1], [2, 3]]), ([1, 3], "auto", None), ([3], "two_level", [[0, 1], [2], [3]])],
    ids=["one", "all", "asked-for"],
)
def test_39_hosts_are_what_all_ranks_have_proven(
    net: Hosts, blind: list[int], engine: str, hosts: list[list[int]] | None
) -> None:
    """Whoever shares no memory is a host of its own, on all ranks alike."""
    results = across(net, *TWO_BY_TWO).run(construct_blind, blind, engine)
    assert results == [("two_level" if hosts else "gloo", hosts, 4.0)] * 4


def test_39_two_levels_that_one_rank_undoes_are_refused_on_all(net: Hosts) -> None:
    first, *others = across(net, *TWO_BY_TWO).run(construct_blind, [1, 3], "two_level")
    assert "[dpcomm:UNSUPPORTED] two levels need ranks that share a host" in first
    assert others == [first] * 3


def test_39_ranks_that_share_with_some_of_a_host_only_are_apart() -> None:
    """Sharing must be mutual: rank 1 shares with 0 and 2, which do not share."""
    assert reach.hosts_of([{0}, {0, 1}, {0, 1, 2}]) == [[0, 1, 2]]
    assert reach.hosts_of([{0}, {0, 1}, {1, 2}, {3}]) == [[0], [1], [2], [3]]


def construct_without_gloo(rank: int, nranks: int, odd: int, engine: str) -> list[Any]:
    def refuse(*_: Any) -> None:
        raise RuntimeError("gloo has no ports left")

    with pytest.MonkeyPatch.context() as patch:
        if rank == odd:
            patch.setattr(carriers, "gloo_groups", refuse)
        caught = catch(dpcomm.Communicator, engine=engine, timeout_s=PATIENCE_S)
    return [caught, sum_of_ones("auto")]


@pytest.mark.parametrize(("odd", "engine"), [(0, "two_level"), (3, "auto"), (1, "gloo")])
def test_39_one_rank_cannot_connect_gloo(net: Hosts, odd: int, engine: str) -> None:
    """The others are inside torch then, which has the same time limit and would not say why."""
    results = across(net, *TWO_BY_TWO).run(construct_without_gloo, odd, engine)
    words = f"rank {odd}, stage 'verify-network'", "could not connect the ranks: gloo has no ports left"
    check_joint(results, "UnsupportedError", *words, within_s=PATIENCE_S / 2)


# --- memory ----------------------------------------------------------------------------------------------------------


def construct_without_connections(rank: int, nranks: int, odd: int, engine: str) -> list[Any]:
    """One rank fails when it has proven itself to all others, which may go on."""
    bind = Meeting.bind

    def refuse(mesh: Meeting, secret: bytes, timeout_s: float) -> Any:
        bind(mesh, secret, timeout_s)
        raise dpcomm.SystemResourceError("no descriptors left")

    with pytest.MonkeyPatch.context() as patch:
        if rank == odd:
            patch.setattr(Meeting, "bind", refuse)
        caught = catch(dpcomm.Communicator, engine=engine, timeout_s=PATIENCE_S)
    return [caught, sum_of_ones("auto")]


@pytest.mark.parametrize(("odd", "engine"), [(0, "auto"), (1, "two_level"), (3, "auto"), (0, "gloo")])
def test_44_a_rank_that_fails_while_ranks_connect_keeps_nobody_waiting(net: Hosts, odd: int, engine: str) -> None:
    """Neighbours would wait for it where memory is shared, until the time is up."""
    results = across(net, *TWO_BY_TWO).run(construct_without_connections, odd, engine)
    check_joint(results, "SystemResourceError", f"rank {odd}, stage 'bind-network'", "no descriptors left")


def own_bytes() -> int:
    """Addresses that this process has in use."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


# What rank 1 runs out of, from a stage on, at which stage that shows, and how.
FILES, ADDRESSES = resource.RLIMIT_FSIZE, resource.RLIMIT_AS
SCARCE: dict[str, tuple[str, int, int, str, int]] = {
    "first-round": ("validate", FILES, MIB, "allocate", errno.EFBIG),
    "own-arena": ("probe", FILES, MIB, "allocate-network", errno.EFBIG),
    "neighbours-arena": ("bind-network", ADDRESSES, 2 * MIB, "share-network", errno.ENOMEM),
    "messages": ("bind-network", ADDRESSES, 32 * MIB, "share-network", errno.ENOMEM),
}


def construct_without_memory(rank: int, nranks: int, engine: str, stage: str, what: int, left: int) -> list[Any]:
    with limit(what, resource.RLIM_INFINITY):

        def forbid(record: Any) -> Any:
            most = left + (own_bytes() if what == ADDRESSES else 0)
            if rank == 1:
                resource.setrlimit(what, (most, resource.getrlimit(what)[1]))
            return record

        with at_stage(stage, forbid):
            caught = catch(dpcomm.Communicator, engine=engine, timeout_s=PATIENCE_S)
    return [caught, sum_of_ones(engine)]


@pytest.mark.parametrize("engine", ["auto", "two_level"])
@pytest.mark.parametrize("what", SCARCE)
def test_44_no_memory_for_one_rank_of_several_hosts(net: Hosts, engine: str, what: str) -> None:
    *plant, stage, number = SCARCE[what]
    results = across(net, *TWO_BY_TWO).run(construct_without_memory, engine, *plant)
    words = f"rank 1, stage '{stage}': cannot get ", "MiB of shared memory", "DPCOMM_ARENA_MB"
    check_joint(results, "SystemResourceError", *words)
    assert {caught.failure.attributes["errno"] for caught, _ in results} == {number}


# --- strangers -------------------------------------------------------------------------------------------------------


def construct_beside(rank: int, nranks: int, words: list[bytes], knowing: bool) -> tuple[Any, list[str]]:
    """Somebody calls rank 0 where the ranks of its host call it, before they do, with the secret or without."""
    kept: list[socket.socket] = []

    def call(record: Outcome) -> Outcome:
        name, secret = record.payload[ENDPOINT.size :][:NAME_BYTES], record.payload[-SECRET_BYTES:]
        for word in words if rank == 0 else ():
            stranger = socket.socket(socket.AF_UNIX)
            kept.append(stranger)
            stranger.connect("\0dpcomm-" + name.hex())
            stranger.sendall((secret if knowing else b"") + word)
            if knowing:
                stranger.close()  # the others say no more, and do not hang up
        return record

    try:
        with heard() as said, at_stage("allocate-network", call):
            if knowing:
                return catch(dpcomm.Communicator, timeout_s=PATIENCE_S), said
            with two_level() as comm:
                return float(comm.allreduce(torch.ones(1000))[-1]), said
    finally:
        for stranger in kept:
            stranger.close()


def test_47_strangers_at_the_socket_of_a_host_are_dropped(net: Hosts) -> None:
    words = [b"", b"x", b"GET / HTTP/1.1\r\n\r\n" * 10, bytes(64), random.Random(3).randbytes(4096)]
    results = across(net, *TWO_BY_TWO).run(construct_beside, words, False)
    assert [total for total, _ in results] == [4.0] * 4
    assert [sum("dropped a connection of pid" in line for line in said) for _, said in results] == [len(words), 0, 0, 0]


@pytest.mark.parametrize("word", [b"\xff" * 32, b"\xff" * 100, b"\xff"], ids=["bad-magic", "oversized", "short"])
def test_48_a_bad_handshake_inside_a_host_fails_on_all(net: Hosts, word: bytes) -> None:
    results = across(net, *TWO_BY_TWO).run(construct_beside, [word], True)
    text = "it ends after 33 of 64 bytes" if len(word) == 1 else "bad magic"
    words = "rank 0, stage 'share-network'", "handshake from", text
    check_all([caught for caught, _ in results], "InternalError", *words, within_s=GRACE_S)
    assert across(net, *TWO_BY_TWO).run(ask_for_sum) == [("two_level", 4.0)] * 4


def ask_for_sum(rank: int, nranks: int) -> tuple[str, float]:
    return sum_of_ones("auto")


# --- orders ----------------------------------------------------------------------------------------------------------


def construct_crosswise(rank: int, nranks: int) -> list[Any]:
    """Rank 2 makes the second communicator first."""
    groups = [dist.new_group(list(range(nranks))) for _ in range(2)]
    caught = [catch(dpcomm.Communicator, group, timeout_s=PATIENCE_S) for group in groups[:: -1 if rank == 2 else 1]]
    with two_level(group=groups[0]) as comm:  # the same order from here on
        return [*caught, float(comm.allreduce(torch.ones(3))[0])]


def test_51_communicators_on_several_hosts_made_in_another_order(net: Hosts) -> None:
    results = across(net, *TWO_BY_TWO).run(construct_crosswise)
    for i in range(2):
        words = "communicator #", "group: rank 0 has '", "rank 2 has '", "same order"
        check_all([result[i] for result in results], "MismatchError", *words, within_s=GRACE_S)
    assert [total for *_, total in results] == [4.0] * 4
