"""Builds a communicator's native half jointly: every stage succeeds on all ranks, or all raise the same error.

hello      who is where, and wants what          (rendezvous.Rendezvous.meet)
validate   arguments were accepted everywhere    payload of engine p2p: how many CTAs this rank may use, two bytes
allocate   arena and listening socket exist      payload: endpoint; of rank 0 also the session secret
probe      which ranks reach which               payload: one bit a rank
bind       arenas are exchanged and mapped
verify     first calls went through

Where GPUs do not reach each other's memory, the last four come once more, as "allocate-pinned" and so on; where ranks
share no host, as "allocate-network" and so on, with a stage between the last two:

share-network   memory is taken, and shared inside each host
"""

from __future__ import annotations

import hashlib
import logging
import secrets
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch.distributed as dist
from torch._C._distributed_c10d import Store

from dpcomm import _native, chosen, environment, groups, processors
from dpcomm.carried import CarriedBuilder
from dpcomm.errors import ArgumentError, Error, P2PUnavailableError, UnsupportedError, bare_message
from dpcomm.mesh import MeshBuilder
from dpcomm.nccl import NcclBuilder
from dpcomm.options import Options
from dpcomm.reach import CannotShareError, check_reach
from dpcomm.records import bitmap, ranks_in
from dpcomm.rendezvous import NETWORK, PINNED, Rendezvous, Site, hello_of
from dpcomm.two_level import TwoLevelBuilder, check_hosts

logger = logging.getLogger("dpcomm")

SECRET_BYTES = 32
CHANNELS_BYTES = 2


