"""What may stand for a group of ranks: a process group, or a DeviceMesh of one dimension (`mesh["dp"]`).

Knows names of torch.distributed only; nothing of communicators.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from dpcomm.errors import ArgumentError

Group: TypeAlias = dist.ProcessGroup | DeviceMesh


def process_group(group: Any) -> Any:
    """The process group of a mesh; whatever else was given is returned as it is.

    Raises:
        ArgumentError: A mesh that has not exactly one group of which this rank is.
    """
    if not isinstance(group, DeviceMesh):
        return group
    if group.ndim != 1:
        names = group.mesh_dim_names
        how = f"mesh[{names[0]!r}]" if names else "mesh.get_group(0)"
        raise ArgumentError(
            f"group: a DeviceMesh of {group.ndim} dimensions{f' {names}' if names else ''} stands for as many groups. "
            f"Pass one of them, such as {how}."
        )
    if group.get_coordinate() is None:
        raise ArgumentError(f"group: this rank is not in {group}. Only the ranks of a mesh make its communicators.")
    try:
        return group.get_group()
    except (RuntimeError, ValueError, LookupError) as error:
        raise ArgumentError(f"group: {group} has no process group ({error})") from None


def device_type(group: Any) -> str | None:
    """The kind of device that a mesh is made of; None for whatever else was given, which does not say."""
    return group.device_type if isinstance(group, DeviceMesh) else None


def device_for(group: Any, device: Any) -> Any:
    """The device of a communicator: as given, or without one a mesh's kind.

    Raises:
        ArgumentError: A mesh of another kind of device than the one given.
    """
    kind = device_type(group)
    if kind is None or device is None:
        return kind if device is None else device
    given = _kind(device)
    if given and given != kind:
        named = str(device) if isinstance(device, torch.device) else device
        raise ArgumentError(
            f"device={named!r}, but the DeviceMesh is of device type {kind!r}. Let both be of one kind, or pass "
            "mesh.get_group(), which says nothing of devices."
        )
    return device


def _kind(device: Any) -> str:
    """The type of a device; "" for what is none, which `options.resolve` refuses with a reason."""
    if isinstance(device, int) and not isinstance(device, bool):
        return "cuda"
    try:
        return torch.device(device).type
    except (TypeError, RuntimeError):
        return ""
