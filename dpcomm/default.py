"""`allreduce` without a communicator in hand: one per process group and kind of device, made at the first call."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import numpy as np
import torch.distributed as dist

from dpcomm import arrays, groups
from dpcomm.communicator import Communicator
from dpcomm.errors import Error
from dpcomm.groups import Group

# The communicators of `allreduce`, one per process group and kind of device ("cpu", "cuda"). A group that was destroyed
# and forgotten takes its entries along, and a new default group is a new object, so it gets communicators of its own.
_of_group: weakref.WeakKeyDictionary[Any, dict[str, Communicator]] = weakref.WeakKeyDictionary()
_of_group_lock = threading.Lock()


def allreduce(
    x: Any,
    op: Any = "sum",
    *,
    codec: str | None = None,
    algorithm: str | None = None,
    group: Group | None = None,
    async_op: bool = False,
) -> Any:
    """Reduces x over the ranks of a process group, in place. See `Communicator.allreduce`.

    The group's communicators, one for arrays on CPU and one for those on a GPU, are made at the first call with such
    arrays, which is collective, and closed at exit. The first array of x says which: for all calls of a process on the
    same GPU. An empty list is a call on CPU, unless there has been no other than on a GPU.

    Args:
        group: A process group, or one dimension of a DeviceMesh, such as mesh["dp"]; None is the default group.
        codec: None means "none".

    Raises:
        ArgumentError: There is no process group, or x is not on the kind of device that a mesh is made of.
        Further errors: see `Communicator.allreduce`.
    """
    comm = communicator_of(group, _device(x, group))
    return comm.allreduce(x, op, codec=codec, algorithm=algorithm, async_op=async_op)


def communicator_of(group: Group | None, device: str = "cpu") -> Communicator:
    """The communicator that `allreduce` uses for a group and arrays on a device; made at the first call."""
    if group is not None:
        device = groups.device_for(group, device)
        group = groups.process_group(group)  # of a mesh, whose object lives no longer than the call
    key = dist.group.WORLD if group is None else group
    if key is None:
        return Communicator(device=device)  # raises: says which call is missing
    kind = device.partition(":")[0]
    try:
        return _of_group[key][kind]
    except (KeyError, TypeError):
        with _of_group_lock:
            try:
                made = _of_group.setdefault(key, {})
            except TypeError:  # no group at all
                return Communicator(key, device=device)  # raises
            if kind not in made:
                made[kind] = Communicator(key, device=device)
            return made[kind]


def _device(x: Any, group: Group | None) -> str:
    """Where the first array of x lies; what is no array is left to the communicator to refuse."""
    first = x
    if isinstance(x, (list, tuple)):
        if not x:
            return _device_of_nothing(group)
        first = x[0]
    if type(first) is np.ndarray or (type(first) in arrays.PLAIN and first.is_cpu):
        return "cpu"
    try:
        device = arrays.device_of(first)
    except Error:
        return groups.device_type(group) or "cpu"
    return device if device.startswith("cuda") else "cpu"


def _device_of_nothing(group: Group | None) -> str:
    if kind := groups.device_type(group):
        return kind
    try:
        made = _of_group.get(dist.group.WORLD if group is None else group)
    except TypeError:
        return "cpu"
    return "cuda" if made and "cpu" not in made else "cpu"
