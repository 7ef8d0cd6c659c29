"""How ranks of different hosts find each other: every pair gets two TCP connections, "control" and "headers".

Knows no torch, and not what the connections are for. For ranks of one host: csrc/host/rendezvous.h.

    rank 1, 2, ...                rank 0
    probe: connects           --> (listens since it was constructed; accepts in bind)
    bind:  proves itself      --> checks         every rank does both at once, in one loop: no connection waits
           checks             <-- proves itself  for another
"""

from __future__ import annotations

import errno
import ipaddress
import os
import selectors
import socket
import struct
import time
from collections import Counter

from dpcomm.addresses import Address
from dpcomm.errors import CommTimeoutError, InternalError, SystemResourceError
from dpcomm.handshake import KINDS, Call, Own, StrangerError, Visitor

ENDPOINT = struct.Struct("<H16sH12x")  # 4 or 6, address (IPv4 as ::ffff:a.b.c.d), port
SECRET_BYTES = 32
MAPPED = bytes(10) + b"\xff\xff"

PROBE_S = 5.0  # for all connections together: a lost SYN is sent again after 1 s, then after 2 more
TURN_S = 0.1  # no wait is longer, so Ctrl-C is noticed
# Connections accepted and not proven, beyond those of the ranks. Where more come, the others stay in the kernel's queue
# until one of these is CROWD_S old. A rank is hurt only if it is later than that, and shares its host with the crowd.
MAX_PENDING, CROWD_S = 256, 2.0
ACCEPTS_A_TURN = 64  # whoever connects faster than the loop turns must not keep it from the others
MAX_WARNINGS = 8
# A host that loses power does not hang up: after 30 s of silence it is asked every 10 s, and given up after 6 times.
KEEPALIVE = ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 6))
EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)


