"""Builds communicators whose messages are carried by gloo, or by any backend of torch.distributed: see `bootstrap`."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, _unregister_process_group

from dpcomm import _native, carriers
from dpcomm.errors import ArgumentError, CommTimeoutError, Error, InternalError, UnsupportedError
from dpcomm.mesh import MeshBuilder
from dpcomm.options import Options, engine_reason
from dpcomm.rendezvous import Rendezvous

LOOK_S = 0.05  # how often the wait for torch's own connections looks for failures
END_S = 1.0  # for a call to end after a failure
LATE_END_S = 0.2  # for it to end once the time of the construction is over


class CarriedBuilder(MeshBuilder):
    """One rank of an engine between hosts under construction; see `bootstrap.Builder` for the stages.

    Args:
        meeting: Where the ranks have met.
        options: This rank's options.
        engine: "gloo", "torch" or "two_level".
        group: The user's process group; None where there is none.

    Raises:
        ArgumentError: GLOO_SOCKET_IFNAME names no interface of this host; or engine torch has no process group.
        UnsupportedError: torch has no gloo.
        SystemResourceError: This host does not let us listen.
    """

    def __init__(self, meeting: Rendezvous, options: Options, engine: str, group: dist.ProcessGroup | None) -> None:
        if engine == "torch" and group is None:
            raise ArgumentError(
                "engine='torch' needs a process group to move messages. Pass one, or use engine='gloo'."
            )
        if engine != "torch" and (reason := engine_reason("gloo")):
            raise UnsupportedError(f"engine {engine}: {reason}. Use engine='torch', or another build of torch.")
        super().__init__(meeting)
        self._options, self._engine, self._group = options, engine, group
        # On the user's thread: which GPU is the current one is a thread's own affair.
        self._device = device_of(group) if engine == "torch" and group is not None else torch.device("cpu")
        self._made: tuple[_native.CarriedComm, carriers.Carrier] | None = None

    def share(self, secret: bytes, timeout_s: float) -> None:
        """Takes memory.

        Before anybody connects the carrier: whoever waits inside torch is not told why another does not come.
        """
        self._made = self._make()

    def _make(
        self, inside: _native.ShmBuilder | None = None, hosts: list[list[int]] | None = None
    ) -> tuple[_native.CarriedComm, carriers.Carrier]:
        """`inside`, `hosts`: of engine two_level, what the ranks of this host share, and the ranks of each."""
        carrier: carriers.Carrier
        carrier, scratch_bytes = carriers.GlooCarrier(), self._options.arena_bytes
        if self._engine == "torch":  # whose copies take as much as the slots, at most
            carrier, scratch_bytes = carriers.TorchCarrier(self._device), scratch_bytes // 2
        comm = _native.CarriedComm(
            rank=self._meeting.rank,
            wish=_native.CarriedWish(scratch_bytes),
            pids=[hello.pid for hello in self._meeting.hellos],
            hosts=self._hosts(),
            sockets=self._hand_over(),
            carrier=carrier,
            simd=self._options.simd,
            engine=self._engine,
            inside=inside,
            inside_hosts=hosts or [],
            intra_codec=_native.CODECS[self._options.intra_codec],
        )
        return comm, carrier

    def finish(self, timeout_s: float, name: str) -> _native.Comm:
        """Connects the carrier and makes the first call."""
        if self._made is None:
            raise InternalError("finish() before share()")
        (comm, carrier), self._made = self._made, None
        try:
            carrier.end_on_failure(comm)
            self._run_beside(comm, lambda: self._begin(comm, carrier, timeout_s, name))
            carrier.serve(comm)
        except BaseException as error:
            comm.abort(repr(error))
            comm.wait_failed(END_S)  # all know before this rank says goodbye, which ends nobody's wait for torch
            carrier.abort()  # the first call may be in it; once closed, nobody else would
            comm.close(0.0)
            raise
        return comm

    def _begin(self, comm: _native.CarriedComm, carrier: carriers.Carrier, timeout_s: float, name: str) -> None:
        store = own_client(self._meeting.store)
        if self._engine != "torch":
            store = PrefixStore(self._meeting.key("gloo"), store)
            rank, nranks, host = self._meeting.rank, self._meeting.nranks, self._address.host
            carrier.connect(carriers.gloo_groups(store, rank, nranks, host, timeout_s))
        else:
            carrier.connect(self._torch(store, timeout_s))
        comm.verify(timeout_s, name)

    def _run_beside(self, comm: _native.CarriedComm, work: Callable[[], None]) -> None:
        """Runs work in a thread: torch waits for peers in ways that neither Ctrl-C nor a peer's death ends.

        Nor does its own time limit where this rank is cut off from the store.

        Raises:
            CommTimeoutError: It did not end in the time that is left.
        """
        failures: list[Exception] = []
        until = time.monotonic() + self._meeting.remaining_s()

        def run() -> None:
            try:
                work()
            except Exception as error:  # noqa: BLE001 - raised below, by the thread that waits
                failures.append(error)

        thread = threading.Thread(target=run, name="dpcomm-connect", daemon=True)
        thread.start()
        try:
            while thread.is_alive():
                thread.join(LOOK_S)
                if thread.is_alive() and comm.wait_failed(0.001):
                    thread.join(END_S)  # in a call, it ends with a better error
                    comm.check()
                if thread.is_alive() and time.monotonic() > until:
                    raise self._late()
            # torch's own time is up at the same moment, give or take its rounding.
            if failures and not isinstance(failures[0], Error) and time.monotonic() > until - LOOK_S:
                raise self._late() from failures[0]
        except BaseException as error:
            comm.abort(repr(error))
            thread.join(LATE_END_S if time.monotonic() > until else END_S)
            raise
        if failures and isinstance(failures[0], Error):
            raise failures[0]
        if failures:
            if comm.wait_failed(END_S):
                comm.check()  # what is behind it
            comm.abort(f"torch could not connect the ranks: {failures[0]}")
            raise UnsupportedError(
                f"engine {self._engine}: torch could not connect the ranks: {failures[0]}. This rank listens at "
                f"{self._address.host} ({self._address.why}); GLOO_SOCKET_IFNAME names the interface that reaches the "
                "others."
            )

    def _late(self) -> Error:
        me = self._meeting.hellos[self._meeting.rank]
        return CommTimeoutError(
            f"rank {me.rank} on {me.hostname}, engine {self._engine}: torch could not connect the ranks, and try a "
            f"call, within the {self._options.timeout_s:g} s of the construction. Is the network to a host cut, or is "
            "timeout_s too short?"
        )

    def _torch(self, store: Any, timeout_s: float) -> dist.ProcessGroup:
        """A group like the user's, for messages alone: calls on one group must come in the same order on all ranks.

        Not with dist.new_group: it counts the groups that a rank is in to name one, and ranks are in different ones.
        """
        ranks = dist.get_process_group_ranks(self._group)
        name = self._meeting.key("torch")
        own, _ = dist.distributed_c10d._new_process_group_helper(
            len(ranks),
            self._meeting.rank,
            ranks,
            dist.Backend(dist.get_backend(self._group)),
            PrefixStore(name, store),
            name,  # type: ignore[arg-type]
            timeout=timedelta(seconds=timeout_s),
        )
        assert isinstance(own, dist.ProcessGroup)
        forget(own)
        return own


def own_client(store: Any) -> Any:
    """The same store through a connection of its own, where this torch and kind of store have that.

    A TCPStore's client that waits for a key keeps all others of its connection waiting: a rank whose peer has failed
    could say so to nobody.
    """
    try:
        return store.clone()
    except (AttributeError, RuntimeError):
        return store


def forget(group: dist.ProcessGroup) -> None:
    """Takes a group out of torch's books; whoever holds it goes on using it.

    new_group(use_local_synchronization=True) names a group by how many are in the books. All its ranks must come to the
    same name, whatever communicators each of them has.
    """
    world = dist.distributed_c10d._world
    for tagged in world.tags_to_pg.values():
        if group in tagged:
            tagged.remove(group)
    for book in (world.pg_map, world.pg_names, world.pg_group_ranks, world.pg_backend_config, world.pg_to_tag):
        book.pop(group, None)
    with contextlib.suppress(RuntimeError):  # not in the one that compiled code reads
        _unregister_process_group(group.group_name)


def device_of(group: dist.ProcessGroup) -> torch.device:
    """Where a group's backend takes tensors: on the CPU if it may, else on the current device of its kind."""
    # A group that is written in Python may know no devices; those that its backend was registered for are known.
    known = group._device_types or dist.Backend.backend_capability.get(dist.get_backend(group), ["cpu"])
    devices = [torch.device(device) for device in known]
    device = next((d for d in devices if d.type == "cpu"), devices[0])
    if device.type == "cpu" or device.index is not None:
        return device
    return torch.device(device.type, torch.get_device_module(device.type).current_device())
