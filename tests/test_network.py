"""Ranks find each other over TCP, or say who is not there. Ranks are threads; every test closes what it opened.

Who else is at the sockets: test_network_strangers.py, test_network_proofs.py.
"""

from __future__ import annotations

import fcntl
import os
import resource
import selectors
import signal
import socket
import threading
import time
from contextlib import ExitStack

import pytest
from faulty import catch, check, check_all, in_threads
from meetings import (
    HERE,
    NOISE,
    PATIENCE_S,
    SECRET,
    Fake,
    Links,
    bound,
    check_linked,
    met,
    met_alone,
    open_sockets,
    place_of,
)
from meetings import nothing_leaks as nothing_leaks

from dpcomm import network
from dpcomm.addresses import LOOPBACK, Address
from dpcomm.errors import CommTimeoutError
from dpcomm.handshake import CALLER, Own
from dpcomm.network import Meeting

pytestmark = pytest.mark.usefixtures("nothing_leaks")


def test_leak_check_sees_a_socket_and_an_epoll() -> None:
    before = open_sockets()
    with socket.socket(), selectors.EpollSelector():
        assert len(open_sockets() - before) == 2
    assert open_sockets() <= before


# --- ranks -----------------------------------------------------------------------------------------------------------


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


# --- ranks that do not come ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("absent", [(2,), (0,), (1, 3)])
def test_a_rank_that_does_not_come_to_bind_is_named(absent: tuple[int, ...]) -> None:
    meetings = met(4)
    present = [meeting for rank, meeting in enumerate(meetings) if rank not in absent]
    caught = bound(present, 2.0)
    check_all(caught, "CommTimeoutError", f"ranks {list(absent)} did not complete the handshake in 2 s", within_s=3.0)
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
    assert any(seconds_of_ctrl_c() < 0.1 + 0.2 for _ in range(5))  # the machine may be busy


def seconds_of_ctrl_c() -> float:
    meeting = met_alone(2)
    raised: list[float] = []

    def interrupt() -> None:
        raised.append(time.monotonic())
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)

    timer = threading.Timer(0.2, interrupt)
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        meeting.bind(SECRET, PATIENCE_S)
    took = time.monotonic() - raised[0]
    timer.join()
    return took


def test_a_failed_bind_leaves_nothing_open_while_its_error_is_held() -> None:
    """An error's frames keep objects alive: closing must not be left to them. Rank 1 is proven, a stranger silent."""
    meeting = met_alone(3)
    with ExitStack() as stack:
        held: list[Exception] = []
        fakes = [stack.enter_context(Fake(place_of(meeting))) for _ in range(3)]

        def bind() -> None:
            try:
                meeting.bind(SECRET, 2.0)
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
