"""Builds communicators of engine two_level: shared memory inside hosts, gloo between them. See `bootstrap`."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from dpcomm import _native, processors
from dpcomm.carried import CarriedBuilder
from dpcomm.errors import PeerLostError, UnsupportedError
from dpcomm.network import ENDPOINT
from dpcomm.options import Options
from dpcomm.rendezvous import Rendezvous

logger = logging.getLogger("dpcomm")

INSIDE_PART = 4  # of a rank's memory a fourth is shared with its host; the rest holds messages between hosts


class TwoLevelBuilder(CarriedBuilder):
    """One rank under construction; see `bootstrap.Builder` for the stages.

    The ranks of a host prove that they share it: each passes the others a descriptor of its memory, which they map.

    Args:
        meeting: Where the ranks have met.
        options: This rank's options.
        hosts: The ranks of each host, ascending; hosts by their lowest rank.

    Raises:
        ArgumentError, SystemResourceError: As for `MeshBuilder`, or the memory cannot be had.
    """

    def __init__(self, meeting: Rendezvous, options: Options, hosts: list[list[int]]) -> None:
        super().__init__(meeting, options, "two_level", None)
        self._ranks = next(ranks for ranks in hosts if meeting.rank in ranks)
        own = processors.share([(meeting.hellos[r].processors, meeting.hellos[r].processor_set) for r in self._ranks])
        plain = options._replace(arena_bytes=options.arena_bytes // INSIDE_PART, channels=1)
        wish = processors.shm_wish(plain, own)
        here = self._ranks.index(meeting.rank)
        self._inside: _native.ShmBuilder | None = _native.ShmBuilder(here, len(self._ranks), wish, options.simd)
        self._ranks_of_hosts = hosts

    def endpoint(self) -> bytes:
        """Where this rank listens: for all, then for the ranks of its host."""
        assert self._inside is not None
        return super().endpoint() + self._inside.endpoint()

    def probe(self, endpoints: list[bytes]) -> list[bool]:
        """Connects to the lower ranks, and to those of this host once more."""
        assert self._inside is not None
        reached = super().probe([endpoint[: ENDPOINT.size] for endpoint in endpoints])
        here = self._inside.probe([endpoints[rank][ENDPOINT.size :] for rank in self._ranks])
        if not all(here):
            rank = self._ranks[here.index(False)]
            raise PeerLostError(f"rank {rank} listens no longer, on the host of rank {self._meeting.rank}", rank=rank)
        return reached

    def share(self, secret: bytes, timeout_s: float) -> None:
        """Shares memory inside the host, and takes the rest.

        A stage of its own, behind `bind`: a rank that failed there would keep those waiting that wait for it in here.
        """
        assert self._inside is not None
        try:
            self._inside.bind(secret, timeout_s)
            self._made = self._make(self._inside, self._ranks_of_hosts)
        finally:
            for text in self._inside.warnings():
                logger.warning("rank %d: %s", self._meeting.rank, text)
            self._inside = None  # hangs up: others of this host need not wait for a rank that has failed


def check_hosts(hosts: Sequence[Sequence[int]]) -> None:
    """Refuses what needs no two levels.

    Raises:
        UnsupportedError: All ranks share one host, or no two do.
    """
    if len(hosts) == 1:
        raise UnsupportedError(
            "two levels are for several hosts, but all ranks share one. Use engine='auto' and algorithm='auto'."
        )
    if all(len(ranks) == 1 for ranks in hosts):
        raise UnsupportedError(
            f"two levels need ranks that share a host, but the {len(hosts)} ranks are on a host each (or cannot pass "
            "each other file descriptors: another network namespace, another container). Use engine='auto' and "
            "algorithm='auto'."
        )