def locate(group: Any, rank: int | None, nranks: int | None, store: Any) -> Site:
    """Finds rank, size and store of a group, or takes those that the user gave.

    Raises:
        ArgumentError: Neither a process group or mesh nor a complete rank, nranks and store; or a rank out of range.
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
    group = dist.group.WORLD if group is None else groups.process_group(group)
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
    return Site(base, ranks.index(dist.get_rank()), len(ranks), f"ranks {ranks}", str(group.group_name), group)


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


class Built(NamedTuple):
    """A communicator's native half.

    Attributes:
        engine: Its engine.
        why: Why that engine serves, in words.
        apart: Two ranks that share no memory, where that decided.
    """

    comm: _native.Comm
    engine: str
    why: str
    apart: tuple[int, int] | None = None


def one_host(where: str) -> str:
    """Why an engine of one host serves, unless it was asked for."""
    return f"all ranks share one host and their data is on {where}"


def build(site: Site, options: Options | Error) -> Built:
    """Builds the communicator of all ranks of a site; collective.

    Args:
        site: Where the ranks meet; has more than one.
        options: This rank's options, or why they were refused: the others learn it too.

    Raises:
        Error: The same on all ranks that arrived.
    """
    accepted = options if isinstance(options, Options) else None
    meeting = Rendezvous(site, accepted.timeout_s if accepted else environment.DEFAULT_TIMEOUT_S)
    try:
        meeting.meet(hello_of(site, accepted))
        payloads = meeting.stage("validate", lambda: _validate(meeting, options))
        assert accepted is not None  # else `validate` has raised
        built = _build_serving(meeting, accepted, payloads, site.group)
    except BaseException as cause:
        meeting.give_up(cause)
        if isinstance(cause, CannotShareError):  # a name of ours alone
            raise UnsupportedError(str(cause)) from None
        raise
    if meeting.rank == 0:
        hosts = _proven_hosts(built, meeting.nranks)
        logger.info("%s", chosen.line(meeting.number, meeting.hellos, built.engine, built.why, built.apart, hosts))
    return built


def _proven_hosts(built: Built, nranks: int) -> Sequence[Sequence[int]]:
    """The ranks of each host, if the engine had to know."""
    if built.engine in ("shm", "p2p"):
        return [range(nranks)]
    found: Any = built.comm.describe().get("hosts", ())
    hosts: Sequence[Sequence[int]] = found
    return hosts


def _build_serving(meeting: Rendezvous, options: Options, payloads: list[bytes], group: Any) -> Built:
    """With the engine to try, or the one that takes its place. `payloads`: of stage `validate`."""
    asked_so = options.algorithm in ("native", "two_level")
    why = "asked for" if options.engine != "auto" else f"algorithm {options.algorithm}" if asked_so else ""
    if options.serving in ("gloo", "torch"):
        return _build_carried(meeting, options, options.serving, group, why)
    if options.serving == "nccl":
        return _build_nccl(meeting, options, why, _hosts_of(meeting, options))
    if options.serving == "p2p":
        channels = min(int.from_bytes(payload, "little") for payload in payloads)
        return _build_on_gpu(meeting, options, channels, why)
    return _build_on_cpu(meeting, options, group, why)


def _validate(meeting: Rendezvous, options: Options | Error) -> bytes:
    if isinstance(options, Error):
        raise options
    if meeting.nranks > _native.MAX_RANKS:
        raise UnsupportedError(
            f"{options.serving} engine supports at most {_native.MAX_RANKS} ranks, got {meeting.nranks}"
        )
    if options.serving != "p2p":
        return b""
    places = [(hello.boot_id, hello.pid_namespace, hello.pid, hello.ordinal) for hello in meeting.hellos]
    ranks_here = places.count(places[meeting.rank])
    channels = _native.p2p_channels(options.device, ranks_here, p2p_wish(options, options.arena == "pinned"))
    return channels.to_bytes(CHANNELS_BYTES, "little")


def p2p_wish(options: Options, pinned: bool) -> _native.P2pWish:
    """What to ask the p2p engine for."""
    return _native.P2pWish(options.arena_bytes, max_ctas=options.max_ctas, pinned=pinned)


def _build_on_cpu(meeting: Rendezvous, options: Options, group: Any, why: str) -> Built:
    """Engine shm; where ranks share no host, and may have another, two_level or gloo."""
    two_level = options.wants_hosts
    try:
        return Built(_build_shm(meeting, options), "shm", why or one_host("CPU"))
    except CannotShareError as error:
        if options.engine != "auto" and not two_level:
            raise
        why, apart, hosts = why or f"no shared memory: {error.where}", error.apart, error.hosts
    if two_level:
        check_hosts(hosts)
    if any(len(ranks) > 1 for ranks in hosts):
        return _build_two_level(meeting, options, hosts, why)._replace(apart=None if two_level else apart)
    return _build_carried(meeting, options, "gloo", group, why)._replace(apart=apart)


def _build_two_level(meeting: Rendezvous, options: Options, hosts: list[list[int]], why: str) -> Built:
    meeting.begin_round(NETWORK)
    comm = _build(meeting, options, lambda: TwoLevelBuilder(meeting, options, hosts), NETWORK)
    return Built(comm, "two_level", why)


def _build_on_gpu(meeting: Rendezvous, options: Options, channels: int, why: str) -> Built:
    """Engine p2p; where ranks share no host, and may have another, nccl."""
    try:
        return Built(_build_p2p(meeting, options, channels), "p2p", why or one_host("CUDA devices"))
    except CannotShareError as error:
        if options.engine != "auto":
            raise
        why, apart = f"no shared memory: {error.where}", error.apart
    return _build_nccl(meeting, options, why, [])._replace(apart=apart)


def _build_nccl(meeting: Rendezvous, options: Options, why: str, hosts: list[list[int]]) -> Built:
    meeting.begin_round(NETWORK)
    return Built(_build(meeting, options, lambda: NcclBuilder(meeting, options, hosts), NETWORK), "nccl", why)


def _hosts_of(meeting: Rendezvous, options: Options) -> list[list[int]]:
    """Which ranks share a host, for two levels between GPUs: who has reached whose abstract socket, which is what
    engines of one host pass descriptors through; empty where not asked."""
    if not options.wants_hosts:
        return []
    try:
        _build_shm(meeting, options)
    except CannotShareError as error:
        check_hosts(error.hosts)
        return error.hosts
    raise AssertionError("check_reach() always says where ranks are, if that is wanted")


def _build_carried(meeting: Rendezvous, options: Options, engine: str, group: Any, why: str) -> Built:
    meeting.begin_round(NETWORK)
    comm = _build(meeting, options, lambda: CarriedBuilder(meeting, options, engine, group), NETWORK)
    return Built(comm, engine, why)


def _build_shm(meeting: Rendezvous, options: Options) -> _native.Comm:
    def begin() -> _native.ShmBuilder:
        own = processors.share([(hello.processors, hello.processor_set) for hello in meeting.hellos])
        return _native.ShmBuilder(meeting.rank, meeting.nranks, processors.shm_wish(options, own), options.simd)

    comm = _build(meeting, options, begin)
    channels = comm.describe()["channels"]
    if isinstance(channels, int) and channels < options.channels:
        logger.warning(
            "rank %d: %d channels instead of %d: DPCOMM_ARENA_MB holds no more",
            meeting.rank,
            channels,
            options.channels,
        )
    return comm


def _build_p2p(meeting: Rendezvous, options: Options, channels: int) -> _native.Comm:
    """With arenas in device memory; where that does not work, and may be otherwise, in pinned host memory."""

    def begin(pinned: bool) -> _native.P2pBuilder:
        wish = p2p_wish(options, pinned)
        return _native.P2pBuilder(meeting.rank, meeting.nranks, options.device, wish, channels)

    if options.arena != "pinned":
        try:
            return _build(meeting, options, lambda: begin(pinned=False))
        except P2PUnavailableError as error:
            if options.arena == "device":
                raise
            if meeting.rank == 0:
                gpus = ", ".join(f"rank {h.rank} on {h.hostname} cuda:{h.ordinal}" for h in meeting.hellos)
                warn_pinned(f"communicator #{meeting.number}", error, gpus)
        # Outside of the handler: the exception's frames would keep the first round's arena.
        meeting.begin_round(PINNED)
        return _build(meeting, options, lambda: begin(pinned=True), PINNED)
    return _build(meeting, options, lambda: begin(pinned=True))


def warn_pinned(who: str, error: P2PUnavailableError, gpus: str) -> None:
    """The one line that says that GPUs exchange through host memory, and why."""
    logger.warning(
        "%s: peer-to-peer memory does not work (%s) between %s. ACS/IOMMU? Pinned host memory is used instead, "
        "which is slower; DPCOMM_P2P_ARENA=pinned chooses it without trying, =device makes this an error.",
        who,
        bare_message(error),
        gpus,
    )


class Builder(Protocol):
    """One rank under construction: what the engines' builders have in common."""

    def endpoint(self) -> bytes: ...
    def probe(self, endpoints: list[bytes]) -> list[bool]: ...
    def bind(self, secret: bytes, timeout_s: float) -> None: ...
    def warnings(self) -> list[str]: ...
    def finish(self, timeout_s: float, name: str) -> _native.Comm: ...


