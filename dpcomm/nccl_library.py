"""Which NCCL this process uses: found at run time, once, by csrc/nccl/library.h. Loads it, and starts nothing."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import NamedTuple

import torch

from dpcomm import _native, environment
from dpcomm.errors import Error, VersionError, bare_message


class NcclLibrary(NamedTuple):
    """The copy of NCCL that serves this process."""

    version: str  # "2.32.3"
    path: str
    how: str  # "loaded already" (as a rule by torch), "wheel", "system" or "DPCOMM_NCCL_LIBRARY"


def find() -> NcclLibrary:
    """Finds and loads NCCL: DPCOMM_NCCL_LIBRARY, else what is loaded already, else a wheel, else the system's.

    The first success is for the process.

    Raises:
        ArgumentError: DPCOMM_NCCL_LIBRARY is no file.
        VersionError: None is found, it is too old or lacks a function, or another copy is loaded than the one asked
            for. Says what was tried.
    """
    try:
        return NcclLibrary(*_native.find_nccl(environment.nccl_library(), wheel_paths()))
    except VersionError as error:
        text, by_torch = bare_message(error), torch_version()
        if not by_torch or not text.startswith("NCCL ") or text.startswith(f"NCCL {by_torch} "):
            raise
        raise VersionError(f"{text} torch reports {by_torch}: two NCCL installations?") from None


def reason() -> str:
    """Why there is no NCCL to use, or "" where there is. Loads it, as `find` does."""
    try:
        find()
    except Error as error:
        return bare_message(error)
    return ""


def wheel_paths() -> list[str]:
    """libnccl.so.2 of the installed wheels nvidia-nccl-cu12 and -cu13, which share a folder of their names' own."""
    try:
        spec = importlib.util.find_spec("nvidia.nccl")
    except (ImportError, ValueError):  # there is no `nvidia`, or it is no package
        return []
    folders = (spec.submodule_search_locations or []) if spec else []
    paths = [Path(folder) / "lib" / "libnccl.so.2" for folder in folders]
    return [str(path) for path in paths if path.is_file()]


def torch_version() -> str:
    """What torch says its NCCL is, for example "2.29.7"; "" where it was built without."""
    try:
        return ".".join(str(part) for part in torch.cuda.nccl.version()[:3])  # type: ignore[no-untyped-call]
    except AttributeError:
        return ""
