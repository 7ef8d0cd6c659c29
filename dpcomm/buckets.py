"""The arrays of a call become buckets: the calls that the engine makes. Knows sizes, never memory."""

from __future__ import annotations

from typing import NamedTuple

from dpcomm.arrays import ITEMSIZES, Parts


class Bucket(NamedTuple):
    """What the engine reduces at once, all of one dtype."""

    dtype: str
    addresses: list[int]
    counts: list[int]


def pack(parts: Parts, cap_bytes: float) -> list[Bucket]:
    """Packs arrays in order, with one open bucket per dtype.

    A bucket closes when the next array would pass `cap_bytes`; a larger array is a bucket of its own; none is split.
    Buckets come in the order of their first arrays, so that every rank makes the same calls. No array at all is one
    empty bucket: ranks that do have some find out.
    """
    kinds = set(parts.dtypes) or {"float32"}
    if len(kinds) == 1:
        (dtype,) = kinds
        if sum(parts.counts) * ITEMSIZES[dtype] <= cap_bytes:
            return [Bucket(dtype, parts.addresses, parts.counts)]
    buckets: list[Bucket] = []
    open_buckets: dict[str, tuple[Bucket, int]] = {}
    for address, count, dtype in zip(parts.addresses, parts.counts, parts.dtypes, strict=True):
        size = count * ITEMSIZES[dtype]
        bucket, used = open_buckets.get(dtype, (None, 0))
        if bucket is None or used + size > cap_bytes:
            bucket, used = Bucket(dtype, [], []), 0
            buckets.append(bucket)
        bucket.addresses.append(address)
        bucket.counts.append(count)
        open_buckets[dtype] = bucket, used + size
    return buckets
