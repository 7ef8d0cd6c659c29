"""Ranks find each other over TCP, whoever else is at the sockets. Ranks are threads; every test closes what it opened.

A `Fake` speaks the protocol by hand, with the secret or without: as a colleague who is wrong, or as a stranger.
"""

from __future__ import annotations

import fcntl
import gc
import os
import random
import resource
import selectors
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from faulty import Caught, catch, check, check_all, in_threads

from dpcomm import handshake, network
from dpcomm.addresses import LOOPBACK, Address
from dpcomm.errors import CommTimeoutError
from dpcomm.handshake import CALLEE, CALLER, HELLO, PREFIX, PROOF_BYTES, Own
from dpcomm.network import Meeting

SECRET = bytes(range(32))
HERE = Address(LOOPBACK, "a test")
PATIENCE_S = 10.0  # of whatever should succeed
DEADLINE_S = 20.0  # of a test's threads
NOISE = random.Random(5)

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


@pytest.fixture(autouse=True)
def nothing_leaks() -> Iterator[None]:
    before = open_sockets()
    yield
    if not open_sockets() <= before:
        gc.collect()  # an exception's frames hold on to theirs
        assert open_sockets() <= before


def test_leak_check_sees_a_socket_and_an_epoll() -> None:
    before = open_sockets()
    with socket.socket(), selectors.EpollSelector():
        assert len(open_sockets() - before) == 2
    assert open_sockets() <= before


# --- ranks -----------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("nranks", [1, 2, 3, 5])
def test_every_pair_gets_two_connections(nranks: int) -> None:
    meetings = met(nranks)
    check_linked(bound(meetings))
    assert [meeting.rejected for meeting in meetings] == [0] * nranks
    assert [meeting.warnings() for meeting in meetings] == [[]] * nranks


def test_every_pair_gets_two_connections_over_ipv6() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(f"no IPv6 loopback: {error}")
    check_linked(bound(met(3, Address("::1", "a test"))))


def test_connections_are_made_for_short_messages_and_long_silence() -> None:
    results = bound(met(2))
    for links in results:
        for fd in next(pair for pair in links if pair):
            assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
            with socket.socket(fileno=fd) as line:
                assert not os.get_blocking(fd)
                assert line.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                assert line.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                assert line.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) < 120


def test_nobody_can_connect_after_bind() -> None:
    meetings = met(2)
    place = place_of(meetings[0])
    check_linked(bound(meetings))
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(place)


def test_a_rank_that_is_late_is_waited_for() -> None:
    meetings = met(3)

    def late() -> Links:
        time.sleep(0.4)
        return meetings[1].bind(SECRET, PATIENCE_S)

    check_linked(in_threads([lambda: meetings[0].bind(SECRET, 5.0), late, lambda: meetings[2].bind(SECRET, 5.0)]))


# --- probe -----------------------------------------------------------------------------------------------------------


def test_probe_says_who_is_not_there_and_why() -> None:
    meetings = [Meeting(rank, 5, HERE) for rank in range(5)]
    endpoints = [meeting.endpoint() for meeting in meetings]
    assert all(len(endpoint) == 32 for endpoint in endpoints)
    host, port = place_of(meetings[1])
    meetings[1].close()  # nobody listens there any more
    endpoints[2] = bytes(32)
    assert meetings[3].probe(endpoints, PATIENCE_S) == [True, False, False, True, True]
    assert meetings[3].reasons == {1: f"{host}:{port}: Connection refused", 2: "its endpoint: malformed"}
    check(catch(meetings[3].bind, SECRET, PATIENCE_S), "InternalError", "without connections to ranks [1, 2]")
    for meeting in meetings:
        meeting.close()


def test_probe_of_a_host_that_does_not_answer_ends_in_time() -> None:
    """A listener whose queue is full ignores calls, as a host behind a firewall does."""
    with ExitStack() as stack:
        deaf = stack.enter_context(socket.create_server((LOOPBACK, 0), backlog=0))
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(deaf.getsockname())
        meetings = [Meeting(rank, 3, HERE) for rank in range(3)]
        for meeting in meetings:
            stack.callback(meeting.close)
        endpoints = [meeting.endpoint() for meeting in meetings]
        endpoints[0] = endpoints[0][:18] + deaf.getsockname()[1].to_bytes(2, "little") + endpoints[0][20:]
        began = time.monotonic()
        assert meetings[2].probe(endpoints, 0.3) == [False, True, True]
        assert 0.25 < time.monotonic() - began < 1.0
        assert meetings[2].reasons == {0: f"{LOOPBACK}:{deaf.getsockname()[1]}: no answer in 0.3 s"}


