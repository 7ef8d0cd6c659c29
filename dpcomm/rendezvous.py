"""Ranks meet at a torch Store: publish one record per stage, read everybody's, with a deadline.

Knows records and keys; not what the stages build. Keys are never deleted or written twice:
`dpcomm/<group>/<n>/<stage>/<rank>`, where n counts the communicators this rank has begun for the group.
"""

from __future__ import annotations

import hashlib
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from dpcomm.errors import (
    AbortedError,
    CommTimeoutError,
    Error,
    InternalError,
    MismatchError,
    P2PUnavailableError,
    PeerLostError,
    SystemResourceError,
    bare_message,
    from_native,
)
from dpcomm.options import CPU, Options
from dpcomm.processors import processor_set
from dpcomm.records import PAYLOAD_BYTES, Hello, Outcome, bitmap, decode, encode, ranks_in
from dpcomm.store_calls import NoAnswerError, StoreCalls

# Second rounds, the same stages once more: for GPUs whose memory cannot be shared, with arenas in pinned host memory;
# for ranks that share no host, or want none, with an engine that goes through the network.
PINNED, NETWORK = "-pinned", "-network"
ROUND = ("allocate", "probe", "bind", "verify")
NETWORK_ROUND = tuple(name + NETWORK for name in ("allocate", "probe", "bind", "share", "verify"))
STAGES = ("hello", "validate", *ROUND, *(name + PINNED for name in ROUND), *NETWORK_ROUND)
LAST = ("verify", "verify" + PINNED, "verify" + NETWORK)
# A blocking Store.wait would ignore Ctrl-C, lock the store's client for other threads and, with TCPStore, log a
# warning when its time is up; so the store is asked again and again, at intervals that grow from 0.5 to 20 ms.
FIRST_PAUSE_S, LAST_PAUSE_S = 0.0005, 0.02
LIVENESS_PERIOD_S = 0.2
ANSWER_S = 0.5  # that the store has for each answer, the deadline past or not
# Of a hello record, what must be the same on all ranks. Time limits may differ.
COMPARED = (
    *("nranks", "group", "engine", "device", "codec", "algorithm", "bucket_cap_mb"),
    *("arena_bytes", "channels", "arena", "max_ctas", "intra_codec", "uid"),
)

T = TypeVar("T")


class Site(NamedTuple):
    """Where ranks meet.

    Attributes:
        store: A torch.distributed.Store that all ranks of the group reach.
        group: The process group; None where the user gave rank, nranks and store.
        members: What tells this group from others on the same store, equal on all its ranks.
        label: The group's name, for messages; ranks that meet compare it.
    """

    store: Any
    rank: int
    nranks: int
    members: str
    label: str
    group: Any = None


