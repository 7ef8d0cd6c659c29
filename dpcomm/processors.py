"""How many processors a rank has to itself: decides how it waits, and how many channels it may try."""

from __future__ import annotations

import os
import zlib
from collections import Counter
from collections.abc import Sequence

from dpcomm import _native
from dpcomm.options import Options

MOST_MEASURED_CHANNELS = 4  # without DPCOMM_CHANNELS; more would take processors away from the training


def processor_set() -> tuple[int, int]:
    """How many processors this process may run on, and a number that is the same for the same set of them."""
    allowed = sorted(os.sched_getaffinity(0))
    return len(allowed), zlib.crc32(repr(allowed).encode())


def share(sets: Sequence[tuple[int, int]]) -> int:
    """Whole processors that each rank has to itself; 0 where ranks outnumber them.

    Ranks with the same set share it; different sets are taken as disjoint, as launchers make them.
    """
    ranks = Counter(sets)
    return min(count // ranks[count, number] for count, number in ranks)


def shm_wish(options: Options, own: int) -> _native.ShmWish:
    """What to ask the shm engine for. `own`: of `share`, equal on all ranks."""
    measured = options.channels == 0
    channels = min(max(own, 1), MOST_MEASURED_CHANNELS) if measured else options.channels
    return _native.ShmWish(options.arena_bytes, channels, fewer_channels=measured, crowded=own == 0)
