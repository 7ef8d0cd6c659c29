"""The bits that an all-reduce must produce, in plain NumPy: slow, short, and written before the C++ that it judges.

Nothing here knows of threads, slots, algorithms or torch. An array of dtype uint16 is bfloat16, as bit patterns.

    class rank_order   y = D(E(mean(D(E(x_0)) + D(E(x_1)) + ... )))            sums in rank order
    class native       what a library's own all-reduce makes of plain 16 bits, if it adds in rank order; each sum rounds
    class ring         m = E(x_c), then m = E(D(m) + x_r) for r = c+1 ... c-1   c: the chunk that a group belongs to
    class two_level    h = D'(E'(x_i)) + D'(E'(x_j)) + ...                     over the ranks of each host
                       y = D'(E'(D(E(mean(D(E(h_0)) + D(E(h_1)) + ... )))))    sums in host order; the mean is of ranks

E and D encode and decode one group: up to 256 consecutive elements of one segment (one tensor of a list). E' and D' are
those of the codec inside hosts; h and y are rounded into the tensor's dtype wherever they lie in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Combine = Callable[[Array, Array], Array]

GROUP = 256  # elements that share an exponent
MOST = 126  # |k| at most: 2^k and 2^-k stay normal
BFLOAT16 = np.dtype(np.uint16)  # how bfloat16 arrays are carried
CANONICAL_NAN = {"float16": 0x7E00, "float32": 0x7FC00000, "float64": 0x7FF8000000000000}


# --- dtypes ----------------------------------------------------------------------------------------------------------


def to_bf16(x: Array) -> Array:
    """float32 values rounded to nearest even into bfloat16 bit patterns; NaN becomes 0x7fc0."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(x), np.uint64(0x7FC0), rounded).astype(np.uint16)


def from_bf16(bits: Array) -> Array:
    """bfloat16 bit patterns as float32: exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def widen(x: Array) -> Array:
    """The values in the type that sums are made in: 16-bit floats in float32, all others in their own."""
    if x.dtype == BFLOAT16:
        return from_bf16(x)
    return x.astype(np.float32) if x.dtype == np.float16 else x


def narrow(x: Array, dtype: np.dtype[Any]) -> Array:
    """A result in the tensor's type: rounded to nearest even, its NaNs canonical (quiet, positive, no payload)."""
    if dtype == BFLOAT16:
        return to_bf16(x)
    with np.errstate(over="ignore"):
        return canonical(x.astype(dtype))


def canonical(x: Array) -> Array:
    """All NaNs replaced by one pattern; which operand's payload survives an addition is not defined anywhere."""
    if x.dtype.kind != "f":
        return x
    unsigned = np.dtype(f"u{x.dtype.itemsize}")
    nan = np.array(CANONICAL_NAN[x.dtype.name], unsigned).view(x.dtype)
    return np.where(np.isnan(x), nan, x).astype(x.dtype)


# --- codec fp16 ------------------------------------------------------------------------------------------------------


def encode_fp16(group: Array) -> tuple[Array, Array]:
    """Encodes float32 groups; the last axis is one group, axes before it are many.

    Returns:
        codes (uint16, the shape of `group`) and exponents k (int8, one a group): the largest finite magnitude times
        2^k lies in [2^14, 2^15). NaN and Inf stay themselves and do not take part in the maximum.
    """
    finite = np.where(np.isfinite(group), np.abs(group), np.float32(0))
    top = finite.max(axis=-1, initial=np.float32(0))
    exponent = np.frexp(top)[1].astype(np.int64) - 1  # floor(log2(top)), of denormals too
    k = np.where(top > 0, np.clip(14 - exponent, -MOST, MOST), 0)
    with np.errstate(all="ignore"):
        scaled = (group * power_of_two(k)[..., None]).astype(np.float16)
    return canonical(scaled).view(np.uint16), k.astype(np.int8)


def decode_fp16(codes: Array, exponent: Array) -> Array:
    """What `encode_fp16` gave, as float32; a NaN is 0x7fc00000."""
    with np.errstate(all="ignore"):
        values = codes.view(np.float16).astype(np.float32) * power_of_two(-exponent.astype(np.int64))[..., None]
    return canonical(values)


def power_of_two(k: Array) -> Array:
    """2^k as float32: exact for |k| <= 126."""
    return np.asarray(np.ldexp(np.float32(1), k), np.float32)