class Rendezvous:
    """One construction seen from one rank."""

    def __init__(self, site: Site, timeout_s: float) -> None:
        self.rank, self.nranks, self.store = site.rank, site.nranks, site.store
        self.hellos: list[Hello] = []
        self._timeout_s = timeout_s
        self._deadline = time.monotonic() + timeout_s
        try:
            self._calls = StoreCalls()
        except RuntimeError as error:  # no more threads
            raise SystemResourceError(
                f"rank {self.rank}: {error}. Raise the limit of processes (ulimit -u)."
            ) from error
        self._failed = False  # this rank; it has an error, and waits no longer for the store than it must
        self._next = 1  # the stage at which others would wait for this rank, if it gave up
        tag = hashlib.sha256(site.members.encode()).hexdigest()[:16]
        self.number = int(self._ask(self.store.add, f"dpcomm/{tag}/count/{self.rank}", 1))
        self._prefix = f"dpcomm/{tag}/{self.number}"

    def remaining_s(self) -> float:
        """Seconds to the deadline, at least one millisecond."""
        return max(self._deadline - time.monotonic(), 0.001)

    def key(self, name: str) -> str:
        """A prefix for keys of this construction alone."""
        return f"{self._prefix}/{name}"

    def meet(self, hello: Hello) -> None:
        """Learns who the others are, and that they want the same.

        Raises:
            MismatchError: Options differ between ranks.
            VersionError, InternalError, CommTimeoutError, PeerLostError: See `records.decode` and `_fetch`.
        """
        self._publish(0, hello)
        reference: Hello | None = None
        for rank in range(self.nranks):
            # Compared one by one: ranks that disagree on nranks would wait for somebody who never comes.
            other = decode(Hello, self._fetch(0, rank), rank)
            self.hellos.append(other)
            if other.codec:  # else its arguments were refused; its outcome of the next stage says why
                reference = reference or other
                _compare(reference, other, self.number)

    def stage(self, name: str, work: Callable[[], bytes]) -> list[bytes]:
        """Does this rank's part of a stage, then compares outcomes: all return or all raise.

        Returns:
            The payloads of all ranks.

        Raises:
            Error: On every rank that of the lowest rank that failed, of those that did not fail of another's failure.
        """
        index = STAGES.index(name)
        failure: Error | None = None
        payload = b""
        try:
            payload = work()
        except Error as error:
            failure = error
        except (OSError, RuntimeError, ValueError, TypeError, MemoryError) as error:
            failure = InternalError(f"{type(error).__name__}: {error}")
            failure.__cause__ = error
        self._failed = failure is not None
        try:
            return self._compare_outcomes(index, failure, payload)
        finally:
            failure = None  # its traceback names this frame, which would keep the store until the collector comes

    def _compare_outcomes(self, index: int, failure: Error | None, payload: bytes) -> list[bytes]:
        try:
            self._publish(index, _outcome(self.rank, index, failure, payload))
            outcomes = [decode(Outcome, self._fetch(index, rank), rank) for rank in range(self.nranks)]
        except (CommTimeoutError, PeerLostError) as silence:
            if failure is None:
                raise
            raise failure from silence  # it came first
        failed = [outcome for outcome in outcomes if outcome.code]
        if failed:
            first = min(failed, key=_follows)
            raise _joint(first) from (failure if first.rank == self.rank else None)
        for outcome in outcomes:
            if outcome.stage != index:
                raise InternalError(f"handshake from rank {outcome.rank}: stage {outcome.stage}, expected {index}")
        return [outcome.payload for outcome in outcomes]

    def begin_round(self, suffix: str) -> None:
        """Says that the stages of a round come next, all ranks having agreed on it."""
        self._next = STAGES.index(ROUND[0] + suffix)

    def give_up(self, cause: BaseException) -> None:
        """Lets ranks that come later fail at once: publishes the cause as this rank's outcome of its next stage."""
        if self._next == len(STAGES):
            return
        error = cause if isinstance(cause, Error) else from_native("ABORTED", f"{type(cause).__name__}: {cause}")
        self._failed = True
        try:
            self._publish(self._next, _outcome(self.rank, self._next, error, b""))
        except (PeerLostError, CommTimeoutError):
            return  # the store itself is gone; the cause is on its way to the user already

    def _publish(self, index: int, record: Hello | Outcome) -> None:
        self._ask(self.store.set, f"{self._prefix}/{STAGES[index]}/{self.rank}", encode(record))
        self._next = len(STAGES) if STAGES[index] in LAST else index + 1

    def _fetch(self, index: int, rank: int) -> bytes:
        """Waits for one rank's record of a stage."""
        key = f"{self._prefix}/{STAGES[index]}/{rank}"
        pause, look = FIRST_PAUSE_S, time.monotonic() + LIVENESS_PERIOD_S
        while not self._ask(self.store.check, [key]):
            now = time.monotonic()
            if now >= self._deadline:
                raise self._timed_out(index)
            if now >= look:
                self._check_alive(index, rank)
                look = now + LIVENESS_PERIOD_S
            time.sleep(min(pause, max(self._deadline - now, 0.0)))
            pause = min(2 * pause, LAST_PAUSE_S)
        return bytes(self._ask(self.store.get, key))

    def _timed_out(self, index: int) -> Error:
        stage = STAGES[index]
        keys = [f"{self._prefix}/{stage}/{rank}" for rank in range(self.nranks)]
        missing = tuple(rank for rank, key in enumerate(keys) if not self._ask(self.store.check, [key]))
        return CommTimeoutError(
            f"communicator #{self.number}: ranks {list(missing)} did not reach stage '{stage}' in "
            f"{self._timeout_s:g} s. Does every rank of the group construct it, in the same order?",
            waiting_for=missing,
        )

    def _check_alive(self, index: int, rank: int) -> None:
        """Raises PeerLostError where the awaited rank is a process we can see, and it is gone."""
        if rank >= len(self.hellos):
            return
        peer, me = self.hellos[rank], self.hellos[self.rank] if self.rank < len(self.hellos) else None
        if me is None or (peer.boot_id, peer.pid_namespace) != (me.boot_id, me.pid_namespace):
            return
        if process_start_time(peer.pid) != peer.start_time:
            raise PeerLostError(
                f"rank {rank} (pid {peer.pid}) disappeared before stage '{STAGES[index]}'; check dmesg/OOM", rank=rank
            )

    def _ask(self, call: Callable[..., T], *arguments: object) -> T:
        """One store operation; a store that cannot be reached is a lost peer (rank 0 usually hosts it)."""
        try:
            left = 0.0 if self._failed else self._deadline - time.monotonic()
            return self._calls.make(call, arguments, max(left, ANSWER_S))
        except NoAnswerError:
            raise CommTimeoutError(
                f"rank {self.rank} on {socket.gethostname()}: the torch store did not answer within the "
                f"{self._timeout_s:g} s of the construction. Is the network to the host of the store cut, or the "
                "process that keeps it stopped?"
            ) from None
        except RuntimeError as error:
            raise PeerLostError(f"the torch store failed: {error}. Has the process that hosts it ended?") from error


