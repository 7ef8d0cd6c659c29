"""What tests of the connections between hosts have in common: ranks that meet, what they leave open, and fakes.

Ranks are threads. A `Fake` speaks the protocol by hand, with the secret or without: as a colleague who is wrong, or as
a stranger.
"""

from __future__ import annotations

import gc
import os
import random
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from faulty import Caught, in_threads

from dpcomm import network
from dpcomm.addresses import LOOPBACK, Address
from dpcomm.handshake import HELLO, PROOF_BYTES, Own
from dpcomm.network import Meeting

SECRET = bytes(range(32))
HERE = Address(LOOPBACK, "a test")
PATIENCE_S = 10.0  # of whatever should succeed
DEADLINE_S = 20.0  # of a test's threads
NOISE = random.Random(5)

KNOWING, GUESSING = Own(1, 2, SECRET), Own(1, 2, bytes(32))
RIGHT_HELLO = GUESSING.hello(0)

Links = list[tuple[int, int] | None]
Act = Callable[[tuple[str, int]], None]


def open_sockets() -> set[str]:
    """The sockets and epolls of this process, each by a name of its own."""
    names = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            target = os.readlink(entry)  # noqa: PTH115 - no path, a name
        except OSError:
            continue  # the listing's own
        if target.startswith("socket:"):
            names.add(target)
        elif "eventpoll" in target:
            names.add(f"{target} {entry.name}")
    return names


@pytest.fixture
def nothing_leaks() -> Iterator[None]:
    """For every test: it closes what it opened."""
    before = open_sockets()
    yield
    if not open_sockets() <= before:
        gc.collect()  # an exception's frames hold on to theirs
        assert open_sockets() <= before


def met(nranks: int, address: Address = HERE) -> list[Meeting]:
    """Ranks that have reached each other."""
    meetings = [Meeting(rank, nranks, address) for rank in range(nranks)]
    endpoints = [meeting.endpoint() for meeting in meetings]
    for meeting in meetings:
        assert meeting.probe(endpoints, PATIENCE_S) == [True] * nranks
        assert meeting.reasons == {}
    return meetings


def bound(meetings: list[Meeting], timeout_s: float = PATIENCE_S) -> list[Any]:
    """Each rank's links, or what it raised."""
    return in_threads([partial(meeting.bind, SECRET, timeout_s) for meeting in meetings], DEADLINE_S)


def check_linked(results: list[Any]) -> None:
    """Every pair has two connections, each to the right end; closes all."""
    assert not [r.failure.trace for r in results if isinstance(r, Caught)]
    with ExitStack() as stack:
        lines = {
            (rank, peer, kind): stack.enter_context(socket.socket(fileno=fd))
            for rank, links in enumerate(results)
            for peer, pair in enumerate(links)
            for kind, fd in enumerate(pair or ())
        }
        n = len(results)
        assert set(lines) == {(a, b, kind) for a in range(n) for b in range(n) if a != b for kind in (0, 1)}
        for (rank, peer, kind), line in lines.items():
            assert not os.get_blocking(line.fileno())
            line.send(bytes([rank, peer, kind]))
        for (rank, peer, kind), line in lines.items():
            line.settimeout(PATIENCE_S)
            assert line.recv(100) == bytes([peer, rank, kind])


def place_of(meeting: Meeting) -> tuple[str, int]:
    place = network._place_of(meeting.endpoint())
    assert place is not None
    return place


def met_alone(nranks: int) -> Meeting:
    """Rank 0, whose peers do not call."""
    meeting = Meeting(0, nranks, HERE)
    meeting.probe([meeting.endpoint()] * nranks, PATIENCE_S)
    return meeting


class Fake(socket.socket):
    """Calls a rank, or answers one, step by step."""

    def __init__(self, place: tuple[str, int], source: str = LOOPBACK) -> None:
        super().__init__()
        self.settimeout(PATIENCE_S)
        self.bind((source, 0))
        self.connect(place)

    def take(self, count: int) -> bytes:
        """That many bytes; fewer where the other end closes."""
        data = b""
        while len(data) < count and (more := self.recv(count - len(data))):
            data += more
        return data

    def greet(self, own: Own, kind: int = 0) -> tuple[bytes, bytes, bytes]:
        """Both HELLOs and the callee's proof."""
        hello = own.hello(kind)
        self.sendall(hello)
        answer = self.take(HELLO.size + PROOF_BYTES)
        return hello, answer[: HELLO.size], answer[HELLO.size :]

    def say(self, words: bytes) -> bool:
        """Sends; False where the other end has closed: a stranger may be dropped before it has said all."""
        try:
            self.sendall(words)
        except ConnectionError:
            return False
        return True

    def check_dropped(self, heard: int = 0) -> None:
        """The other end closes, after that many bytes at most."""
        with suppress(ConnectionError):
            assert len(self.take(heard + 1)) <= heard


def bound_beside(act: Act, nranks: int = 2) -> tuple[int, list[str]]:
    """All ranks find each other although somebody calls rank 0, which is in `bind` when the last rank is not yet.

    Returns:
        How many strangers rank 0 counted, and what it says about them.
    """
    meetings = met(nranks)
    place = place_of(meetings[0])

    def after() -> Links:
        act(place)
        return meetings[-1].bind(SECRET, PATIENCE_S)

    calls = [partial(meeting.bind, SECRET, PATIENCE_S) for meeting in meetings[:-1]]
    check_linked(in_threads([*calls, after], DEADLINE_S))
    assert [meeting.rejected for meeting in meetings[1:]] == [0] * (nranks - 1)
    return meetings[0].rejected, meetings[0].warnings()