def through_fp16(x: Array) -> Array:
    """D(E(x)) of a segment of float32: cut into groups from its own start, the last one may be short."""
    groups = -(-x.size // GROUP)
    padded = np.zeros(groups * GROUP, np.float32)  # zeros never change a maximum
    padded[: x.size] = x
    decoded: Array = decode_fp16(*encode_fp16(padded.reshape(groups, GROUP)))
    return np.asarray(decoded.reshape(-1)[: x.size])


# --- operations ------------------------------------------------------------------------------------------------------


def plus(a: Array, b: Array) -> Array:
    """Integers wrap: they are added as unsigned numbers."""
    if a.dtype.kind == "i":
        unsigned = np.dtype(f"u{a.dtype.itemsize}")
        wrapped: Array = a.view(unsigned) + b.view(unsigned)
        return np.asarray(wrapped.view(a.dtype))
    with np.errstate(all="ignore"):
        total: Array = a + b
        return total


def smaller(a: Array, b: Array) -> Array:
    """NaN wins; -0 is below +0."""
    below = (a < b) | ((a == b) & np.signbit(a))
    return np.where(np.isnan(a) | (~np.isnan(b) & below), a, b)


def larger(a: Array, b: Array) -> Array:
    """NaN wins; +0 is above -0."""
    above = (a > b) | ((a == b) & ~np.signbit(a))
    return np.where(np.isnan(a) | (~np.isnan(b) & above), a, b)


COMBINE: dict[str, Combine] = {"sum": plus, "mean": plus, "min": smaller, "max": larger}


def finish(total: Array, op: str, nranks: int) -> Array:
    """What the holder of the complete sum does before the final encode."""
    if op != "mean":
        return total
    with np.errstate(all="ignore"):
        return np.asarray(total / total.dtype.type(nranks))


# --- all-reduce ------------------------------------------------------------------------------------------------------


def check(inputs: Sequence[Sequence[Array]], op: str, codec: str) -> None:
    """Refuses what has no meaning, so that a test cannot compare two nonsenses."""
    shapes = [[(x.size, x.dtype) for x in segments] for segments in inputs]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError("ranks disagree on counts or dtypes")
    kinds = {x.dtype.kind for x in inputs[0]}
    if op == "mean" and "i" in kinds:
        raise ValueError("mean of integers")
    encodable = (np.dtype(np.float32), np.dtype(np.float16), BFLOAT16)
    if codec != "none" and (op not in ("sum", "mean") or any(x.dtype not in encodable for x in inputs[0])):
        raise ValueError("codecs take sums and means of float32, float16 and bfloat16")


def check_hosts(hosts: Sequence[Sequence[int]], nranks: int, intra_codec: str) -> None:
    """Refuses what is no partition of the ranks: those of a host ascend, and hosts go by their lowest rank."""
    if sorted(rank for host in hosts for rank in host) != list(range(nranks)) or [] in map(list, hosts):
        raise ValueError(f"hosts {hosts} are no partition of {nranks} ranks")
    if list(map(list, hosts)) != sorted(map(sorted, hosts)):
        raise ValueError(f"hosts {hosts} are not in order")
    if intra_codec not in ("none", "fp16"):
        raise ValueError(f"unknown intra_codec {intra_codec!r}")


def allreduce(
    inputs: Sequence[Sequence[Array]],
    op: str = "sum",
    *,
    codec: str = "none",
    bit_class: str = "rank_order",
    hosts: Sequence[Sequence[int]] = (),
    intra_codec: str = "none",
) -> list[Array]:
    """The segments that every rank holds after an all-reduce of `inputs[rank][segment]`, flat.

    Args:
        inputs: one list of arrays a rank; each array is a segment, groups start anew in each.
        op: "sum", "mean", "min" or "max".
        codec: "none" or "fp16"; "fp16" or "bf16" in class native.
        bit_class: "rank_order", "ring", "native" or "two_level".
        hosts: Of class two_level, the ranks of each host, ascending; hosts by their lowest rank.
        intra_codec: Of class two_level, what travels inside hosts in calls whose codec is not "none".

    Raises:
        ValueError: the combination has no meaning, or the ranks' arrays differ in size or dtype.
    """
    check(inputs, op, codec)
    if bit_class == "two_level":
        check_hosts(hosts, len(inputs), intra_codec)
    flat = [[np.ascontiguousarray(x).reshape(-1) for x in segments] for segments in inputs]
    if len(flat) == 1:
        return [x.copy() for x in flat[0]]  # one rank: identity, whatever the codec; NaNs keep their bits
    if bit_class == "ring":
        return ring(flat, op, codec)
    if bit_class == "native":
        return [native([segments[s] for segments in flat], op, codec) for s in range(len(flat[0]))]
    if bit_class == "two_level":
        inside = intra_codec if codec != "none" else "none"
        return [two_level([segments[s] for segments in flat], op, codec, hosts, inside) for s in range(len(flat[0]))]
    return [rank_order([segments[s] for segments in flat], op, codec) for s in range(len(flat[0]))]


def arrived(x: Array, codec: str) -> Array:
    """What arrives of the values of a segment, in the type that sums are made in."""
    return through_fp16(widen(x)) if codec == "fp16" else widen(x)


def added(xs: Sequence[Array], op: str, codec: str) -> Array:
    """Contributions travel through the codec, one's own too."""
    return reduce(COMBINE[op], [arrived(x, codec) for x in xs])


def rank_order(xs: Sequence[Array], op: str, codec: str, contributors: int = 0) -> Array:
    """One segment, `xs[rank]`. The result travels, too. contributors: what a mean divides by, if not by the terms."""
    total = canonical(finish(added(xs, op, codec), op, contributors or len(xs)))
    return narrow(arrived(total, codec), xs[0].dtype)


def two_level(xs: Sequence[Array], op: str, codec: str, hosts: Sequence[Sequence[int]], intra_codec: str) -> Array:
    """One segment: class rank_order of the sums of the hosts. Sums and result go through memory of the tensor's type.

    Bits do not depend on which rank of a host adds up what.
    """
    dtype = xs[0].dtype
    sums = [narrow(added([xs[rank] for rank in host], op, intra_codec), dtype) for host in hosts]
    result = rank_order(sums, op, codec, contributors=len(xs))
    return narrow(arrived(result, intra_codec), dtype)


def native(xs: Sequence[Array], op: str, codec: str) -> Array:
    """One segment. No exponents: what 16 bits cannot hold becomes infinite. A mean divides before it encodes."""
    wire = {"fp16": np.dtype(np.float16), "bf16": BFLOAT16}[codec]

    def travelled(x: Array) -> Array:
        return widen(narrow(x, wire))

    codes = [travelled(finish(widen(x), op, len(xs))) for x in xs]
    total = reduce(lambda a, b: travelled(plus(a, b)), codes)
    return narrow(canonical(total), xs[0].dtype)


def ring(inputs: Sequence[Sequence[Array]], op: str, codec: str) -> list[Array]:
    """All segments together: the bucket's groups are dealt to N chunks in order, chunk c starts at rank c."""
    nranks = len(inputs)
    starts = [(s, begin) for s, x in enumerate(inputs[0]) for begin in range(0, x.size, GROUP)]
    chunk_groups = -(-len(starts) // nranks)
    results = [np.empty_like(x) for x in inputs[0]]
    for index, (s, begin) in enumerate(starts):
        owner = index // chunk_groups
        pieces = [inputs[(owner + i) % nranks][s][begin : begin + GROUP] for i in range(nranks)]
        results[s][begin : begin + GROUP] = once_round(pieces, op, codec)
    return results


def once_round(pieces: Sequence[Array], op: str, codec: str) -> Array:
    """One group on its way through the ranks. A message has the tensor's type under `none`: each hop rounds."""
    dtype = pieces[0].dtype
    travel = through_fp16 if codec == "fp16" else (lambda x: widen(narrow(x, dtype)))
    message = travel(widen(pieces[0]))
    for hop, piece in enumerate(pieces[1:], start=1):
        message = COMBINE[op](message, widen(piece))
        message = travel(finish(message, op, len(pieces)) if hop == len(pieces) - 1 else message)
    return narrow(message, dtype)


def relative_l2(y: Array, exact: Array) -> float:
    """||y - exact|| / ||exact|| in float64."""
    reference = exact.astype(np.float64)
    return float(np.linalg.norm(y.astype(np.float64) - reference) / np.linalg.norm(reference))
