"""How two ranks prove over TCP that they belong to one session: the bytes, and one connection's state.

Knows not who calls whom and when (dpcomm/network.py). For ranks of one host: csrc/host/handshake.h.

    caller                        callee
    HELLO, 56 bytes       -->
                          <--     HELLO, proof
    checks, proof         -->     checks

    HELLO    magic, version, rank, nranks, kind, 32 random bytes
    proof    HMAC-SHA256, keyed with the session's secret, of the prover's part and both HELLOs

The secret never travels, and a proof serves once, one way, for the ranks and the kind it was made for. What travels
afterwards is neither encrypted nor signed.
"""

from __future__ import annotations

import hmac
import secrets
import socket
import struct
from typing import NamedTuple

from dpcomm.errors import InternalError, PeerLostError

KINDS = ("control", "headers")
PREFIX = struct.pack("<8sI", b"dpcomm\r\n", 1)  # magic, version
HELLO = struct.Struct("<12siiI32s")
NONCE_BYTES = PROOF_BYTES = 32
CALLER, CALLEE = b"caller", b"callee"

HELLO_S = 2.0  # from the first byte of a HELLO to its last
PROOF_S = 10.0  # from a HELLO to the proof: a rank's process may be busy


class Own(NamedTuple):
    """What this rank says of itself, and what proves it."""

    rank: int
    nranks: int
    secret: bytes

    def hello(self, kind: int) -> bytes:
        """A HELLO with random bytes of its own."""
        return HELLO.pack(PREFIX, self.rank, self.nranks, kind, secrets.token_bytes(NONCE_BYTES))

    def proof(self, part: bytes, callers: bytes, callees: bytes) -> bytes:
        """What the caller, or the callee, of two HELLOs shows."""
        return hmac.digest(self.secret, part + callers + callees, "sha256")

    def check(self, hello: bytes, who: str, ranks: range) -> tuple[int, int]:
        """Compares what a colleague who has the secret says with what this rank knows; its rank and kind.

        Raises:
            InternalError: They contradict each other.
        """
        _, rank, nranks, kind, _ = HELLO.unpack(hello)
        otherwise = ""
        if nranks != self.nranks:
            otherwise = f"nranks {nranks} where this rank has {self.nranks}"
        elif rank not in ranks:
            otherwise = f"expected a rank in [{ranks.start}, {ranks.stop})"
        elif kind >= len(KINDS):
            otherwise = f"there is no kind {kind} of connections"
        if otherwise:
            raise InternalError(f"handshake from rank {rank} ({who}): {otherwise}")
        return rank, kind


class StrangerError(Exception):
    """Whoever is at the other end is none of ours; the text says why."""


class Line:
    """A connection whose other end has not proven itself yet."""

    def __init__(self, connection: socket.socket, who: str, own: Own) -> None:
        self.socket, self.who = connection, who
        self._own = own
        self._received = b""
        self._closed = ""  # why no more will come

    def _read(self, wanted: int) -> bool:
        """Whether that many bytes are there. Takes no more than those: what follows is not the handshake's."""
        try:
            while len(self._received) < wanted and not self._closed:
                data = self.socket.recv(wanted - len(self._received))
                self._received += data
                self._closed = "" if data else "closed its connection"
        except BlockingIOError:
            pass
        except OSError as error:
            self._closed = f"ended its connection ({error.strerror})"
        return len(self._received) == wanted

    def _write(self, data: bytes) -> None:
        """Sends; a fresh connection's buffer takes those few bytes whole."""
        try:
            if self.socket.send(data, socket.MSG_NOSIGNAL) < len(data):
                self._closed = "takes no more bytes"
        except OSError as error:
            self._closed = f"ended its connection ({error.strerror})"


class Call(Line):
    """This rank's call of a lower one."""

    def __init__(self, connection: socket.socket, who: str, own: Own, rank: int, kind: int) -> None:
        super().__init__(connection, who, own)
        self._rank, self._kind = rank, kind
        self._hello = own.hello(kind)
        self._write(self._hello)

    def hear(self) -> tuple[int, int] | None:
        """Reads what is there; rank and kind of the other end once it has proven itself.

        Raises:
            PeerLostError: The connection ended.
            InternalError: The other end does not have the secret, or is not who was called.
        """
        whole = self._read(HELLO.size + PROOF_BYTES)
        answer, proof = self._received[: HELLO.size], self._received[HELLO.size :]
        if not _may_begin(answer) or (whole and not self._proves(proof, answer)):
            raise InternalError(f"rank {self._rank} ({self.who}) answered without this session's secret")
        said = None
        if whole:
            _, kind = said = self._own.check(answer, self.who, range(self._rank, self._rank + 1))
            if kind != self._kind:
                raise InternalError(f"rank {self._rank} ({self.who}) took '{KINDS[self._kind]}' for '{KINDS[kind]}'")
            self._write(self._own.proof(CALLER, self._hello, answer))
        if self._closed:
            raise PeerLostError(f"rank {self._rank} ({self.who}) {self._closed} during the handshake", rank=self._rank)
        return said

    def _proves(self, proof: bytes, answer: bytes) -> bool:
        return hmac.compare_digest(proof, self._own.proof(CALLEE, self._hello, answer))


class Visitor(Line):
    """Somebody who called this rank.

    Attributes:
        host: Where from.
        since: When it was accepted, of the monotonic clock.
        until: When its time is up; not limited before the first byte: ranks that come to `bind` late are silent.
    """

    def __init__(self, connection: socket.socket, who: str, own: Own, host: str, since: float) -> None:
        super().__init__(connection, who, own)
        self.host, self.since = host, since
        self.until = float("inf")
        self._answer = b""

    def hear(self, now: float) -> tuple[int, int] | None:
        """Reads what is there, answers; rank and kind of the other end once it has proven itself.

        Raises:
            StrangerError: It cannot be a rank of this session, or its connection ended before it could show.
            InternalError: It has the secret and contradicts what this rank knows.
        """
        silent = not self._received
        whole = self._read(HELLO.size + PROOF_BYTES if self._answer else HELLO.size)
        if not _may_begin(self._received):
            raise StrangerError("it speaks another protocol")
        if whole and self._answer:
            hello, proof = self._received[: HELLO.size], self._received[HELLO.size :]
            if not hmac.compare_digest(proof, self._own.proof(CALLER, hello, self._answer)):
                raise StrangerError("it does not know this session's secret")
            return self._own.check(hello, self.who, range(self._own.rank + 1, self._own.nranks))
        if whole:
            self._answer = self._own.hello(HELLO.unpack(self._received)[3])
            self._write(self._answer + self._own.proof(CALLEE, self._received, self._answer))
            self.until = now + PROOF_S
        elif silent and self._received:
            self.until = now + HELLO_S
        if self._closed:
            raise StrangerError(f"it {self._closed} {'in the handshake' if self._received else 'without a word'}")
        return None


def _may_begin(received: bytes) -> bool:
    return received.startswith(PREFIX) or PREFIX.startswith(received)
