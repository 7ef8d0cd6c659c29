"""Which ranks share memory, from who has reached whom. Knows records of ranks, no sockets."""

from __future__ import annotations

from collections.abc import Sequence

from dpcomm import same_host
from dpcomm.errors import UnsupportedError
from dpcomm.records import Hello, hosts_as_said


class CannotShareError(UnsupportedError):
    """Ranks that share no memory, on all ranks alike.

    Attributes:
        where: Which rank is on which host.
        apart: Two ranks that share none.
        hosts: The ranks of each host, ascending; hosts by their lowest rank.
    """

    def __init__(
        self, message: str, where: str = "", apart: tuple[int, int] | None = None, hosts: Sequence[list[int]] = ()
    ) -> None:
        super().__init__(message)
        self.where, self.apart, self.hosts = where, apart, list(hosts)


def check_reach(engine: str, wants_hosts: bool, reached: list[set[int]], hellos: list[Hello]) -> None:
    """Refuses an engine of one host where ranks are on several.

    Args:
        engine: That is being made.
        wants_hosts: For two levels: the ranks of each host are all that is wanted.
        reached: Of each rank, which lower ranks it has reached; itself and higher ones count as reached.
        hellos: Of all ranks, to say who is where.

    Raises:
        CannotShareError: On all ranks alike.
    """
    every = set(range(len(reached)))
    broken = [(rank, min(every - seen)) for rank, seen in enumerate(reached) if every - seen]
    if wants_hosts:
        raise CannotShareError("", hosts=hosts_of(reached))
    if not broken:
        return
    said = [(ranks, hellos[ranks[0]]) for ranks in hosts_as_said(hellos)]
    where = "; ".join(f"ranks {ranks} on {one.hostname} (network namespace {one.net_namespace})" for ranks, one in said)
    other = "'nccl'" if engine == "p2p" else "'gloo', for data on CPU"
    raise CannotShareError(
        f"engine {engine} joins processes of one host and one network namespace, but rank {broken[0][0]} cannot reach "
        f"rank {broken[0][1]}: {where}. Use engine='auto' or {other}.",
        where,
        broken[0],
        hosts_of(reached),
    )


def hosts_of(reached: list[set[int]]) -> list[list[int]]:
    """The ranks of each host: those that reached each other. `reached` as for `check_reach`.

    Where that is no such relation (a rank reaches two that do not reach each other), the hosts are smaller, down to one
    rank each; all ranks of each have reached each other.
    """
    nranks = len(reached)
    hosts = same_host.groups(
        nranks, [[rank for rank in range(low + 1, nranks) if low in reached[rank]] for low in range(nranks)]
    )
    whole = all(low in reached[rank] for ranks in hosts for rank in ranks for low in ranks if low < rank)
    return hosts if whole else [[rank] for rank in range(nranks)]