def test_malformed_endpoints_lead_nowhere() -> None:
    meeting = Meeting(0, 1, HERE)
    good = meeting.endpoint()
    meeting.close()
    assert network._place_of(good)
    bad = [b"", good[:-1], good + b"\0", b"\5" + good[1:], b"\6" + good[1:], good[:2] + b"\1" + good[3:]]
    bad.append(good[:18] + bytes(14))  # port 0
    assert [network._place_of(endpoint) for endpoint in bad] == [None] * len(bad)
    for _ in range(500):
        network._place_of(NOISE.randbytes(32))  # raises nothing


def test_a_call_that_reaches_itself_counts_as_refused() -> None:
    with socket.socket() as call:
        call.bind((LOOPBACK, 0))
        call.connect(call.getsockname())  # TCP's simultaneous open
        assert network._failure_of(call) == "Connection refused"


def test_an_address_of_another_host_is_an_error_with_its_source() -> None:
    caught = catch(Meeting, 0, 2, Address("198.51.100.77", "GLOO_SOCKET_IFNAME=eth0"))
    check(caught, "SystemResourceError", "listening at 198.51.100.77 (GLOO_SOCKET_IFNAME=eth0): Cannot assign")


def test_too_few_descriptors_are_an_error_with_a_hint() -> None:
    meetings = [Meeting(rank, 5, HERE) for rank in range(5)]
    endpoints = [meeting.endpoint() for meeting in meetings]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + 3, hard))
    try:
        caught = catch(meetings[4].probe, endpoints, PATIENCE_S)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    check(caught, "SystemResourceError", "Too many open files; raise ulimit -n")
    for meeting in meetings:
        meeting.close()


@pytest.mark.parametrize("misuse", ["bind first", "bind twice", "probe twice", "few endpoints", "short secret"])
def test_calls_out_of_order_are_errors(misuse: str) -> None:
    meeting = Meeting(0, 1, HERE)
    endpoints = [meeting.endpoint()]
    if misuse == "bind first":
        check(catch(meeting.bind, SECRET, 1.0), "InternalError", "bind once, after probe")
    elif misuse == "few endpoints":
        check(catch(meeting.probe, [], 1.0), "InternalError", "the endpoints of all ranks")
    else:
        meeting.probe(endpoints, 1.0)
        if misuse == "probe twice":
            check(catch(meeting.probe, endpoints, 1.0), "InternalError", "probe once")
        elif misuse == "short secret":
            check(catch(meeting.bind, b"x", 1.0), "InternalError", "a secret of 1 bytes instead of 32")
        else:
            meeting.bind(SECRET, 1.0)
            check(catch(meeting.bind, SECRET, 1.0), "InternalError", "bind once, after probe")
    meeting.close()
    meeting.close()


# --- strangers -------------------------------------------------------------------------------------------------------


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


KNOWING, GUESSING = Own(1, 2, SECRET), Own(1, 2, bytes(32))
RIGHT_HELLO = GUESSING.hello(0)
WORDS = {
    "one byte": b"x",
    "http": b"GET / HTTP/1.1\r\n\r\n",
    "zeros": bytes(HELLO.size),
    "noise": NOISE.randbytes(1 << 16),
    "other version": RIGHT_HELLO[:8] + b"\2" + RIGHT_HELLO[9:],
    "late nonsense": RIGHT_HELLO[:11] + b"\7",
    "hello and zeros": RIGHT_HELLO + bytes(PROOF_BYTES),
    "hello and noise": RIGHT_HELLO + NOISE.randbytes(4096),
    "hello twice": RIGHT_HELLO + RIGHT_HELLO,
}


