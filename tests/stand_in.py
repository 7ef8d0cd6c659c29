"""Engines p2p and nccl on a machine without a GPU: dpcomm's extension linked with a stand-in for the CUDA runtime.

tests/cpp/stand_in has the runtime: host memory plays a GPU's, streams are threads. Processes that take the extension
(`environment`) see two "GPUs"; `GpuArray` is an array on one of them. tests/cpp/stand_in_nccl has a stand-in for NCCL
beside it, whose ranks are threads of one process (`nccl_environment`).
"""

from __future__ import annotations

import ctypes
import os
import weakref
from functools import cache
from pathlib import Path
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


def nccl_library() -> str:
    """The path of the stand-in for libnccl.so.2, which is built with the extension."""
    return str(Path(extension()).with_name("libnccl_stand_in.so"))


def nccl_environment(machine: str = "devices=8", **more: str) -> dict[str, str]:
    """As `environment`, for engine nccl."""
    return environment(machine, **{"DPCOMM_NCCL_LIBRARY": nccl_library(), **more})


@cache
def _runtime() -> ctypes.CDLL:
    """The runtime inside the extension that this process has taken."""
    library = ctypes.CDLL(os.environ["STAND_IN_NATIVE"])
    library.stand_in_adopt.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    library.stand_in_forget.argtypes = [ctypes.c_void_p]
    library.stand_in_break.argtypes = [ctypes.c_int]
    return library


def break_context(status: int) -> None:
    """Every call that could touch a GPU fails with this cudaError_t from now on; 0: all is as before."""
    _runtime().stand_in_break(status)


def _forget(x: NDArray[Any]) -> None:
    _runtime().stand_in_forget(x.ctypes.data)


class GpuArray:
    """NumPy's memory in the role of a GPU's.

    Args:
        x: Is copied.
        device: On which GPU the runtime takes it to be, as NCCL asks; None: it is not told, and engine p2p does not.
        stream: What the interface calls the stream of the array.
    """

    def __init__(self, x: NDArray[Any], device: int | None = None, stream: int = LEGACY_STREAM) -> None:
        self.x = np.ascontiguousarray(x).copy()
        self.stream = stream
        if device is not None and self.x.nbytes > 0:
            _runtime().stand_in_adopt(self.x.ctypes.data, self.x.nbytes, device)
            weakref.finalize(self, _forget, self.x)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.x.shape,
            "typestr": self.x.dtype.str,
            "data": (self.x.ctypes.data, False),
            "strides": None,
            "stream": self.stream,
            "version": 3,
        }
