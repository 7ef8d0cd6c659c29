"""Strangers at the sockets where ranks find each other keep nobody out: they talk nonsense, fall silent, or crowd."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import ExitStack, suppress

import pytest
from faulty import Caught, catch, check, in_threads
from meetings import (
    HERE,
    NOISE,
    PATIENCE_S,
    RIGHT_HELLO,
    SECRET,
    Fake,
    bound,
    bound_beside,
    check_linked,
    met_alone,
    place_of,
)
from meetings import nothing_leaks as nothing_leaks

from dpcomm import handshake, network
from dpcomm.addresses import LOOPBACK
from dpcomm.handshake import HELLO, PREFIX, PROOF_BYTES
from dpcomm.network import Meeting

pytestmark = pytest.mark.usefixtures("nothing_leaks")

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


def bound_beside_a_crowd(host: str, seconds: float) -> tuple[int, list[str]]:
    """What `bound_beside` says where 40 come from a host and are silent so long before rank 1 comes."""
    with ExitStack() as stack:

        def act(place: tuple[str, int]) -> None:
            for _ in range(40):
                stack.enter_context(Fake(place, host))
            time.sleep(seconds)

        return bound_beside(act)


def test_silent_crowd_gives_way_and_a_silent_rank_elsewhere_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1's connections are silent the longest, but most come from the strangers' host; those are dropped."""
    monkeypatch.setattr(network, "MAX_PENDING", 8)
    monkeypatch.setattr(network, "CROWD_S", 0.1)
    rejected, warnings = bound_beside_a_crowd("127.0.0.2", 0.6)
    assert rejected >= 20
    assert all("127.0.0.2" in text for text in warnings)
    assert "too many connections are pending" in warnings[0]


def test_late_rank_is_kept_beside_a_crowd_on_its_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has to go before its time, and who is silent may be a rank."""
    monkeypatch.setattr(network, "MAX_PENDING", 8)
    rejected, _ = bound_beside_a_crowd(LOOPBACK, 0.3)
    assert 10 <= rejected <= 12  # there is room for 8, and for 4 ranks' or what is free of theirs


def test_silent_crowd_is_kept_while_there_is_room() -> None:
    """The negative control of the test above: silence alone is no offence, ranks are silent too."""
    rejected, warnings = bound_beside_a_crowd("127.0.0.2", 0.3)
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