@pytest.mark.parametrize("nranks", [2, 5])
@pytest.mark.parametrize("word", WORDS)
def test_strangers_who_talk_nonsense_over_tcp_are_dropped(word: str, nranks: int) -> None:
    def act(place: tuple[str, int]) -> None:
        with Fake(place) as stranger:
            stranger.say(WORDS[word])
            stranger.check_dropped(HELLO.size + PROOF_BYTES if word.startswith("hello") else 0)

    rejected, warnings = bound_beside(act, nranks)
    assert rejected == len(warnings) == 1
    assert warnings[0].startswith(f"dropped a connection of {LOOPBACK}:")
    why = "does not know this session's secret" if word.startswith("hello") else "speaks another protocol"
    assert warnings[0].endswith(f": it {why}")


def test_strangers_of_every_length_are_dropped_and_the_first_few_warned_of() -> None:
    """Noise from nothing to two messages' worth, alone, behind the right beginning and behind a HELLO; then a close."""
    words = [NOISE.randbytes(length) for length in range(0, 2 * HELLO.size, 3)]
    words += [PREFIX[:length] for length in range(len(PREFIX))]
    words += [PREFIX + NOISE.randbytes(length) for length in range(0, 3 * HELLO.size, 3)]
    words += [PREFIX + NOISE.randbytes(HELLO.size - len(PREFIX)) + NOISE.randbytes(n) for n in range(PROOF_BYTES + 2)]

    def act(place: tuple[str, int]) -> None:
        for word in words:
            with Fake(place) as stranger:
                stranger.say(word)
                with suppress(OSError):
                    stranger.shutdown(socket.SHUT_WR)
                stranger.check_dropped(HELLO.size + PROOF_BYTES)

    rejected, warnings = bound_beside(act)
    assert rejected == len(words) > 130
    assert len(warnings) == network.MAX_WARNINGS


def test_strangers_before_the_secret_is_known_hurt_nobody() -> None:
    """Between probe and bind nobody accepts: who calls then waits in the kernel, in front of nobody."""
    meetings = [Meeting(rank, 3, HERE) for rank in range(3)]
    endpoints = [meeting.endpoint() for meeting in meetings]
    with ExitStack() as stack:
        strangers = [stack.enter_context(Fake(place_of(meetings[0]))) for _ in range(3)]  # before the ranks
        for meeting in meetings:
            assert all(meeting.probe(endpoints, PATIENCE_S))
        strangers += [stack.enter_context(Fake(place_of(meetings[0]))) for _ in range(3)]  # after them
        strangers[0].say(b"hello?")
        strangers[3].say(bytes(1 << 16))
        strangers[5].close()
        check_linked(bound(meetings))
        assert [meeting.rejected for meeting in meetings] == [6, 0, 0]
        for stranger in strangers[:5]:
            stranger.check_dropped()


def test_hundreds_of_strangers_keep_nobody_out() -> None:
    with ExitStack() as stack:

        def act(place: tuple[str, int]) -> None:
            for index in range(250):
                stranger = stack.enter_context(Fake(place))
                if index % 3:
                    stranger.say(NOISE.randbytes(index))

        began = time.monotonic()
        rejected, warnings = bound_beside(act, nranks=3)
        assert time.monotonic() - began < 5.0
    assert 150 < rejected <= 250
    assert len(warnings) == network.MAX_WARNINGS


def test_silent_crowd_gives_way_and_a_silent_rank_elsewhere_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1's connections are silent the longest, but most come from the strangers' host; those are dropped."""
    monkeypatch.setattr(network, "MAX_PENDING", 8)
    monkeypatch.setattr(network, "CROWD_S", 0.1)
    with ExitStack() as stack:

        def act(place: tuple[str, int]) -> None:
            for _ in range(40):
                stack.enter_context(Fake(place, "127.0.0.2"))
            time.sleep(0.6)

        rejected, warnings = bound_beside(act)
    assert rejected >= 20
    assert all("127.0.0.2" in text for text in warnings)
    assert "too many connections are pending" in warnings[0]


def test_late_rank_is_kept_beside_a_crowd_on_its_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has to go before its time, and who is silent may be a rank."""
    monkeypatch.setattr(network, "MAX_PENDING", 8)
    with ExitStack() as stack:

        def act(place: tuple[str, int]) -> None:
            for _ in range(40):
                stack.enter_context(Fake(place))
            time.sleep(0.3)

        assert 10 <= bound_beside(act)[0] <= 12  # there is room for 8, and for 4 ranks' or what is free of theirs