def hello_of(site: Site, options: Options | None) -> Hello:
    """This process's own record. Without options (they were refused) the codec is empty."""
    pid = os.getpid()
    processors, number = processor_set()
    return Hello(
        rank=site.rank,
        nranks=site.nranks,
        pid=pid,
        uid=os.getuid(),
        net_namespace=Path("/proc/self/ns/net").stat().st_ino,
        pid_namespace=Path("/proc/self/ns/pid").stat().st_ino,
        start_time=process_start_time(pid),
        boot_id=Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        hostname=socket.gethostname(),
        group=site.label,
        codec=options.codec if options else "",
        engine=options.engine if options else "",
        algorithm=options.algorithm if options else "",
        bucket_cap_mb=options.bucket_cap_mb if options else 0.0,
        arena_bytes=options.arena_bytes if options else 0,
        channels=options.channels if options else 0,
        processors=processors,
        processor_set=number,
        device="" if options is None else "cpu" if options.device == CPU else "cuda",
        arena=options.arena if options and options.device != CPU else "",
        max_ctas=options.max_ctas if options else 0,
        ordinal=options.device if options else CPU,
        intra_codec=options.intra_codec if options else "",
    )


def process_start_time(pid: int) -> int:
    """Clock ticks since boot at which a process started; 0 where it has ended (a zombie has)."""
    try:
        # After the name, which may hold spaces and parentheses: state, ppid, ... start time is the 20th from there.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] in "ZX" else int(fields[19])


def _compare(a: Hello, b: Hello, number: int) -> None:
    """Raises MismatchError for the first option in which two ranks differ."""
    for field in COMPARED:
        ours, theirs = getattr(a, field), getattr(b, field)
        if ours != theirs:
            raise MismatchError(
                f"communicator #{number}: {field}: rank {a.rank} has {ours!r}, rank {b.rank} has {theirs!r}. "
                "Construct communicators with the same options, in the same order, on all ranks."
            )


def _outcome(rank: int, index: int, failure: Error | None, payload: bytes) -> Outcome:
    if failure is None:
        assert len(payload) <= PAYLOAD_BYTES
        return Outcome(rank, index, "", 0, -1, "", payload)
    waiting = getattr(failure, "waiting_for", ())
    flags = [peer in waiting for peer in range(max(waiting, default=-1) + 1)]
    lost_rank, errno = getattr(failure, "rank", -1), getattr(failure, "errno", None) or 0
    return Outcome(rank, index, failure.code, errno, lost_rank, bare_message(failure), bitmap(flags))


def _follows(outcome: Outcome) -> int:
    """How likely a failure is to follow from another rank's: others fail where peer access between GPUs is missing, and
    ranks lose, await in vain or give up because of one that has failed."""
    if outcome.code == P2PUnavailableError.default_code:
        return 0
    followers = (PeerLostError, CommTimeoutError, AbortedError)
    return 2 if outcome.code in [error.default_code for error in followers] else 1


def _joint(outcome: Outcome) -> Error:
    """The error of the rank that failed, as every rank raises it."""
    where = STAGES[outcome.stage] if outcome.stage < len(STAGES) else str(outcome.stage)
    text = f"rank {outcome.rank}, stage '{where}': {outcome.message}"
    waiting_for = ranks_in(outcome.payload)
    return from_native(outcome.code, text, outcome.lost_rank, waiting_for, outcome.errno)
