"""One rank under construction whose peers are reached over the network: sockets of dpcomm's own to all of them.

They carry the control plane (csrc/host/control_plane.h) and the headers of calls. What carries the payload is the
business of the classes that build on this one.
"""

from __future__ import annotations

import os
from typing import Any

from torch._C._distributed_c10d import PrefixStore

from dpcomm.addresses import Address, own_address
from dpcomm.errors import PeerLostError
from dpcomm.network import Meeting
from dpcomm.rendezvous import Rendezvous

SOCKETS_CLOSED = (-1, -1)  # of this rank itself


class MeshBuilder:
    """The stages `allocate` to `share` of an engine between hosts; see `bootstrap.Builder`.

    Args:
        meeting: Where the ranks have met.

    Raises:
        ArgumentError: GLOO_SOCKET_IFNAME names no interface of this host.
        SystemResourceError: This host does not let us listen.
    """

    def __init__(self, meeting: Rendezvous) -> None:
        self._meeting = meeting
        self._address: Address = own_address(store_host(meeting.store))
        self._mesh = Meeting(meeting.rank, meeting.nranks, self._address)
        self._sockets: list[tuple[int, int] | None] = []

    def __del__(self) -> None:
        """Closes what a construction that failed before `finish` leaves open."""
        for pair in getattr(self, "_sockets", []):
            for descriptor in pair or ():
                os.close(descriptor)
        if mesh := getattr(self, "_mesh", None):
            mesh.close()

    def endpoint(self) -> bytes:
        """Where this rank listens."""
        return self._mesh.endpoint()

    def probe(self, endpoints: list[bytes]) -> list[bool]:
        """Connects to the lower ranks.

        Raises:
            PeerLostError: One of them cannot be reached.
        """
        reached = self._mesh.probe(endpoints, self._meeting.remaining_s())
        for rank, reason in sorted(self._mesh.reasons.items()):
            mine, theirs = (self._meeting.hellos[r].hostname for r in (self._meeting.rank, rank))
            raise PeerLostError(
                f"rank {self._meeting.rank} on {mine} cannot connect to rank {rank} on {theirs} at {reason}. Ranks "
                f"connect to each other at ports that the system chooses; this rank's own address is "
                f"{self._address.host} ({self._address.why}). Open the ports between the hosts, or set "
                "GLOO_SOCKET_IFNAME to the interface that reaches the others",
                rank=rank,
            )
        return reached

    def bind(self, secret: bytes, timeout_s: float) -> None:
        """Proves and checks the connections."""
        self._sockets = self._mesh.bind(secret, timeout_s)

    def share(self, secret: bytes, timeout_s: float) -> None:
        """Takes memory, where an engine does not take it later. All connections are proven, on all ranks."""

    def warnings(self) -> list[str]:
        """About strangers that called."""
        return self._mesh.warnings()

    def _hosts(self) -> list[str]:
        """By rank: the host's name; empty where its process numbers mean something here."""
        hellos, me = self._meeting.hellos, self._meeting.hellos[self._meeting.rank]
        return ["" if _sees(me, hello) else hello.hostname for hello in hellos]

    def _hand_over(self) -> list[tuple[int, int]]:
        """The descriptors of all connections, by rank. From here on the extension closes them, however this ends."""
        sockets = [pair if pair is not None else SOCKETS_CLOSED for pair in self._sockets]
        self._sockets = []
        return sockets


def store_host(store: Any) -> str | None:
    """The host of a TCPStore, behind prefixes or not; None for other stores."""
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    host = getattr(store, "host", None)
    return str(host) if host else None


def _sees(me: Any, peer: Any) -> bool:
    """Whether a peer's process number means something here."""
    return (me.boot_id, me.pid_namespace) == (peer.boot_id, peer.pid_namespace)