def test_silent_crowd_is_kept_while_there_is_room() -> None:
    """The negative control of the test above: silence alone is no offence, ranks are silent too."""
    with ExitStack() as stack:

        def act(place: tuple[str, int]) -> None:
            for _ in range(40):
                stack.enter_context(Fake(place, "127.0.0.2"))
            time.sleep(0.3)

        rejected, warnings = bound_beside(act)
    assert rejected == 40
    assert "no handshake by the time all ranks were there" in warnings[0]


@pytest.mark.parametrize("said", [1, 30, HELLO.size])
def test_a_stranger_that_falls_silent_or_trickles_is_dropped(said: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handshake, "HELLO_S", 0.3)
    monkeypatch.setattr(handshake, "PROOF_S", 0.3)

    def act(place: tuple[str, int]) -> None:
        with Fake(place) as silent, Fake(place) as trickling:
            silent.say(RIGHT_HELLO[:said])
            trickling.say(RIGHT_HELLO[: said - 1])
            if said == HELLO.size:
                assert len(silent.take(HELLO.size + PROOF_BYTES)) == HELLO.size + PROOF_BYTES
            began = time.monotonic()
            for byte in RIGHT_HELLO[said - 1 : HELLO.size - 1]:
                time.sleep(0.05)
                if not trickling.say(bytes([byte])):
                    break
            assert time.monotonic() - began < 1.5  # all that it has to say would take 2.7 s
            silent.check_dropped()
            trickling.check_dropped()
        monkeypatch.undo()  # the ranks have all the time they want

    rejected, warnings = bound_beside(act)
    assert rejected == 2
    assert sum("did not finish the handshake in time" in text for text in warnings) == 2


def test_the_deadline_holds_while_a_stranger_trickles() -> None:
    meeting = met_alone(2)
    done = threading.Event()

    def trickle() -> None:
        with Fake(place_of(meeting)) as stranger:
            for byte in RIGHT_HELLO:
                if done.wait(0.02):
                    return
                stranger.say(bytes([byte]))

    def bind() -> Caught:
        try:
            return catch(meeting.bind, SECRET, 0.5)
        finally:
            done.set()

    caught, _ = in_threads([bind, trickle])
    check(caught, "CommTimeoutError", "ranks [1] did not complete the handshake in 0.5 s", within_s=1.5)
    assert caught.failure.attributes["waiting_for"] == (1,)


# --- attacks on the proof --------------------------------------------------------------------------------------------


def met_alone(nranks: int) -> Meeting:
    """Rank 0, whose peers do not call."""
    meeting = Meeting(0, nranks, HERE)
    meeting.probe([meeting.endpoint()] * nranks, PATIENCE_S)
    return meeting


def test_a_replayed_proof_is_worthless() -> None:
    """A whole conversation that was right once, byte by byte; the callee's random bytes are new."""
    hello, earlier = KNOWING.hello(0), Own(0, 2, SECRET).hello(0)
    proof = KNOWING.proof(CALLER, hello, earlier)

    def act(place: tuple[str, int]) -> None:
        with Fake(place) as attacker:
            attacker.say(hello)
            assert attacker.take(HELLO.size + PROOF_BYTES)[: len(PREFIX)] == PREFIX
            attacker.say(proof)
            attacker.check_dropped()

    assert bound_beside(act)[0] == 1


@pytest.mark.parametrize("echoed", ["proof", "hello and proof"])
def test_a_reflected_proof_is_worthless(echoed: str) -> None:
    """The callee's own proof, sent back on the same connection; and on another one, with the callee's own HELLO."""

    def act(place: tuple[str, int]) -> None:
        with Fake(place) as attacker, Fake(place) as second:
            _, answer, proof = attacker.greet(GUESSING)
            if echoed == "proof":
                attacker.say(proof)
            else:
                attacker.close()
                second.say(answer + proof)
                attacker = second
                attacker.take(HELLO.size + PROOF_BYTES)
            attacker.check_dropped()

    assert bound_beside(act)[0] == 2


