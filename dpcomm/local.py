"""Several ranks in one process: each a communicator, driven together by `allreduce_local`."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

import torch

from dpcomm import _native, arrays, processors
from dpcomm import options as opt
from dpcomm.communicator import Communicator
from dpcomm.errors import ArgumentError, UnsupportedError


def init_local(
    devices: Sequence[torch.device | str | int],
    *,
    codec: str = "none",
    engine: str = "auto",
    algorithm: str = "auto",
    timeout_s: float = 300.0,
    bucket_cap_mb: float = 25.0,
) -> list[Communicator]:
    """Makes the communicators of ranks that all live in this process.

    Args:
        devices: One per rank, for example ["cpu"] * 4.
        codec, engine, algorithm, timeout_s, bucket_cap_mb: As for `Communicator`.

    Returns:
        One communicator per device. Use each from a thread of its own, or all at once with `allreduce_local`.

    Raises:
        ArgumentError, UnsupportedError: Devices or options that cannot work.
        SystemResourceError: No memory.
    """
    if isinstance(devices, str) or not isinstance(devices, Sequence) or not devices:
        raise ArgumentError("init_local: expected a list of devices, one per rank, such as ['cpu'] * 2")
    nranks = len(devices)
    options = [opt.resolve(codec, engine, algorithm, timeout_s, bucket_cap_mb, device) for device in devices]
    if nranks == 1:
        return [Communicator._from_native(None, 0, 1, options[0])]
    if nranks > _native.MAX_RANKS:
        raise UnsupportedError(f"init_local: shm engine supports at most {_native.MAX_RANKS} ranks, got {nranks}")
    first = options[0]
    wish = processors.shm_wish(first, processors.share([processors.processor_set()] * nranks))
    natives = _native.local_group(nranks, wish, first.timeout_s, first.simd, secrets.token_hex(2))
    return [Communicator._from_native(native, rank, nranks, first) for rank, native in enumerate(natives)]


def allreduce_local(
    comms: Sequence[Communicator],
    xs: Sequence[Any],
    op: Any = "sum",
    *,
    codec: str | None = None,
    algorithm: str | None = None,
) -> Sequence[Any]:
    """One all-reduce over all ranks of this process, in place.

    Args:
        comms: All communicators of one `init_local`, in rank order.
        xs: What rank r contributes is xs[r]: an array or a list of them.
        op, codec, algorithm: As for `Communicator.allreduce`.

    Returns:
        xs.

    Raises:
        ArgumentError, UnsupportedError: Something cannot work; nothing was reduced.
        Error: The first rank's error, if the call failed.
    """
    if [comm.rank for comm in comms] != list(range(len(comms))) or not comms or comms[0].nranks != len(comms):
        raise ArgumentError("allreduce_local: expected all communicators of one init_local, in rank order")
    if len(xs) != len(comms):
        raise ArgumentError(f"allreduce_local: {len(comms)} ranks, but {len(xs)} inputs")
    requests = [comm._request(op, codec, algorithm) for comm in comms]
    # All are validated before any is submitted: a rank that is refused later would leave the others waiting.
    parts = [comm._prepare(x, request) for comm, x, request in zip(comms, xs, requests, strict=True)]
    arrays.check_overlap(parts)
    works = [comm._submit(p, r) for comm, p, r in zip(comms, parts, requests, strict=True)]
    for work in works:
        work.wait()
    return xs
