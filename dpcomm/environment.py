"""The environment variables DPCOMM_*, parsed strictly. None of them changes a result.

DPCOMM_TIMEOUT_S   seconds; takes the place of the default of 300 (an explicit other timeout_s wins)
DPCOMM_ARENA_MB    MiB of shared memory a rank may take at most; the same on all ranks; default 64
DPCOMM_SIMD        instruction set of the kernels, one of `dpcomm.info()["simd"]`; default: the best
DPCOMM_CHANNELS    threads that a rank moves large tensors with, 1 to 8; the same on all ranks; default: what is
                   fastest at start, where a rank has several processors to itself
DPCOMM_P2P_ARENA   where GPUs keep what they exchange; the same on all ranks: "device", their own memory or an error;
                   "pinned", host memory; "auto" (the default), their own, and host memory where that does not work
DPCOMM_NCCL_LIBRARY
                   path of the libnccl.so.2 to use; default: the one torch has loaded, else an installed wheel's, else
                   the system's
DPCOMM_CUDA        read by setup.py only
"""

from __future__ import annotations

import functools
import os
import warnings
from pathlib import Path
from typing import NamedTuple

from dpcomm import _native
from dpcomm.errors import ArgumentError

DEFAULT_TIMEOUT_S = 300.0
# Longer than any job waits for a peer on purpose, short enough that no clock arithmetic overflows.
MAX_TIMEOUT_S = 30 * 24 * 3600.0
DEFAULT_ARENA_MB = 64
MAX_ARENA_MB = 64 * 1024
P2P_ARENAS = ("auto", "device", "pinned")
KNOWN = (
    "DPCOMM_TIMEOUT_S",
    "DPCOMM_ARENA_MB",
    "DPCOMM_SIMD",
    "DPCOMM_CHANNELS",
    "DPCOMM_P2P_ARENA",
    "DPCOMM_NCCL_LIBRARY",
    "DPCOMM_CUDA",
)


class Environment(NamedTuple):
    """What the variables ask for, defaults filled in."""

    timeout_s: float
    arena_bytes: int
    simd: str  # "" takes the best
    channels: int  # 0: measured
    p2p_arena: str
    nccl_library: str  # "": found


def read() -> Environment:
    """Reads the variables now.

    Raises:
        ArgumentError: A value cannot be parsed or is out of range.
    """
    _warn_unknown(tuple(sorted(name for name in os.environ if name.startswith("DPCOMM_") and name not in KNOWN)))
    return Environment(_timeout_s(), _arena_bytes(), _simd(), _channels(), _p2p_arena(), nccl_library())


@functools.cache
def _warn_unknown(names: tuple[str, ...]) -> None:
    """One warning for each set of unknown names, not one for each communicator."""
    if names:
        warnings.warn(
            f"dpcomm does not know {', '.join(names)} (a typo?); known: {', '.join(KNOWN)}",
            RuntimeWarning,
            stacklevel=4,
        )


def _timeout_s() -> float:
    text = os.environ.get("DPCOMM_TIMEOUT_S")
    if text is None:
        return DEFAULT_TIMEOUT_S
    try:
        seconds = float(text)
    except ValueError:
        raise ArgumentError(f"DPCOMM_TIMEOUT_S={text!r}: expected seconds as a number") from None
    if not 0 < seconds <= MAX_TIMEOUT_S:
        raise ArgumentError(f"DPCOMM_TIMEOUT_S={text!r}: expected more than 0 and at most {MAX_TIMEOUT_S:.0f} seconds")
    return seconds


def _arena_bytes() -> int:
    text = os.environ.get("DPCOMM_ARENA_MB")
    if text is None:
        return DEFAULT_ARENA_MB << 20
    try:
        mebibytes = int(text)
    except ValueError:
        raise ArgumentError(f"DPCOMM_ARENA_MB={text!r}: expected a whole number of MiB") from None
    if not 1 <= mebibytes <= MAX_ARENA_MB:
        raise ArgumentError(f"DPCOMM_ARENA_MB={text!r}: expected 1 to {MAX_ARENA_MB} MiB")
    return mebibytes << 20


def _simd() -> str:
    text = os.environ.get("DPCOMM_SIMD", "")
    if text and text not in _native.simd():
        raise ArgumentError(f"DPCOMM_SIMD={text!r}: this processor offers {', '.join(_native.simd())}")
    return text


def _channels() -> int:
    text = os.environ.get("DPCOMM_CHANNELS")
    if text is None:
        return 0
    try:
        channels = int(text)
    except ValueError:
        raise ArgumentError(f"DPCOMM_CHANNELS={text!r}: expected a whole number") from None
    if not 1 <= channels <= _native.MAX_CHANNELS:
        raise ArgumentError(f"DPCOMM_CHANNELS={text!r}: expected 1 to {_native.MAX_CHANNELS}")
    return channels


def _p2p_arena() -> str:
    text = os.environ.get("DPCOMM_P2P_ARENA", "auto")
    if text not in P2P_ARENAS:
        raise ArgumentError(f"DPCOMM_P2P_ARENA={text!r}: expected one of {', '.join(P2P_ARENAS)}")
    return text


def nccl_library() -> str:
    """The absolute path that DPCOMM_NCCL_LIBRARY gives, "" where it is not set.

    Raises:
        ArgumentError: It is no file.
    """
    text = os.environ.get("DPCOMM_NCCL_LIBRARY")
    if text is None:
        return ""
    if not Path(text).is_file():
        raise ArgumentError(f"DPCOMM_NCCL_LIBRARY={text!r}: expected the path of a libnccl.so.2")
    return str(Path(text).absolute())