def impostor(meeting: Meeting, answer: Callable[[Fake, bytes], bytes]) -> Caught:
    """What rank 1 raises when another listens where rank 0 should: `answer` makes its reply from the caller's HELLO."""
    with ExitStack() as stack:
        place = place_of(meeting)
        server = stack.enter_context(socket.create_server((LOOPBACK, 0)))
        server.settimeout(PATIENCE_S)
        own = meeting.endpoint()
        theirs = own[:18] + server.getsockname()[1].to_bytes(2, "little") + own[20:]
        assert meeting.probe([theirs, own], PATIENCE_S) == [True, True]

        def act() -> None:
            for _ in range(2):
                connection = stack.enter_context(server.accept()[0])
                connection.settimeout(PATIENCE_S)
                with Fake(place) as other:
                    connection.sendall(answer(other, connection.recv(HELLO.size, socket.MSG_WAITALL)))

        caught, failure = in_threads([lambda: catch(meeting.bind, SECRET, PATIENCE_S), act])
        # Rank 1 may be gone before the second connection is served.
        assert failure is None or failure.failure.name in ("ConnectionRefusedError", "ConnectionResetError")
        assert isinstance(caught, Caught)
        return caught


IMPOSTORS: dict[str, Callable[[Fake, bytes], bytes]] = {
    "noise": lambda other, hello: NOISE.randbytes(HELLO.size + PROOF_BYTES),
    "one wrong byte": lambda other, hello: b"x",
    "without the secret": lambda other, hello: (
        (answer := Own(0, 2, bytes(32)).hello(HELLO.unpack(hello)[3]))
        + Own(0, 2, bytes(32)).proof(CALLEE, hello, answer)
    ),
    "the caller's part": lambda other, hello: (
        (answer := Own(0, 2, SECRET).hello(0)) + Own(0, 2, SECRET).proof(CALLER, hello, answer)
    ),
    "replays rank 0": lambda other, hello: (
        (answer := Own(0, 2, SECRET).hello(0)) + Own(0, 2, SECRET).proof(CALLEE, KNOWING.hello(0), answer)
    ),
    "reflects": lambda other, hello: hello + hello[:PROOF_BYTES],
}


@pytest.mark.parametrize("kind", IMPOSTORS)
def test_an_impostor_at_a_ranks_address_is_an_error(kind: str) -> None:
    caught = impostor(Meeting(1, 2, HERE), IMPOSTORS[kind])
    check(caught, "InternalError", "rank 0 (127.0.0.1:", "answered without this session's secret", within_s=1.0)


def test_a_rank_is_not_fooled_by_its_own_listener() -> None:
    """Who relays rank 1's call to rank 1 gets a right proof, of rank 1: rank 0 was called."""

    def relay(other: Fake, hello: bytes) -> bytes:
        other.sendall(hello)
        return other.take(HELLO.size + PROOF_BYTES)

    caught = impostor(Meeting(1, 2, HERE), relay)
    check(caught, "InternalError", "handshake from rank 1", "expected a rank in [0, 1)", within_s=1.0)


# --- colleagues ------------------------------------------------------------------------------------------------------


def colleague(own: Own, kind: int, times: int = 1) -> Caught:
    """What rank 0 of 3 raises when somebody who has the secret says this."""
    meeting = met_alone(3)

    def act() -> None:
        for _ in range(times):
            with Fake(place_of(meeting)) as peer:
                hello, answer, _ = peer.greet(own, kind)
                peer.sendall(own.proof(CALLER, hello, answer))
                peer.check_dropped() if kind or times == 1 else None

    caught, failure = in_threads([lambda: catch(meeting.bind, SECRET, PATIENCE_S), act])
    assert failure is None or isinstance(failure, Caught)
    assert isinstance(caught, Caught)
    return caught


def test_a_colleague_that_contradicts_is_an_error() -> None:
    for own, kind, text in [
        (Own(1, 4, SECRET), 0, "handshake from rank 1 (127.0.0.1:"),
        (Own(1, 4, SECRET), 0, "nranks 4 where this rank has 3"),
        (Own(0, 3, SECRET), 0, "expected a rank in [1, 3)"),
        (Own(3, 3, SECRET), 0, "expected a rank in [1, 3)"),
        (Own(-1, 3, SECRET), 1, "expected a rank in [1, 3)"),
        (Own(1, 3, SECRET), 2, "there is no kind 2 of connections"),
    ]:
        check(colleague(own, kind), "InternalError", text, within_s=1.0)


