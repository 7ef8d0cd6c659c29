"""What all-reduce tests have in common: inputs from seeds, calls, and the comparison with the reference, to the bit.

A case says everything about a call, so that each rank's process can make its own inputs and report a digest.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import reference
import torch
from numpy.typing import NDArray

import dpcomm

Array = NDArray[Any]

RANKS = (1, 2, 3, 4, 5, 8)
ALGORITHMS = ("direct", "oneshot", "ring", "auto")
FLOATS = ("float32", "float64", "float16", "bfloat16")
DTYPES = (*FLOATS, "int32", "int64")
ENCODED = ("float32", "float16", "bfloat16")  # what codecs other than none serve
CARRIED = {"bfloat16": reference.BFLOAT16}  # numpy has no bfloat16: bit patterns stand for it
UNSIGNED = {2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclass(frozen=True)
class Case:
    """One all-reduce: `counts` are the elements of each segment; more than one makes a list of tensors."""

    counts: tuple[int, ...]
    dtype: str = "float32"
    op: str = "sum"
    codec: str = "none"
    algorithm: str = "auto"
    special: bool = False  # NaN, Inf, denormals, signed zeros, 1e30 and 1e-30 among the values
    seed: int = 0

    def inputs(self, rank: int) -> list[Array]:
        rng = np.random.default_rng([self.seed, rank, *self.counts])
        return [values(self.dtype, count, rng, self.special) for count in self.counts]

    @property
    def bit_class(self) -> str:
        """Of codes; what a library makes of values has other bits than class native has here."""
        return self.algorithm if self.algorithm in ("ring", "native") else "rank_order"

    def expected(self, nranks: int) -> list[Array]:
        inputs = [self.inputs(r) for r in range(nranks)]
        return reference.allreduce(inputs, self.op, codec=self.codec, bit_class=self.bit_class)

    def expected_between(self, hosts: Sequence[Sequence[int]], intra_codec: str = "none") -> list[Array]:
        """Of engine two_level. Sums of float16 that leave the algorithm open go flat: a host's could overflow."""
        nranks = sum(map(len, hosts))
        open_flat = self.dtype == "float16" and self.op in ("sum", "mean")
        if self.algorithm != "two_level" and (self.algorithm != "auto" or open_flat):
            return self.expected(nranks)
        how: dict[str, Any] = {"bit_class": "two_level", "hosts": hosts, "intra_codec": intra_codec}
        return reference.allreduce([self.inputs(r) for r in range(nranks)], self.op, codec=self.codec, **how)

    def added_by_gloo(self, nranks: int) -> bool:
        """Whether engine gloo hands it to gloo's own all-reduce: its order of terms, its NaNs."""
        size = sum(-(-count // 256) * 256 for count in self.counts) * {"float32": 4, "float64": 8}.get(self.dtype, 0)
        plain = self.algorithm == "auto" and self.codec == "none" and self.op in ("sum", "mean")
        each = size / max(1, len(self.counts))
        return plain and nranks > 2 and size >= 512 << 10 and each >= 256 << 10

    @property
    def options(self) -> dict[str, Any]:
        return {"codec": self.codec, "algorithm": self.algorithm}


def run_case(comm: dpcomm.Communicator, rank: int, case: Case) -> list[torch.Tensor]:
    """One rank's results."""
    xs = [tensor(x) for x in case.inputs(rank)]
    comm.allreduce(xs if len(xs) > 1 else xs[0], case.op, **case.options)
    return xs


def operations(dtype: str, codec: str = "none") -> tuple[str, ...]:
    if codec != "none":
        return ("sum", "mean")
    return ("sum", "mean", "min", "max") if dtype in FLOATS else ("sum", "min", "max")


# --- values ----------------------------------------------------------------------------------------------------------


def values(dtype: str, count: int, rng: np.random.Generator, special: bool = False) -> Array:
    """Numbers whose sums round in every place: full significands over a few binades, integers over the whole range."""
    if dtype not in FLOATS:
        span = np.iinfo(dtype)
        return rng.integers(span.min, span.max, count, dtype=dtype, endpoint=True)
    x = rng.standard_normal(count) * np.exp2(rng.integers(-3, 4, count))
    if special:
        x = x * rng.choice([1.0, 1e30, 1e-30], -(-count // 100)).repeat(100)[:count]  # groups that mix magnitudes
    with np.errstate(over="ignore"):
        cast = reference.to_bf16(x.astype(np.float32)) if dtype == "bfloat16" else x.astype(dtype)
    return plant_specials(cast, dtype, rng) if special else cast


def plant_specials(x: Array, dtype: str, rng: np.random.Generator) -> Array:
    """Every tenth element of some stretches becomes one of the values that arithmetic treats apart."""
    bits = UNSIGNED[x.itemsize]
    digits = {"float16": 10, "bfloat16": 7, "float32": 23, "float64": 52}[dtype]
    sign = 1 << (8 * x.itemsize - 1)
    infinity = (sign - 1) >> digits << digits
    quiet = infinity | 1 << (digits - 1)
    finite = [0, sign, 1, sign | 3, (1 << digits) - 1, 1 << digits, infinity - 1, sign | infinity - 1]
    wild = [infinity, sign | infinity, quiet, sign | quiet | 5, infinity | 1, sign | infinity | 3]  # NaNs with payloads
    chosen = rng.random(x.size) < 0.1
    pool = np.array(finite + wild, bits)
    planted = np.where(chosen, rng.choice(pool, x.size), x.view(bits))
    stretch = np.arange(x.size) // 64 % 8
    planted = np.where(stretch == 1, rng.choice(pool[: len(finite)], x.size), planted)  # finite only
    planted = np.where((stretch == 3) & (x.size > 700), np.array(sign, bits), planted)  # nothing but -0
    return planted.astype(bits).view(x.dtype)


# --- torch and back --------------------------------------------------------------------------------------------------


def tensor(x: Array) -> torch.Tensor:
    """A tensor with the array's bits, in memory of its own."""
    if x.dtype == reference.BFLOAT16:
        return torch.from_numpy(x.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(x.copy())


def array(x: torch.Tensor | Array) -> Array:
    """The bits of a tensor as an array, flat."""
    if isinstance(x, np.ndarray):
        return np.ascontiguousarray(x).reshape(-1)
    x = x.detach().contiguous().reshape(-1)
    if x.dtype == torch.bfloat16:
        return x.view(torch.int16).numpy().view(np.uint16)
    return np.asarray(x.numpy())


def digest(xs: Sequence[torch.Tensor | Array]) -> str:
    """A hash over the bytes of all of them, which two ranks can compare."""
    state = hashlib.blake2b(digest_size=16)
    for x in xs:
        state.update(array(x).tobytes())
    return state.hexdigest()


# --- calls and their check -------------------------------------------------------------------------------------------


def check_bits(results: Sequence[Sequence[torch.Tensor | Array]], expected: Sequence[Array], what: object) -> None:
    """All ranks hold the expected bytes, and therefore the same.

    Raises:
        AssertionError: Names the first rank, segment and element that differs.
    """
    assert len({digest(xs) for xs in results}) == 1, f"{what}: replicas differ: {[digest(xs) for xs in results]}"
    for s, want in enumerate(expected):
        got = array(results[0][s])
        if got.tobytes() == want.tobytes():
            continue
        assert (got.size, got.dtype) == (want.size, want.dtype), f"{what}: segment {s} has another size or dtype"
        unsigned = UNSIGNED[got.itemsize]
        wrong = np.flatnonzero(got.view(unsigned) != want.view(unsigned))
        i = int(wrong[0])
        raise AssertionError(
            f"{what}: {wrong.size} of {got.size} elements of segment {s} differ, first at {i}: {got[i]!r} "
            f"({got.view(unsigned)[i]:#x}), expected {want[i]!r} ({want.view(unsigned)[i]:#x})"
        )


def run_local(comms: list[dpcomm.Communicator], case: Case) -> list[list[torch.Tensor]]:
    """The case on communicators that are threads; one tensor travels as itself, several as a list."""
    xs = [[tensor(x) for x in case.inputs(r)] for r in range(len(comms))]
    dpcomm.allreduce_local(comms, [x if len(x) != 1 else x[0] for x in xs], case.op, **case.options)
    return xs


def check_local(comms: list[dpcomm.Communicator], case: Case) -> None:
    check_bits(run_local(comms, case), case.expected(len(comms)), f"{len(comms)} ranks, {case}")


def local(nranks: int, *, arena_mb: int = 4, simd: str | None = None) -> list[dpcomm.Communicator]:
    """New communicators in this process. A small arena has small slots, so that small buckets take several."""
    wanted = {"DPCOMM_ARENA_MB": str(arena_mb), **({"DPCOMM_SIMD": simd} if simd else {})}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        return dpcomm.init_local(["cpu"] * nranks, timeout_s=20.0)
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
