"""Which ranks share a host: those that can pass each other a file descriptor. Names prove nothing.

    offer    listens at an abstract socket of a random name, and keeps 32 random bytes in a file without a name
    call     connects to every lower rank, and sends it that file
    answers  reads the files that higher ranks sent, and compares their bytes with what those ranks have published

All ranks finish one step before any begins the next, so nothing here waits: a connection and what was sent on it lie in
the kernel until they are read. Two containers with network namespaces of their own do not reach each other, as with
engine shm, even if they share a machine.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import struct
from collections.abc import Sequence

from dpcomm.errors import SystemResourceError

NAME_BYTES = TOKEN_BYTES = 32
RECORD = struct.Struct("<I")  # the caller's rank
CREDENTIALS = struct.Struct("iII")  # pid, uid, gid, as SO_PEERCRED has them


class Proof:
    """One rank's part.

    Raises:
        SystemResourceError: There are no descriptors left, or sockets are forbidden.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._name, self._token = secrets.token_bytes(NAME_BYTES), secrets.token_bytes(TOKEN_BYTES)
        self._calls: list[socket.socket] = []
        try:
            self._file = os.memfd_create("dpcomm-same-host")
            os.write(self._file, self._token)
            self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._listener.bind(b"\0" + self._name)
            self._listener.listen(socket.SOMAXCONN)
        except OSError as error:
            raise SystemResourceError(f"passing a descriptor: {error}", errno=error.errno or 0) from error
        self._listener.setblocking(False)

    def offer(self) -> str:
        """What the others must know, in hexadecimal digits."""
        return (self._name + self._token).hex()

    def call(self, offers: Sequence[str]) -> None:
        """Sends this rank's file to those of the lower ranks that are here."""
        for offer in offers[: self._rank]:
            peer = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            peer.setblocking(False)
            try:
                peer.connect(b"\0" + bytes.fromhex(offer)[:NAME_BYTES])
                socket.send_fds(peer, [RECORD.pack(self._rank)], [self._file])
            except OSError:  # not here, or not reached: the same for whoever wants to share memory
                peer.close()
            else:
                self._calls.append(peer)

    def answers(self, offers: Sequence[str]) -> list[int]:
        """The higher ranks whose file has come."""
        found = set()
        with contextlib.suppress(BlockingIOError):  # nobody else has called
            while True:
                caller, _ = self._listener.accept()
                with caller:
                    rank = _read(caller, offers)
                if rank is not None and rank > self._rank:
                    found.add(rank)
        return sorted(found)

    def close(self) -> None:
        """Gives everything back."""
        for one in (self._listener, *self._calls):
            one.close()
        os.close(self._file)


def _read(caller: socket.socket, offers: Sequence[str]) -> int | None:
    """The rank that sent its file on this connection; None for strangers."""
    caller.setblocking(False)
    _, uid, _ = CREDENTIALS.unpack(caller.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size))
    if uid != os.getuid():
        return None
    files: list[int] = []
    try:
        data, files, _, _ = socket.recv_fds(caller, RECORD.size, 1)
        (rank,) = RECORD.unpack(data)
        token = os.pread(files[0], TOKEN_BYTES, 0)
        return int(rank) if token == bytes.fromhex(offers[rank])[NAME_BYTES:] else None
    except (OSError, IndexError, struct.error):
        return None
    finally:
        for file in files:
            os.close(file)


def groups(nranks: int, answers: Sequence[Sequence[int]]) -> list[list[int]]:
    """The ranks of each host, ascending; hosts by their lowest rank.

    Args:
        answers: Of all ranks.
    """
    first = list(range(nranks))  # by rank: the lowest that it was seen to share a host with
    for low, callers in enumerate(answers):
        for rank in callers:
            first[rank] = min(first[rank], first[low])
    return [[rank for rank in range(nranks) if first[rank] == low] for low in range(nranks) if first[low] == low]
