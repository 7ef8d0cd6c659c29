"""Several ranks in one process: each a communicator, driven together by `allreduce_local`."""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from typing import Any

import torch

from dpcomm import _native, bootstrap, processors
from dpcomm import options as opt
from dpcomm.communicator import Communicator
from dpcomm.errors import ArgumentError, P2PUnavailableError, UnsupportedError
from dpcomm.overlap import check_overlap


def init_local(
    devices: Sequence[torch.device | str | int],
    *,
    codec: str = "none",
    engine: str = "auto",
    algorithm: str = "auto",
    timeout_s: float = 300.0,
    bucket_cap_mb: float = 25.0,
    max_ctas: int | None = None,
) -> list[Communicator]:
    """Makes the communicators of ranks that all live in this process.

    Args:
        devices: One per rank, for example ["cpu"] * 4 or [0, 0, 1]: all on CPU or all on GPUs, which may repeat.
        codec, engine, algorithm, timeout_s, bucket_cap_mb, max_ctas: As for `Communicator`.

    Returns:
        One communicator per device. Use each from a thread of its own, or all at once with `allreduce_local`.

    Raises:
        ArgumentError, UnsupportedError: Devices or options that cannot work.
        P2PUnavailableError: GPUs do not reach each other's memory, and DPCOMM_P2P_ARENA=device.
        SystemResourceError: No memory, or more ranks than the GPU runs at once.
    """
    if isinstance(devices, str) or not isinstance(devices, Sequence) or not devices:
        raise ArgumentError("init_local: expected a list of devices, one per rank, such as ['cpu'] * 2")
    nranks = len(devices)
    options = [opt.resolve(codec, engine, algorithm, timeout_s, bucket_cap_mb, device, max_ctas) for device in devices]
    if len({one.serving for one in options}) > 1:
        named = ", ".join(one.device_name for one in options)
        raise ArgumentError(f"init_local: devices {named}: ranks must be all on CPU or all on GPUs")
    if nranks == 1:
        return [Communicator._from_native(None, 0, 1, options[0])]
    engine_name = options[0].serving
    if engine_name in opt.NATIVE and algorithm == "native":
        raise UnsupportedError(
            f"init_local: algorithm='native' needs engine={engine_name!r}, which joins processes. Use another one."
        )
    if engine_name in opt.NETWORK_ENGINES:
        other = "p2p" if engine_name in opt.GPU_ENGINES else "shm"
        raise UnsupportedError(f"init_local: engine={engine_name!r} joins processes. Use engine={other!r}, or 'auto'.")
    if nranks > _native.MAX_RANKS:
        most = _native.MAX_RANKS
        raise UnsupportedError(f"init_local: {engine_name} engine supports at most {most} ranks, got {nranks}")
    natives = (_on_cpu if engine_name == "shm" else _on_gpus)(options)
    made = enumerate(zip(natives, options, strict=True))
    return [Communicator._from_native(native, rank, nranks, own) for rank, (native, own) in made]


def _on_cpu(options: list[opt.Options]) -> list[_native.Comm]:
    first, nranks = options[0], len(options)
    wish = processors.shm_wish(first, processors.share([processors.processor_set()] * nranks))
    return _native.local_group(nranks, wish, first.timeout_s, first.simd, secrets.token_hex(2))


def _on_gpus(options: list[opt.Options]) -> list[_native.Comm]:
    first, devices = options[0], [one.device for one in options]
    if os.environ.get("CUDA_LAUNCH_BLOCKING") == "1" and len(set(devices)) > 1:
        raise ArgumentError(
            f"init_local: CUDA_LAUNCH_BLOCKING=1 with ranks on GPUs {sorted(set(devices))}: the first GPU's kernel "
            "waits for the others', which this process could not launch before it has ended. Unset it, or give each "
            "rank a process."
        )

    def make(pinned: bool) -> list[_native.Comm]:
        wish = bootstrap.p2p_wish(first, pinned)
        channels = min(_native.p2p_channels(device, devices.count(device), wish) for device in sorted(set(devices)))
        wish = bootstrap.p2p_wish(first._replace(max_ctas=channels), pinned)
        return _native.p2p_local(devices, wish, first.timeout_s, secrets.token_hex(2))

    if first.arena != "auto":
        return make(first.arena == "pinned")
    try:
        return make(False)
    except P2PUnavailableError as error:
        bootstrap.warn_pinned("init_local", error, ", ".join(f"cuda:{device}" for device in sorted(set(devices))))
    return make(True)


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
    check_overlap(parts)
    # On GPUs all are started before any stream is made to wait: ranks that share a device are one launch.
    try:
        works = [comm._submit(p, r) for comm, p, r in zip(comms, parts, requests, strict=True)]
    except BaseException as error:  # some ranks have begun a call that the others never will
        for comm in comms:
            comm._abort(f"allreduce_local: {error!r}")
        raise
    for work in works:
        work.wait()
    return xs