def test_two_processes_with_one_rank_are_an_error() -> None:
    caught = colleague(Own(2, 3, SECRET), 0, times=2)
    check(caught, "InternalError", "handshake from rank 2", "a second 'control' connection", within_s=1.0)


def test_bytes_behind_the_handshake_are_left_to_the_engine() -> None:
    """And a rank whose bytes come one by one is a rank."""
    meeting = met_alone(2)

    def act() -> None:
        with ExitStack() as stack:
            for kind in range(2):
                peer = stack.enter_context(Fake(place_of(meeting)))
                hello = KNOWING.hello(kind)
                for byte in hello:
                    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    peer.sendall(bytes([byte]))
                answer = peer.take(HELLO.size + PROOF_BYTES)
                peer.sendall(KNOWING.proof(CALLER, hello, answer[: HELLO.size]) + b"header %d" % kind)

    links, failure = in_threads([lambda: meeting.bind(SECRET, PATIENCE_S), act])
    assert failure is None
    for kind, fd in enumerate(links[1]):
        with socket.socket(fileno=fd) as line:
            assert line.recv(100) == b"header %d" % kind


def test_different_secrets_are_an_error_above_and_a_stranger_below() -> None:
    meetings = met(2)
    calls = [lambda: meetings[0].bind(SECRET, 0.5), lambda: meetings[1].bind(bytes(32), 0.5)]
    below, above = in_threads(calls)
    check(above, "InternalError", "rank 0 (127.0.0.1:", "answered without this session's secret", within_s=1.0)
    check(below, "CommTimeoutError", "ranks [1]")
    assert meetings[0].rejected == 2


# --- ranks that do not come ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("absent", [(2,), (0,), (1, 3)])
def test_a_rank_that_does_not_come_to_bind_is_named(absent: tuple[int, ...]) -> None:
    meetings = met(4)
    present = [meeting for rank, meeting in enumerate(meetings) if rank not in absent]
    caught = bound(present, 0.5)
    check_all(caught, "CommTimeoutError", f"ranks {list(absent)} did not complete the handshake in 0.5 s", within_s=1.5)
    assert all(one.failure.attributes["waiting_for"] == absent for one in caught)
    for rank in absent:
        meetings[rank].close()


@pytest.mark.parametrize("when", ["before", "during"])
def test_a_lower_rank_that_ends_is_lost(when: str) -> None:
    meetings = met(3)
    if when == "before":
        meetings[0].close()
    else:
        timer = threading.Timer(0.2, meetings[0].close)
        timer.start()
    caught = bound(meetings[1:])
    check_all(caught, "PeerLostError", "rank 0 (127.0.0.1:", "its connection", within_s=1.0)
    assert all(one.failure.attributes["rank"] == 0 for one in caught)


def test_ctrl_c_ends_bind_within_100_ms() -> None:
    """The signal comes to another thread, so that it does not end the wait itself."""
    meeting = met_alone(2)
    raised: list[float] = []

    def interrupt() -> None:
        raised.append(time.monotonic())
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)

    timer = threading.Timer(0.2, interrupt)
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        meeting.bind(SECRET, PATIENCE_S)
    assert time.monotonic() - raised[0] < 0.1 + 0.2
    timer.join()


def test_a_failed_bind_leaves_nothing_open_while_its_error_is_held() -> None:
    """An error's frames keep objects alive: closing must not be left to them. Rank 1 is proven, a stranger silent."""
    meeting = met_alone(3)
    with ExitStack() as stack:
        held: list[Exception] = []
        fakes = [stack.enter_context(Fake(place_of(meeting))) for _ in range(3)]

        def bind() -> None:
            try:
                meeting.bind(SECRET, 0.4)
            except CommTimeoutError as error:
                held.append(error)

        def act() -> None:
            own = Own(1, 3, SECRET)
            for kind, fake in enumerate(fakes[:2]):
                hello, answer, _ = fake.greet(own, kind)
                fake.sendall(own.proof(CALLER, hello, answer))

        before = open_sockets()
        assert in_threads([bind, act]) == [None, None]
        assert open_sockets() - before == set()
        assert len(before - open_sockets()) == 1  # the listener
        assert held[0].__traceback__
