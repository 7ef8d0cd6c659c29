"""Builds communicators whose messages NCCL carries between GPUs: see `bootstrap`."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from collections.abc import Iterator
from typing import NamedTuple

from dpcomm import _native, nccl_library
from dpcomm.errors import ArgumentError, CommTimeoutError, PeerLostError, UnsupportedError, VersionError
from dpcomm.mesh import MeshBuilder
from dpcomm.options import Options
from dpcomm.rendezvous import Rendezvous

SHARES_GPU = "NCCL_MULTI_RANK_GPU_ENABLE"  # NCCL's own variable
SHARES_SINCE = (2, 30, 3)


class Facts(NamedTuple):
    """What ranks tell each other before they join an NCCL communicator.

    Attributes:
        version: Of NCCL, "2.32.3".
        path: Of its file.
        gpu: The GPU's UUID.
        may_share: Whether this rank's NCCL lets two ranks use one GPU.
        unique_id: Of the communicator; empty but for rank 0.
    """

    version: str
    path: str
    gpu: str
    may_share: bool
    unique_id: bytes


RECORD = struct.Struct("<16s160s48s?128s")


class NcclBuilder(MeshBuilder):
    """One rank of engine nccl under construction; see `bootstrap.Builder` for the stages.

    Args:
        meeting: Where the ranks have met.
        options: This rank's options.
        hosts: For algorithm two_level, each host's ranks, ascending; hosts by their lowest rank. Empty: without it.

    Raises:
        VersionError: There is no NCCL that can be used.
        ArgumentError: There is no such GPU; or see `MeshBuilder`.
        SystemResourceError: See `MeshBuilder`.
    """

    def __init__(self, meeting: Rendezvous, options: Options, hosts: list[list[int]]) -> None:
        self._library = nccl_library.find()
        super().__init__(meeting)
        self._options, self._two_levels = options, hosts
        self._own = self._own_facts()
        self._facts: list[Facts] = []

    def bind(self, secret: bytes, timeout_s: float) -> None:
        """Proves and checks the connections, and learns what the others have.

        Raises:
            VersionError: Ranks have different versions of NCCL.
            UnsupportedError: Two ranks use one GPU, and NCCL does not allow it.
        """
        super().bind(secret, timeout_s)
        try:
            self._facts = self._exchange(self._own, timeout_s)
        except BaseException:
            self._close_sockets()  # the others would wait for what this rank has to say
            raise
        self._check_versions()
        self._check_gpus()

    def finish(self, timeout_s: float, name: str) -> _native.Comm:
        """Joins NCCL's communicator and makes the first calls."""
        comm = _native.NcclComm(
            rank=self._meeting.rank,
            device=self._options.device,
            wish=_native.NcclWish(self._options.arena_bytes, max_ctas=self._options.max_ctas),
            pids=[hello.pid for hello in self._meeting.hellos],
            hosts=self._hosts(),
            sockets=self._hand_over(),
            two_levels=self._two_levels,
            intra_codec=_native.CODECS[self._options.intra_codec],
        )
        try:
            comm.connect(self._facts[0].unique_id, timeout_s)
            comm.verify(timeout_s, name)
        except BaseException as error:
            comm.abort(repr(error))
            comm.close(0.0)
            raise
        return comm

    def _own_facts(self) -> Facts:
        version = tuple(int(part) for part in self._library.version.split("."))
        gpus = {gpu["ordinal"]: str(gpu["uuid"]) for gpu in _native.cuda_devices()}
        if self._options.device not in gpus:
            raise ArgumentError(f"there is no GPU {self._options.device}: this process sees {len(gpus)}.")
        return Facts(
            version=self._library.version,
            path=self._library.path,
            gpu=gpus[self._options.device],
            may_share=version >= SHARES_SINCE and os.environ.get(SHARES_GPU) == "1",
            unique_id=_native.nccl_unique_id() if self._meeting.rank == 0 else b"",
        )

    def _exchange(self, own: Facts, timeout_s: float) -> list[Facts]:
        """Tells all ranks, and hears them, over the connections for headers, which are idle yet."""
        deadline = time.monotonic() + timeout_s
        record = RECORD.pack(*(field.encode() if isinstance(field, str) else field for field in own))
        facts = [own] * len(self._sockets)
        for rank, pair in enumerate(self._sockets):
            if pair is not None:
                with _borrowed(pair[1], rank) as peer:
                    peer.sendall(record)  # the first bytes: there is room for them
        for rank, pair in enumerate(self._sockets):
            if pair is not None:
                with _borrowed(pair[1], rank) as peer:
                    facts[rank] = _unpacked(self._receive(peer, rank, deadline))
        return facts

    def _receive(self, peer: socket.socket, rank: int, deadline: float) -> bytes:
        record = b""
        while len(record) < RECORD.size:
            peer.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                piece = peer.recv(RECORD.size - len(record))
            except TimeoutError:
                raise CommTimeoutError(
                    f"rank {self._meeting.rank}: rank {rank} has not said which NCCL it has", waiting_for=(rank,)
                ) from None
            if not piece:
                raise _lost(rank)
            record += piece
        return record

    def _check_versions(self) -> None:
        first = self._facts[0]
        for rank, other in enumerate(self._facts):
            if other.version != first.version:
                raise VersionError(
                    f"NCCL differs between ranks: rank 0 has {first.version} ({first.path}), rank {rank} has "
                    f"{other.version} ({other.path}). Install the same on all hosts, or name one with "
                    "DPCOMM_NCCL_LIBRARY."
                )

    def _check_gpus(self) -> None:
        users: dict[str, int] = {}
        for rank, facts in enumerate(self._facts):
            other = users.setdefault(facts.gpu, rank)
            if other != rank and not (facts.may_share and self._facts[other].may_share):
                least = ".".join(map(str, SHARES_SINCE))
                raise UnsupportedError(
                    f"ranks {other} and {rank} both use {facts.gpu}; NCCL {facts.version} refuses that. Give each rank "
                    f"a GPU of its own (torch.cuda.set_device), use engine='p2p', or set {SHARES_GPU}=1 with NCCL "
                    f"{least} or newer."
                )

    def _close_sockets(self) -> None:
        sockets, self._sockets = self._sockets, []
        for descriptor in (one for pair in sockets for one in pair or ()):
            with contextlib.suppress(OSError):
                os.close(descriptor)


@contextlib.contextmanager
def _borrowed(descriptor: int, rank: int) -> Iterator[socket.socket]:
    """A socket object over a copy of the descriptor to a rank: closing it leaves the connection alone."""
    with socket.socket(fileno=os.dup(descriptor)) as peer:
        try:
            yield peer
        except ConnectionError as error:  # what it had not read was sent for nothing
            raise _lost(rank) from error


def _lost(rank: int) -> PeerLostError:
    return PeerLostError(f"rank {rank} ended while the ranks compared their NCCL", rank=rank)


def _unpacked(record: bytes) -> Facts:
    version, path, gpu, may_share, unique_id = RECORD.unpack(record)
    texts = [field.rstrip(b"\0").decode(errors="replace") for field in (version, path, gpu)]
    return Facts(texts[0], texts[1], texts[2], may_share, unique_id)
