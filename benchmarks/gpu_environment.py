"""What a GPU benchmark says of its GPU; beside environment.py, which says the rest."""

from typing import Any

import torch
from environment import describe_environment
from gpu_driver import find_gpu

from dpcomm import _native


def describe_gpu_environment() -> dict[str, Any]:
    """describe_environment() and the current CUDA device; fit for json.dump.

    Raises:
        RuntimeError: torch cannot use the device.
    """
    device = torch.cuda.current_device()
    properties = torch.cuda.get_device_properties(device)
    found = find_gpu()
    return {
        **describe_environment(),
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": l2_bytes(),
        "gpu_memory_bytes": properties.total_memory,
        "driver": found.driver,
        "driver_cuda": found.driver_cuda,
        "cuda": _native.cuda_version,
        "torch_cuda": torch.version.cuda or "",
        "nccl": ".".join(map(str, nccl_version())),
    }


def why_no_gpu() -> str:
    """Empty where the extension and torch can both use a CUDA device, else the reason."""
    if reason := _native.cuda_reason():
        return reason
    return "" if torch.cuda.is_available() else f"this torch ({torch.__version__}) has no CUDA"


def nccl_version() -> tuple[int, ...]:
    """Of the NCCL that torch has; empty where it has none."""
    if not torch.cuda.is_available() or not torch.distributed.is_nccl_available():
        return ()
    return tuple(torch.cuda.nccl.version())  # type: ignore[no-untyped-call]


def l2_bytes() -> int:
    """Of the current device's second-level cache."""
    return int(torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size)
