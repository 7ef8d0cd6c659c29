"""What carries the messages of engines gloo and torch: a library of torch's, as csrc/carried/carrier.h wants it.

Knows addresses and byte counts; no codec, no schedule. The extension calls `exchange` and `wait` from one thread, and
`abort` and `close` from any.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.distributed as dist

from dpcomm import _native
from dpcomm.arrays import bytes_at
from dpcomm.errors import SystemResourceError

logger = logging.getLogger("dpcomm")

Transfers: TypeAlias = "list[tuple[int, int, int]]"  # peer, address, bytes
Arrival: TypeAlias = "tuple[int, int, str]"  # kind, peer or -1, the library's words

HERE: Arrival = (_native.ARRIVALS["here"], -1, "")
ABORTED: Arrival = (_native.ARRIVALS["broken"], -1, "aborted")
# Tags tell messages apart that are on their way at once; none of them is ever awaited as LAST_TAG is.
TAGS = 1 << 20
LAST_TAG = 2**31 - 1
CARRIER_THREADS = ("dpcomm-calls", "dpcomm-abort")
PACE_BYTES = 16 << 20  # of which gloo's own all-reduce moves as many within a time limit, or stands still
END_S = 2.0  # for what was aborted
FOREVER_S = 3600.0  # of one wait; there is always another


class Carrier:
    """What both have in common: two threads, which end with the communicator. See csrc/carried/carrier.h for the rest.

    One thread runs the communicator's calls: they come back into Python, which threads of the extension's own must not.
    The other waits for a failure, and then ends what the first one may be waiting for.
    """

    def __init__(self) -> None:
        self._threads: list[threading.Thread] = []

    def connect(self, group: Any) -> None:
        """Takes the library's group, which nobody else uses."""
        raise NotImplementedError

    def exchange(self, ticket: int, sends: Transfers, receives: Transfers) -> None:
        """Starts an exchange."""
        raise NotImplementedError

    def adds(self, dtype: str) -> bool:
        """Whether `add` serves a dtype."""
        raise NotImplementedError

    def add(self, ticket: int, ranges: Transfers, dtype: str) -> None:
        """Starts the library's own all-reduce of each range, in place."""
        raise NotImplementedError

    def wait(self, ticket: int, timeout_s: float) -> Arrival:
        """Waits for what was started with a ticket."""
        raise NotImplementedError

    def abort(self) -> None:
        """Ends what is in flight; when it returns no memory but the carrier's own is touched. Any thread."""
        raise NotImplementedError

    def close(self) -> None:
        """Waits for the threads: one that came back to an interpreter that shuts down would end the process."""
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(END_S)

    def end_on_failure(self, comm: _native.CarriedComm) -> None:
        """Starts the thread that waits for a failure."""

        def run() -> None:
            while not comm.closed:
                if comm.wait_failed(FOREVER_S):
                    self.abort()
                    break

        self._start(run, CARRIER_THREADS[1])

    def serve(self, comm: _native.CarriedComm) -> None:
        """Starts the thread that runs the calls."""
        self._start(comm.serve, CARRIER_THREADS[0])

    def _start(self, run: Callable[[], None], name: str) -> None:
        thread = threading.Thread(target=run, name=name, daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            raise SystemResourceError(f"{error}. Raise the limit of processes (ulimit -u).") from error
        self._threads.append(thread)


class GlooGroups(NamedTuple):
    """Two gloo process groups of the same ranks: messages to higher ranks, and to lower ones.

    On one connection gloo's own thread, to which a message comes, spins as long as another thread sends one
    (docs/performance.md).
    """

    up: Any
    down: Any


def gloo_groups(store: Any, rank: int, nranks: int, host: str, timeout_s: float) -> GlooGroups:
    """Connects the groups from a store alone: dist.new_group would be collective over the whole world.

    Args:
        store, rank, nranks: Where the ranks meet; keys of the store are used by nobody else.
        host: This host's address, in digits.
        timeout_s: For the connections to be made.
    """
    from torch._C._distributed_c10d import PrefixStore, ProcessGroupGloo  # not every torch has the second

    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [ProcessGroupGloo.create_device(hostname=host)]
    options._timeout = timedelta(seconds=timeout_s)
    options._threads = 2  # for `add`: as many pieces at once
    up, down = (ProcessGroupGloo(PrefixStore(name, store), rank, nranks, options) for name in GlooGroups._fields)
    return GlooGroups(up, down)


class GlooCarrier(Carrier):
    """gloo process groups of dpcomm's own: a message is a send and a receive of memory as it lies."""

    def __init__(self) -> None:
        super().__init__()
        self._groups: GlooGroups | None = None
        self._rank = -1
        self._sent: list[int] = []  # messages, by peer: the next one's tag, which the peer counts alike
        self._received: list[int] = []
        self._works: dict[int, list[tuple[int, Any, int]]] = {}  # peer, work, how many time limits it has
        self._adding: list[Any] = []  # of the last add()
        self._aborting = threading.Lock()
        self._aborted = self._left = False

    def connect(self, group: Any) -> None:
        """Takes the groups, which nobody else uses."""
        self._groups, self._rank = group, group.up.rank()
        self._sent, self._received = [0] * group.up.size(), [0] * group.up.size()

    def exchange(self, ticket: int, sends: Transfers, receives: Transfers) -> None:
        """Starts the receives first: gloo sends what is asked for already without asking back."""
        groups, rank = self._groups, self._rank
        assert groups is not None
        if self._aborted:  # connections that are closed swallow what is given to them, without an error
            return
        works = self._works[ticket] = []
        for peer, address, count in receives:
            group = groups.up if peer < rank else groups.down
            works.append((peer, group.recv([bytes_at(address, count)], peer, self._received[peer] % TAGS), 1))
            self._received[peer] += 1
        for peer, address, count in sends:
            group = groups.up if peer > rank else groups.down
            works.append((peer, group.send([bytes_at(address, count)], peer, self._sent[peer] % TAGS), 1))
            self._sent[peer] += 1

    def adds(self, dtype: str) -> bool:
        """gloo's ring adds in the type itself, so 16-bit floats would be rounded at each rank."""
        return dtype in ("float32", "float64")

    def add(self, ticket: int, ranges: Transfers, dtype: str) -> None:
        """Starts an all-reduce for each range; they run on the group's own threads."""
        works = self._works[ticket] = []
        adding = self._adding = list[Any]()  # seen by abort() from the first piece on
        if self._aborted:
            return
        assert self._groups is not None
        for peer, address, count in ranges:
            values = bytes_at(address, count).view(getattr(torch, dtype))
            work = self._groups.up.allreduce([values])
            adding.append(work)
            # Two share the line. Within them gloo itself has the limit, for each message.
            works.append((peer, work, max(1, -(-2 * count // PACE_BYTES))))

    def wait(self, ticket: int, timeout_s: float) -> Arrival:
        """When gloo's own time is up it closes all connections of a group: then what is in flight there has ended."""
        for peer, work, limits in self._works.pop(ticket, ()):
            if self._aborted:
                break
            began = time.monotonic()
            try:
                work.wait(timedelta(seconds=limits * timeout_s))
            except RuntimeError as error:
                if "timed out" in str(error).lower() or time.monotonic() - began >= limits * timeout_s:
                    return _native.ARRIVALS["late"], peer, ""
                return _native.ARRIVALS["broken"], peer, str(error)
        return ABORTED if self._aborted else HERE

    def abort(self) -> None:
        """Waits a moment for messages that nobody sends: the only way to make gloo end what is in flight.

        On that gloo closes a group's connections to all peers, which ends every receive and send of the group with an
        error and leaves their memory alone. A closed connection says so at once, and the next peer's is tried.
        """
        with self._aborting:
            if not self._aborted:
                self._aborted = True
                self._close_connections()
        # A thread of gloo's that adds up meets the closed connection with its next message. Whoever aborts waits for
        # that, also the second: it hands the memory back.
        until = time.monotonic() + END_S
        while unfinished := sum(not work.is_completed() for work in self._adding):
            if time.monotonic() >= until:
                return self._leave(unfinished)
            time.sleep(1e-3)
        return None

    def _leave(self, unfinished: int) -> None:
        """Says once that memory goes back to its owner although gloo has not let go of it."""
        with self._aborting:
            if self._left:
                return
            self._left = True
        _abandoned.append((self._groups, self._adding))
        logger.warning(
            "rank %d: %d of gloo's own all-reduces have not ended %g s after the communicator failed, and may still "
            "write to the tensors of that call. Keep those tensors, without using them, and end this process as soon "
            "as you can; if it happens again, algorithm='direct' does without gloo's own all-reduce.",
            self._rank,
            unfinished,
            END_S,
        )

    def _close_connections(self) -> None:
        nothing = torch.empty(1, dtype=torch.uint8)
        for group in self._groups or ():
            for peer in (rank for rank in range(group.size()) if rank != self._rank):
                with contextlib.suppress(RuntimeError):
                    group.recv([nothing], peer, LAST_TAG).wait(timedelta(milliseconds=1))

    def close(self) -> None:
        """Lets go of the groups; their destructors close the connections."""
        super().close()
        self._works.clear()
        self._adding = []
        self._groups = None


class TorchCarrier(Carrier):
    """Any backend that moves uint8 tensors all-to-all. Messages are copied into tensors on its device and out of them.

    The group is asked again and again whether an exchange is complete, never waited for: an error on another rank can
    then end a call although the backend knows no way to end what is in flight. The copies are used again, so they take
    no more than what is in flight at once, which is no more than the slots.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._group: dist.ProcessGroup | None = None
        self._device = device
        self._started: dict[int, tuple[Any, torch.Tensor, torch.Tensor, Transfers]] = {}
        self._spare: list[torch.Tensor] = []  # staging of exchanges that are over
        self._aborted = threading.Event()

    def connect(self, group: Any) -> None:
        """Takes the group, which nobody else uses."""
        self._group = group

    def exchange(self, ticket: int, sends: Transfers, receives: Transfers) -> None:
        """Copies what is sent at once."""
        group = self._group
        assert group is not None
        out, out_counts = self._staging(sends, group.size())
        at = 0
        for _, address, count in sorted(sends):
            out[at : at + count].copy_(bytes_at(address, count))
            at += count
        into, in_counts = self._staging(receives, group.size())
        work = group.alltoall_base(into[: sum(in_counts)], out[: sum(out_counts)], in_counts, out_counts)
        self._started[ticket] = (work, out, into, receives)

    def adds(self, dtype: str) -> bool:
        """Never: it would work on user memory, and could not be stopped."""
        return False

    def wait(self, ticket: int, timeout_s: float) -> Arrival:
        """Copies what was received, unless the exchange was aborted meanwhile."""
        work, out, into, receives = self._started[ticket]
        deadline, pause = time.monotonic() + timeout_s, 20e-6
        while not work.is_completed():
            if self._aborted.is_set():
                return ABORTED
            if time.monotonic() > deadline:
                return _native.ARRIVALS["late"], -1, ""
            time.sleep(pause)
            pause = min(2 * pause, 1e-3)
        try:
            work.wait()
        except RuntimeError as error:
            return _native.ARRIVALS["broken"], -1, str(error)
        del self._started[ticket]
        at = 0
        for _, address, count in sorted(receives):
            bytes_at(address, count).copy_(into[at : at + count])
            at += count
        self._spare += [out, into]
        return HERE

    def abort(self) -> None:
        """Nothing but our own tensors is in flight; they live as long as the group works on them."""
        self._aborted.set()
        if self._started:
            _abandoned.append((self._group, dict(self._started)))

    def close(self) -> None:
        """Lets go of the group, of which nobody else knows, unless its backend may still be at work for it."""
        super().close()
        self._started, self._spare = {}, []
        group, self._group = self._group, None
        if group is not None and not self._aborted.is_set():
            with contextlib.suppress(RuntimeError):  # not every backend has it
                group.shutdown()

    def _staging(self, transfers: Transfers, nranks: int) -> tuple[torch.Tensor, list[int]]:
        """Memory for the messages, or more; and how many bytes of it belong to each rank."""
        counts = [0] * nranks
        for peer, _, count in transfers:
            counts[peer] = count
        # One that is too small is let go of: sizes differ between calls, not within one.
        spare = self._spare.pop() if self._spare else None
        if spare is None or spare.numel() < sum(counts):
            spare = torch.empty(sum(counts), dtype=torch.uint8, device=self._device)
        return spare, counts


# What backends without a way to stop may still write to, and their groups, whose destructors may wait for that.
_abandoned: list[Any] = []
