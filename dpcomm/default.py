"""`allreduce` without a communicator in hand: one per process group, made at the first call."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch.distributed as dist

from dpcomm.communicator import Communicator

# The communicators of `allreduce`, one per process group. A group that was destroyed and forgotten takes its entry
# along, and a new default group is a new object, so it gets a communicator of its own.
_of_group: weakref.WeakKeyDictionary[Any, Communicator] = weakref.WeakKeyDictionary()
_of_group_lock = threading.Lock()


def allreduce(
    x: Any,
    op: Any = "sum",
    *,
    codec: str | None = None,
    algorithm: str | None = None,
    group: dist.ProcessGroup | None = None,
    async_op: bool = False,
) -> Any:
    """Reduces x over the ranks of a process group, in place. See `Communicator.allreduce`.

    The group's communicator is made at the first call, which is collective, and closed at exit.

    Args:
        group: None is the default group.
        codec: None means "none".

    Raises:
        ArgumentError: There is no process group (or see `Communicator.allreduce`).
    """
    return communicator_of(group).allreduce(x, op, codec=codec, algorithm=algorithm, async_op=async_op)


def communicator_of(group: dist.ProcessGroup | None) -> Communicator:
    """The communicator that `allreduce` uses for a group; made at the first call."""
    key = group
    if key is None:
        key = dist.group.WORLD
    if key is None:
        return Communicator()  # raises: says which call is missing
    try:
        return _of_group[key]
    except (KeyError, TypeError):
        with _of_group_lock:
            made: Communicator | None = _of_group.get(key)
            if made is None:
                made = _of_group[key] = Communicator(key)
            return made
