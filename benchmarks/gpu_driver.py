"""The GPU as its driver names it; neither torch nor dpcomm need be there."""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Gpu:
    """The first device, as the driver names it; `reason` says why there is none."""

    reason: str = ""
    name: str = ""
    driver: str = ""  # of the kernel module, "580.95.05"
    driver_cuda: str = ""  # the newest CUDA that this driver serves, "13.0"
    capability: str = ""  # "9.0"
    count: int = 0


def find_gpu() -> Gpu:
    """Asks the driver's library: neither torch nor the extension need be there yet."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return Gpu(reason=str(error))
    count, version, device = ctypes.c_int(0), ctypes.c_int(0), ctypes.c_int(0)
    name = ctypes.create_string_buffer(128)
    status = (
        driver.cuInit(0)
        or driver.cuDeviceGetCount(ctypes.byref(count))
        or driver.cuDriverGetVersion(ctypes.byref(version))
    )
    if status or count.value == 0:
        return Gpu(reason=f"the CUDA driver answers error {status}" if status else "the CUDA driver finds no device")
    if driver.cuDeviceGet(ctypes.byref(device), 0) or driver.cuDeviceGetName(name, len(name), device):
        return Gpu(reason="the CUDA driver does not name its first device")
    major, minor = ctypes.c_int(0), ctypes.c_int(0)
    driver.cuDeviceGetAttribute(ctypes.byref(major), 75, device)
    driver.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)
    module = Path("/proc/driver/nvidia/version")
    found = re.search(r"\d+\.\d+(?:\.\d+)?", module.read_text()) if module.exists() else None
    cuda = f"{version.value // 1000}.{version.value % 1000 // 10}"
    capability = f"{major.value}.{minor.value}"
    return Gpu("", name.value.decode(), found.group() if found else "", cuda, capability, count.value)