def _build(meeting: Rendezvous, options: Options, begin: Callable[[], Builder], suffix: str = "") -> _native.Comm:
    """The stages from `allocate` to `verify`; `begin` makes this rank's builder. `suffix`: of the stages' names."""
    rank = meeting.rank
    # What tracebacks of a failed round hold on to are these lists; they are emptied, so that its arena goes at once.
    builders: list[Builder] = []
    comms: list[_native.Comm] = []

    def allocate() -> bytes:
        builders.append(begin())
        return bytes(builders[0].endpoint()) + (secrets.token_bytes(SECRET_BYTES) if rank == 0 else b"")

    def bind() -> bytes:
        try:
            builders[0].bind(secret, meeting.remaining_s())
        finally:
            for text in builders[0].warnings():
                logger.warning("rank %d: %s", rank, text)
        return b""

    def share() -> bytes:
        builder = builders[0]
        assert isinstance(builder, MeshBuilder)
        builder.share(secret, meeting.remaining_s())
        return b""

    def verify() -> bytes:
        comms.append(builders[0].finish(options.timeout_s, hashlib.sha256(secret).hexdigest()[:4]))
        return b""

    try:
        payloads = meeting.stage("allocate" + suffix, allocate)
        secret = payloads[0][-SECRET_BYTES:]
        endpoints = [payloads[0][:-SECRET_BYTES], *payloads[1:]]
        reached = meeting.stage("probe" + suffix, lambda: bitmap(builders[0].probe(endpoints)))
        if suffix != NETWORK:
            check_reach(
                options.serving, options.wants_hosts, [set(ranks_in(payload)) for payload in reached], meeting.hellos
            )
        meeting.stage("bind" + suffix, bind)
        if suffix == NETWORK:
            meeting.stage("share" + suffix, share)
        meeting.stage("verify" + suffix, verify)
        return comms[0]
    except BaseException:
        for comm in comms:
            comm.close(0.0)
        comms.clear()
        raise
    finally:
        builders.clear()
