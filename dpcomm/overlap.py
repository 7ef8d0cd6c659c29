"""Whether arrays of a call share memory: one sort, however many there are. Knows addresses, never what lies there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dpcomm.arrays import Intervals, Parts
from dpcomm.errors import ArgumentError


def check_overlap(lists: Sequence[Parts]) -> None:
    """Raises ArgumentError where two arrays of all lists share memory (row-wise interleaved views do not)."""
    extents = np.concatenate([one.extents() for one in lists], axis=1)
    if _overlap(extents) is None:
        return
    segments = [one.segments.get(place) for one in lists for place in range(len(one.counts))]
    runs = [extents[:, [i]] if made is None or not made.count else made.runs() for i, made in enumerate(segments)]
    found = _overlap(np.concatenate(runs, axis=1))
    if found is not None:
        owners = np.repeat(np.arange(len(runs)), [one.shape[1] for one in runs])
        first, second = sorted(owners[list(found)])
        raise ArgumentError(
            f"allreduce: tensors {first} and {second} overlap by {_shared_bytes(runs[first], runs[second])} bytes. "
            "Pass each memory once."
        )


def _overlap(intervals: Intervals) -> tuple[int, int] | None:
    """Two intervals that overlap, if any do."""
    order = intervals[0].argsort(kind="stable")
    starts, ends = intervals[:, order]
    inside = starts[1:] < np.maximum.accumulate(ends)[:-1]
    if not inside.any():
        return None
    later = int(inside.argmax()) + 1
    return int(order[ends[:later].argmax()]), int(order[later])


def _shared_bytes(a: Intervals, b: Intervals) -> int:
    """How many bytes two arrays share, of which neither overlaps itself."""
    both = np.concatenate([a, b], axis=1)
    starts, ends = both[:, both[0].argsort()]
    reach = np.maximum.accumulate(ends)
    covered = reach[0] - starts[0] + (reach[1:] - np.maximum(starts[1:], reach[:-1])).sum()
    return int((both[1] - both[0]).sum() - covered)
