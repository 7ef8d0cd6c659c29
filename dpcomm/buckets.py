"""Lists of segments become buckets: the calls that the engine makes. Knows sizes, never memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from dpcomm.arrays import Segment


class Bucket(NamedTuple):
    """The segments of one call, all of one dtype."""

    dtype: str
    segments: list[Segment]


def pack(parts: Sequence[Segment], cap_bytes: float) -> list[Bucket]:
    """Packs segments in order, with one open bucket per dtype.

    A bucket closes when the next segment would pass `cap_bytes`; a larger segment is a bucket of its own; none is
    split. Buckets come in the order of their first segments, so that every rank makes the same calls.
    """
    buckets: list[Bucket] = []
    open_buckets: dict[str, tuple[Bucket, int]] = {}
    for part in parts:
        size = part.count * part.itemsize
        bucket, used = open_buckets.get(part.dtype, (None, 0))
        if bucket is None or used + size > cap_bytes:
            bucket, used = Bucket(part.dtype, []), 0
            buckets.append(bucket)
        bucket.segments.append(part)
        open_buckets[part.dtype] = bucket, used + size
    return buckets