class Meeting:
    """One rank's part of connecting all ranks with each other, for one thread.

    Attributes:
        reasons: Of each rank that `probe` did not reach, why: "10.0.0.1:4711: Connection refused".
        rejected: How many connections of strangers `bind` has dropped.

    Raises:
        SystemResourceError: This host does not let us listen at the address.
    """

    def __init__(self, rank: int, nranks: int, address: Address) -> None:
        if not 0 <= rank < nranks:
            raise InternalError(f"rank {rank} of {nranks}")
        self._rank, self._nranks = rank, nranks
        self.reasons: dict[int, str] = {}
        self.rejected = 0
        self._warnings: list[str] = []
        self._probed = False
        self._where: dict[int, str] = {}  # the lower ranks, for messages
        self._calls: dict[tuple[int, int], socket.socket] = {}  # by rank and kind
        try:
            self._listener = socket.create_server(
                (address.host, 0), family=_family(address.host), backlog=socket.SOMAXCONN
            )
        except OSError as error:
            raise _resource(f"listening at {address.host} ({address.why})", error) from error
        self._listener.setblocking(False)

    def endpoint(self) -> bytes:
        """Where this rank listens, 32 bytes."""
        host, port = self._listener.getsockname()[:2]
        ip = ipaddress.ip_address(host)
        return ENDPOINT.pack(ip.version, ip.packed if ip.version == 6 else MAPPED + ip.packed, port)

    def probe(self, endpoints: list[bytes], timeout_s: float) -> list[bool]:
        """Connects to every lower rank, all at once, for at most 5 s; once.

        Returns:
            For each rank whether it was reached; self and higher ranks count as reached.

        Raises:
            SystemResourceError: This process may not open as many sockets.
        """
        if len(endpoints) != self._nranks or self._probed:
            raise InternalError("probe once, with the endpoints of all ranks")
        self._probed = True
        try:
            self._connect(endpoints[: self._rank], min(timeout_s, PROBE_S))
        except BaseException:
            self.close()
            raise
        return [rank not in self.reasons for rank in range(self._nranks)]

    def bind(self, secret: bytes, timeout_s: float) -> list[tuple[int, int] | None]:
        """Proves and checks every connection, once, after `probe`. The listener is closed however it ends.

        Strangers (silent, talking nonsense, without the secret) are dropped and counted.

        Returns:
            For each rank the descriptors of its connections, control and headers, which are the caller's to close:
            non-blocking, closed by exec, without Nagle's delay, kept alive. None for this rank.

        Raises:
            CommTimeoutError: With `waiting_for`.
            PeerLostError: A lower rank closed a connection.
            InternalError: A lower rank does not have the secret, or one that has it contradicts what this rank knows.
            SystemResourceError: This process may not open as many sockets.
        """
        try:
            if not self._probed or self._listener.fileno() < 0:
                raise InternalError("bind once, after probe")
            if self.reasons:
                raise InternalError(f"bind without connections to ranks {sorted(self.reasons)}")
            if len(secret) != SECRET_BYTES:
                raise InternalError(f"a secret of {len(secret)} bytes instead of {SECRET_BYTES}")
            with selectors.DefaultSelector() as selector:
                exchange = _Exchange(self, Own(self._rank, self._nranks, secret), timeout_s, selector, self._listener)
                for (rank, kind), call in self._calls.items():
                    exchange.call(call, self._where[rank], rank, kind)
                return exchange.run()
        finally:
            self.close()

    def warnings(self) -> list[str]:
        """What is to be said about the first few strangers."""
        return list(self._warnings)

    def close(self) -> None:
        """Closes what was not handed out. Idempotent; nothing else may follow."""
        self._listener.close()
        for call in self._calls.values():
            call.close()

    def reject(self, who: str, why: str) -> None:
        """Counts a stranger."""
        self.rejected += 1
        if len(self._warnings) < MAX_WARNINGS:
            self._warnings.append(f"dropped a connection of {who}: {why}")

    def _connect(self, endpoints: list[bytes], timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            for rank, endpoint in enumerate(endpoints):
                for kind in range(len(KINDS)):
                    self._begin(selector, rank, kind, _place_of(endpoint))
            while selector.get_map() and time.monotonic() < deadline:
                for key, _ in selector.select(min(TURN_S, max(deadline - time.monotonic(), 0.0))):
                    selector.unregister(key.fileobj)
                    self._note(key.data[0], _failure_of(self._calls[key.data]))
            for key in selector.get_map().values():
                self._note(key.data[0], f"no answer in {timeout_s:g} s")

    def _begin(self, selector: selectors.BaseSelector, rank: int, kind: int, place: tuple[str, int] | None) -> None:
        """Starts one connection; notes why where that fails at once."""
        self._where[rank] = _text(place) if place else "its endpoint"
        if place is None:
            return self._note(rank, "malformed")
        try:
            call = self._calls[rank, kind] = socket.socket(_family(place[0]))
            _prepare(call)
            failed = call.connect_ex(place)
        except OSError as error:
            if error.errno in EXHAUSTED:
                raise _resource(f"a connection to rank {rank}", error) from error
            failed = error.errno or errno.EIO
        if failed not in (0, errno.EINPROGRESS):
            return self._note(rank, os.strerror(failed))
        selector.register(call, selectors.EVENT_WRITE, (rank, kind))
        return None

    def _note(self, rank: int, failure: str) -> None:
        if failure:
            self.reasons.setdefault(rank, f"{self._where[rank]}: {failure}")


class _Exchange:
    """One run of `Meeting.bind`."""

    def __init__(
        self,
        meeting: Meeting,
        own: Own,
        timeout_s: float,
        selector: selectors.BaseSelector,
        listener: socket.socket,
    ) -> None:
        self._meeting, self._own, self._timeout_s = meeting, own, timeout_s
        self._deadline = time.monotonic() + timeout_s
        self._selector, self._listener = selector, listener
        self._visitors: list[Visitor] = []  # the oldest first
        self._proven: dict[tuple[int, int], socket.socket] = {}  # by rank and kind

    def call(self, connection: socket.socket, who: str, rank: int, kind: int) -> None:
        self._selector.register(connection, selectors.EVENT_READ, Call(connection, who, self._own, rank, kind))

    def run(self) -> list[tuple[int, int] | None]:
        try:
            while self._missing():
                self._turn()
            for visitor in list(self._visitors):
                self._drop(visitor, "no handshake by the time all ranks were there")
            return [
                None if rank == self._own.rank else (self._proven[rank, 0].detach(), self._proven[rank, 1].detach())
                for rank in range(self._own.nranks)
            ]
        finally:
            for visitor in self._visitors:
                visitor.socket.close()
            for connection in self._proven.values():
                connection.close()  # does nothing where it was detached

    def _missing(self) -> tuple[int, ...]:
        everyone = range(self._own.nranks)
        return tuple(
            rank
            for rank in everyone
            if rank != self._own.rank and not all((rank, kind) in self._proven for kind in range(len(KINDS)))
        )

    def _turn(self) -> None:
        """What has happened since the last turn; the listener comes last, when those who were dropped are gone."""
        self._listen_if_room()
        now = time.monotonic()
        if now >= self._deadline:
            missing = self._missing()
            raise CommTimeoutError(
                f"ranks {list(missing)} did not complete the handshake in {self._timeout_s:g} s. "
                "Look whether they run, or raise timeout_s",
                waiting_for=missing,
            )
        ready = [key.data for key, _ in self._selector.select(min(TURN_S, self._deadline - now))]
        for line in ready:
            if line is not None:
                self._hear(line)
        if None in ready:
            self._accept()
        now = time.monotonic()
        for visitor in [visitor for visitor in self._visitors if visitor.until <= now]:
            self._drop(visitor, "it did not finish the handshake in time")

    def _hear(self, line: Call | Visitor) -> None:
        try:
            said = line.hear(time.monotonic()) if isinstance(line, Visitor) else line.hear()
        except StrangerError as error:
            assert isinstance(line, Visitor)
            return self._drop(line, str(error))
        if said is None:
            return None
        rank, kind = said
        if said in self._proven:
            raise InternalError(f"handshake from rank {rank} ({line.who}): a second '{KINDS[kind]}' connection")
        self._proven[said] = line.socket
        self._selector.unregister(line.socket)
        if isinstance(line, Visitor):
            self._visitors.remove(line)
        return None

    def _listen_if_room(self) -> None:
        want = self._has_room() or self._one_of_crowd() is not None
        listening = self._listener in self._selector.get_map()
        if want and not listening:
            self._selector.register(self._listener, selectors.EVENT_READ, None)
        elif listening and not want:
            self._selector.unregister(self._listener)

    def _accept(self) -> None:
        for _ in range(ACCEPTS_A_TURN):
            in_the_way = None if self._has_room() else self._one_of_crowd()
            if in_the_way is None and not self._has_room():
                return
            try:
                connection, place = self._listener.accept()
                _prepare(connection)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in EXHAUSTED:
                    raise _resource("accepting a connection", error) from error
                continue  # it has ended already
            if in_the_way is not None:
                self._drop(in_the_way, "too many connections are pending")
            visitor = Visitor(connection, _text(place), self._own, place[0], time.monotonic())
            self._visitors.append(visitor)
            self._selector.register(connection, selectors.EVENT_READ, visitor)

    def _has_room(self) -> bool:
        return len(self._visitors) < MAX_PENDING + len(KINDS) * self._own.nranks

    def _one_of_crowd(self) -> Visitor | None:
        """Who may have to go: the oldest from the host that most come from, if it has been here long enough."""
        host = Counter(visitor.host for visitor in self._visitors).most_common(1)[0][0]
        oldest = next(visitor for visitor in self._visitors if visitor.host == host)
        return oldest if time.monotonic() - oldest.since >= CROWD_S else None

    def _drop(self, visitor: Visitor, why: str) -> None:
        self._selector.unregister(visitor.socket)
        self._visitors.remove(visitor)
        visitor.socket.close()
        self._meeting.reject(visitor.who, why)


def _place_of(endpoint: bytes) -> tuple[str, int] | None:
    """The address and port behind an endpoint; None where it is none."""
    try:
        family, packed, port = ENDPOINT.unpack(endpoint)
    except struct.error:
        return None
    if port == 0 or family not in (4, 6) or (family == 4) != packed.startswith(MAPPED):
        return None
    return str(ipaddress.ip_address(packed[len(MAPPED) :] if family == 4 else packed)), port


def _prepare(connection: socket.socket) -> None:
    connection.setblocking(False)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in KEEPALIVE:
        connection.setsockopt(socket.IPPROTO_TCP, option, value)


def _failure_of(call: socket.socket) -> str:
    """Why a connection was not made; empty where it was."""
    failed = call.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if failed:
        return os.strerror(failed)
    try:
        # Where nobody listens at a port of this very host, a call may leave from that port, and reach itself.
        return os.strerror(errno.ECONNREFUSED) if call.getsockname() == call.getpeername() else ""
    except OSError as error:
        return str(error.strerror)


def _family(host: str) -> int:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _text(place: tuple[str, int]) -> str:
    return f"[{place[0]}]:{place[1]}" if ":" in place[0] else f"{place[0]}:{place[1]}"


def _resource(what: str, error: OSError) -> SystemResourceError:
    hint = "; raise ulimit -n" if error.errno in (errno.EMFILE, errno.ENFILE) else ""
    return SystemResourceError(f"{what}: {error.strerror}{hint}", errno=error.errno or 0)
