"""The handshake between ranks, spoken by hand: what strangers can do with proofs, and colleagues who are wrong."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import ExitStack

import pytest
from faulty import Caught, catch, check, in_threads
from meetings import (
    GUESSING,
    HERE,
    KNOWING,
    NOISE,
    PATIENCE_S,
    SECRET,
    Fake,
    bound_beside,
    met,
    met_alone,
    place_of,
)
from meetings import nothing_leaks as nothing_leaks

from dpcomm.addresses import LOOPBACK
from dpcomm.handshake import CALLEE, CALLER, HELLO, PREFIX, PROOF_BYTES, Own
from dpcomm.network import Meeting

pytestmark = pytest.mark.usefixtures("nothing_leaks")


# --- attacks on the proof --------------------------------------------------------------------------------------------


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
    calls = [lambda: meetings[0].bind(SECRET, 2.0), lambda: meetings[1].bind(bytes(32), 2.0)]
    below, above = in_threads(calls)
    check(above, "InternalError", "rank 0 (127.0.0.1:", "answered without this session's secret", within_s=1.0)
    check(below, "CommTimeoutError", "ranks [1]")
    assert meetings[0].rejected == 2
