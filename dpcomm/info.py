"""`info`: what this build of dpcomm is and can do here. Starts nothing; asks the CUDA driver which GPUs there are, and
loads NCCL to ask for its version."""

from __future__ import annotations

from typing import Any

import torch

from dpcomm import _native, nccl_library
from dpcomm.options import engine_reason


def info() -> dict[str, Any]:
    """Versions, instruction sets, GPUs, NCCL, and which engines are usable and why.

    Loads NCCL into the process, for good, where torch has not done so already: a library of hundreds of MB, most of
    which is only mapped. Nothing of it runs but the function that says its version.

    Returns:
        version, layout, cuda_built, cuda_version, simd, torch, engines: {name: {usable, reason}}, devices: a list of
        {ordinal, name, uuid, pci_bus_id, capability, sms}; nccl: {version, path, how, least_version} of the NCCL that
        dpcomm found, or {reason} where it can use none.
    """
    no_gpu = engine_reason("p2p")
    engines: dict[str, dict[str, Any]] = {
        "shm": {"usable": True, "reason": f"CPU tensors of up to {_native.MAX_RANKS} processes of one host"},
        "p2p": {
            "usable": not no_gpu,
            "reason": no_gpu or f"CUDA tensors of up to {_native.MAX_RANKS} ranks of one host",
        },
    }
    for name, how in (("gloo", "a gloo group of dpcomm's own"), ("torch", "a process group like the given one")):
        reason = engine_reason(name)
        text = f"CPU tensors of up to {_native.MAX_RANKS} processes of any hosts, through {how}"
        engines[name] = {"usable": not reason, "reason": reason or text}
    no_nccl = engine_reason("nccl")
    engines["nccl"] = {
        "usable": not no_nccl,
        "reason": no_nccl or f"CUDA tensors of up to {_native.MAX_RANKS} ranks of any hosts",
    }
    return {
        "version": _native.version,
        "layout": _native.LAYOUT,
        "cuda_built": _native.cuda_built,
        "cuda_version": _native.cuda_version,
        "simd": _native.simd(),
        "torch": str(torch.__version__),
        "engines": engines,
        "devices": [] if no_gpu else _native.cuda_devices(),
        "nccl": _nccl(),
    }


def _nccl() -> dict[str, str]:
    if reason := nccl_library.reason():
        return {"reason": reason}
    return {**nccl_library.find()._asdict(), "least_version": _native.NCCL_LEAST_VERSION}
