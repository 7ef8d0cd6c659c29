"""Engine p2p on a machine without a GPU: dpcomm's extension linked with a stand-in for the CUDA runtime.

tests/cpp/stand_in has the runtime: host memory plays a GPU's, streams are threads. Processes that take the extension
(`environment`) see two "GPUs"; `GpuArray` is an array on one of them.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import cpp_build
import numpy as np
from numpy.typing import NDArray
from test_build import find_nvcc

WHY_NOT = "" if find_nvcc() else "no nvcc: engine p2p needs CUDA's headers to be built"
LEGACY_STREAM = 1  # what __cuda_array_interface__ calls the default stream


@cache
def extension() -> str:
    """The path of the extension, built at first use: minutes."""
    folder = cpp_build.build("plain", ("stand_in_native",))
    found = sorted(folder.glob("_native*.so"))
    assert len(found) == 1, f"expected one extension in {folder}: {found}"
    return str(found[0])


def environment(machine: str = "", **more: str) -> dict[str, str]:
    """What a process of ranks.py needs in order to take the extension; `machine` is STAND_IN_MACHINE."""
    return {"STAND_IN_NATIVE": extension(), "STAND_IN_MACHINE": machine, "DPCOMM_ARENA_MB": "4", **more}


class GpuArray:
    """NumPy's memory in the role of a GPU's."""

    def __init__(self, x: NDArray[Any]) -> None:
        self.x = np.ascontiguousarray(x).copy()

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.x.shape,
            "typestr": self.x.dtype.str,
            "data": (self.x.ctypes.data, False),
            "strides": None,
            "stream": LEGACY_STREAM,
            "version": 3,
        }
