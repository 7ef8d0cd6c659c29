"""Which DDP models can take the hook."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.parallel import DistributedDataParallel

from dpcomm.errors import ArgumentError, UnsupportedError


def check(ddp: object, is_copy: Callable[[object], bool]) -> torch.device:
    """Checks that the hook can be registered, before anything collective begins.

    Args:
        ddp: What the user passed.
        is_copy: Whether the state of a hook that is there belongs to another model.

    Returns:
        Where the parameters lie.

    Raises:
        ArgumentError, UnsupportedError: It cannot; says why, and what to do.
    """
    where = "register_ddp_hook: "
    if not isinstance(ddp, DistributedDataParallel):
        kind = type(ddp).__name__
        if "FSDP" in kind or "FullyShardedDataParallel" in kind:
            raise ArgumentError(f"{where}{kind} shards gradients; the hook serves DistributedDataParallel only")
        if kind == "OptimizedModule":
            raise ArgumentError(f"{where}register on the DDP model before torch.compile(ddp)")
        raise ArgumentError(f"{where}expected a DistributedDataParallel model, got {kind}. Wrap it in DDP first.")
    # A copy of a hooked model has the list of hooks, with a copied state, but no hook.
    ddp._comm_hooks = [(hook, state) for hook, state in ddp._comm_hooks if not is_copy(state)]
    if ddp._comm_hooks:
        name = getattr(ddp._comm_hooks[0][0], "__qualname__", "?")
        raise ArgumentError(f"{where}the model has a communication hook already ({name}); DDP takes one. Wrap it anew.")
    if ddp.mixed_precision is not None:
        raise ArgumentError(f"{where}DDP's native mixed precision brings hooks of its own. Use torch.autocast instead.")
    if ddp._use_python_reducer:
        raise UnsupportedError(f"{where}torch._dynamo.config.optimize_ddp='python_reducer' bypasses bucket hooks")
    places: dict[torch.device, str] = {}
    for name, parameter in ddp.named_parameters():
        places.setdefault(parameter.device, name)
    for device, name in places.items():
        if device.type not in ("cpu", "cuda"):
            raise UnsupportedError(f"{where}{name} is on {device}; dpcomm serves CPUs and CUDA devices")
    if len(places) > 1:
        named = ", ".join(f"{name} on {device}" for device, name in places.items())
        raise ArgumentError(f"{where}the parameters lie on several devices ({named}); the hook serves one")
    return next(iter(places))
