"""Builds a communicator's native half jointly: every stage succeeds on all ranks, or all raise the same error.

hello      who is where, and wants what          (rendezvous.Rendezvous.meet)
validate   arguments were accepted everywhere
allocate   arena and listening socket exist      payload: endpoint; of rank 0 also the session secret
probe      which ranks reach which               payload: one bit a rank
bind       arenas are exchanged and mapped
verify     first calls went through
"""

from __future__ import annotations

import hashlib
import logging
import secrets
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import Store

from dpcomm import _native, environment, processors
from dpcomm.errors import ArgumentError, Error, UnsupportedError
from dpcomm.options import Options
from dpcomm.records import Hello, bitmap, ranks_in
from dpcomm.rendezvous import Rendezvous, Site, hello_of

logger = logging.getLogger("dpcomm")

ENDPOINT_BYTES = SECRET_BYTES = 32


def locate(group: Any, rank: int | None, nranks: int | None, store: Any) -> Site:
    """Finds rank, size and store of a group, or takes those that the user gave.

    Raises:
        ArgumentError: Neither a process group nor a complete rank, nranks and store; or a rank out of range.
    """
    if group is None and not (rank is None and nranks is None and store is None):
        return _own_site(rank, nranks, store)
    if rank is not None or nranks is not None or store is not None:
        raise ArgumentError("Communicator: give either a process group, or rank, nranks and store.")
    if not dist.is_initialized():
        raise ArgumentError(
            "torch.distributed has no process group. Call torch.distributed.init_process_group(...) first, or pass "
            "rank=, nranks= and store= to dpcomm.Communicator."
        )
    group = dist.group.WORLD if group is None else group
    if not isinstance(group, dist.ProcessGroup):
        raise ArgumentError(
            f"Communicator: group must be a process group that this rank belongs to, got {type(group).__name__}"
        )
    try:
        ranks = dist.get_process_group_ranks(group)
        # The store of WORLD, not the group's own: groups of the same ranks then meet at the same keys, and a different
        # order of construction shows as a different label instead of as a wait without end.
        base = dist.distributed_c10d._get_default_store()
    except (KeyError, ValueError) as error:
        raise ArgumentError(
            f"Communicator: torch.distributed does not know this group ({error}). Pass rank=, nranks= and store=."
        ) from None
    return Site(base, ranks.index(dist.get_rank()), len(ranks), f"ranks {ranks}", str(group.group_name))


def _own_site(rank: object, nranks: object, store: Any) -> Site:
    if nranks == 1 and rank is None:
        rank = 0
    if type(rank) is not int or type(nranks) is not int or not 0 <= rank < nranks:
        raise ArgumentError(f"Communicator: expected 0 <= rank < nranks, got rank={rank!r}, nranks={nranks!r}")
    if store is None and nranks > 1:
        raise ArgumentError("Communicator: rank and nranks need a store=, such as torch.distributed.TCPStore(...)")
    if store is not None and not isinstance(store, Store):
        raise ArgumentError(f"Communicator: store must be a torch.distributed.Store, got {type(store).__name__}")
    return Site(store, rank, nranks, "own", "")


def build(site: Site, options: Options | Error) -> tuple[_native.Comm, int]:
    """Builds the communicator of all ranks of a site; collective.

    Args:
        site: Where the ranks meet; has more than one.
        options: This rank's options, or why they were refused: the others learn it too.

    Returns:
        The native communicator, and its number among those of the same ranks.

    Raises:
        Error: The same on all ranks that arrived.
    """
    accepted = options if isinstance(options, Options) else None
    meeting = Rendezvous(site, accepted.timeout_s if accepted else environment.DEFAULT_TIMEOUT_S)
    try:
        meeting.meet(hello_of(site, accepted))
        meeting.stage("validate", lambda: _validate(site, options))
        assert accepted is not None  # else `validate` has raised
        return _build_shm(meeting, accepted), meeting.number
    except BaseException as cause:
        meeting.give_up(cause)
        raise


def _validate(site: Site, options: Options | Error) -> bytes:
    if isinstance(options, Error):
        raise options
    if site.nranks > _native.MAX_RANKS:
        raise UnsupportedError(f"shm engine supports at most {_native.MAX_RANKS} ranks, got {site.nranks}")
    return b""


def _build_shm(meeting: Rendezvous, options: Options) -> _native.Comm:
    rank, nranks = meeting.rank, meeting.nranks
    built: dict[str, Any] = {}

    def allocate() -> bytes:
        own = processors.share([(hello.processors, hello.processor_set) for hello in meeting.hellos])
        built["shm"] = _native.ShmBuilder(rank, nranks, processors.shm_wish(options, own), options.simd)
        return bytes(built["shm"].endpoint()) + (secrets.token_bytes(SECRET_BYTES) if rank == 0 else b"")

    payloads = meeting.stage("allocate", allocate)
    builder: _native.ShmBuilder = built["shm"]
    endpoints = [payload[:ENDPOINT_BYTES] for payload in payloads]
    secret = payloads[0][ENDPOINT_BYTES:]

    reached = meeting.stage("probe", lambda: bitmap(builder.probe(endpoints)))
    _check_reach([set(ranks_in(payload)) for payload in reached], meeting.hellos)

    def bind() -> bytes:
        try:
            builder.bind(secret, meeting.remaining_s())
        finally:
            for text in builder.warnings():
                logger.warning("rank %d: %s", rank, text)
        return b""

    def verify() -> bytes:
        built["comm"] = builder.finish(options.timeout_s, hashlib.sha256(secret).hexdigest()[:4])
        channels = built["comm"].describe()["channels"]
        if channels < options.channels:
            logger.warning(
                "rank %d: %d channels instead of %d: DPCOMM_ARENA_MB holds no more", rank, channels, options.channels
            )
        return b""

    meeting.stage("bind", bind)
    try:
        meeting.stage("verify", verify)
    except BaseException:
        if "comm" in built:
            built["comm"].close(0.0)
        raise
    comm: _native.Comm = built["comm"]
    return comm


def _check_reach(reached: list[set[int]], hellos: list[Hello]) -> None:
    """Raises, on all ranks alike, where some pair cannot share memory."""
    every = set(range(len(reached)))
    broken = [(rank, min(every - seen)) for rank, seen in enumerate(reached) if every - seen]
    if not broken:
        return
    places: dict[tuple[str, str, int], list[int]] = {}
    for hello in hellos:
        places.setdefault((hello.hostname, hello.boot_id, hello.net_namespace), []).append(hello.rank)
    where = "; ".join(
        f"ranks {ranks} on {hostname} (network namespace {namespace})"
        for (hostname, _, namespace), ranks in places.items()
    )
    raise UnsupportedError(
        f"engine shm joins processes of one host and one network namespace, but rank {broken[0][0]} cannot reach rank "
        f"{broken[0][1]}: {where}. This version has no engine between hosts; use stock DDP there."
    )
