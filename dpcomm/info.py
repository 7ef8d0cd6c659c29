"""`info`: what this build of dpcomm is and can do here. Starts nothing; asks the CUDA driver which GPUs there are."""

from __future__ import annotations

from typing import Any

import torch

from dpcomm import _native
from dpcomm.options import LATER_ENGINES, engine_reason


def info() -> dict[str, Any]:
    """Versions, instruction sets, GPUs, and which engines are usable and why.

    Returns:
        version, layout, cuda_built, cuda_version, simd, torch, engines: {name: {usable, reason}}, devices: a list of
        {ordinal, name, uuid, pci_bus_id, capability, sms}.
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
    engines |= {name: {"usable": False, "reason": engine_reason(name)} for name in LATER_ENGINES}
    return {
        "version": _native.version,
        "layout": _native.LAYOUT,
        "cuda_built": _native.cuda_built,
        "cuda_version": _native.cuda_version,
        "simd": _native.simd(),
        "torch": str(torch.__version__),
        "engines": engines,
        "devices": [] if no_gpu else _native.cuda_devices(),
    }
