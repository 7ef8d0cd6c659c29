"""Bits depend on inputs, operation, codec, bit class and number of ranks. Hypothesis looks for anything else they hang
on: how buckets are cut into messages, how many threads move them, instruction set, flush-to-zero, where memory lies.

Every result is compared with the reference byte for byte, and over ranks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import cases
import numpy as np
import pytest
import reference
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpcomm import _native
from dpcomm.options import ENCODED

Array = cases.Array

DEADLINE_S = 30.0
GUARD = 0xA5  # every byte between segments


@dataclass(frozen=True)
class Setting:
    """What must not matter."""

    simd: str
    channels: int
    slots: int
    slice_bytes: int  # 0: as usual


@dataclass(frozen=True)
class Case:
    """What matters, and where the segments lie in memory: `gaps[s]` elements before segment s."""

    nranks: int
    dtype: str
    op: str
    codec: str
    algorithm: str
    kind: str  # of values: "normal", "special" or "bits"
    counts: tuple[int, ...]
    gaps: tuple[int, ...]
    seed: int

    def inputs(self, rank: int) -> list[Array]:
        rng = np.random.default_rng([self.seed, rank, *self.counts])
        if self.kind == "bits":  # every bit pattern: a third of all exponents overflows or underflows when added
            itemsize = cases.values(self.dtype, 1, rng).itemsize
            raw = [rng.integers(0, 256, n * itemsize, np.uint8) for n in self.counts]
            return [x.view(reference.BFLOAT16 if self.dtype == "bfloat16" else self.dtype) for x in raw]
        return [cases.values(self.dtype, n, rng, self.kind == "special") for n in self.counts]

    def expected(self) -> list[Array]:
        bit_class = "ring" if self.algorithm == "ring" else "rank_order"
        inputs = [self.inputs(rank) for rank in range(self.nranks)]
        return reference.allreduce(inputs, self.op, codec=self.codec, bit_class=bit_class)


def flushes() -> bool:
    """Whether this thread turns denormals into zero: a control that the setting is in force at all."""
    return bool(np.float32(1e-40) * np.float32(1) == 0)


class Group:
    """Ranks that are threads, each with a thread that stays."""

    def __init__(self, nranks: int, setting: Setting) -> None:
        wish = _native.ShmWish(
            64 * 2**20,
            channels=setting.channels,
            crowded=nranks > (os.cpu_count() or 1),
            slots=setting.slots,
            slice_bytes=setting.slice_bytes,
        )
        self.comms = _native.local_group(nranks, wish, DEADLINE_S, setting.simd, "abcd")
        described = self.comms[0].describe()
        assert (described["simd"], described["slots"]) == (setting.simd, setting.slots)
        assert described["channels"] == setting.channels
        self.threads = ThreadPoolExecutor(nranks)

    def run(self, case: Case, flushing: set[int]) -> list[list[Array]]:
        """The results of all ranks; the threads of some flush denormals to zero."""
        waiting = [self.threads.submit(self._run_rank, rank, case, rank in flushing) for rank in range(case.nranks)]
        return [future.result(DEADLINE_S) for future in waiting]

    def _run_rank(self, rank: int, case: Case, flush: bool) -> list[Array]:
        xs = case.inputs(rank)
        itemsize = xs[0].itemsize
        begins, end = [], 0
        for gap, x in zip(case.gaps, xs, strict=True):
            begins.append(end + gap * itemsize)
            end = begins[-1] + x.nbytes
        memory = np.full(end + 64, GUARD, np.uint8)
        for begin, x in zip(begins, xs, strict=True):
            memory[begin : begin + x.nbytes] = x.view(np.uint8)
        torch.set_flush_denormal(flush)
        try:
            self.comms[rank].run(
                [memory.ctypes.data + begin for begin in begins],
                [x.size for x in xs],
                _native.DTYPES[case.dtype],
                _native.OPS[case.op],
                _native.CODECS[case.codec],
                _native.ALGORITHMS[case.algorithm],
                -1,
            )
            assert flushes() == flush, "a call changed the floating-point settings of its caller"
        finally:
            torch.set_flush_denormal(False)
        results = [memory[begin : begin + x.nbytes].view(x.dtype).copy() for begin, x in zip(begins, xs, strict=True)]
        for begin, x in zip(begins, xs, strict=True):
            memory[begin : begin + x.nbytes] = GUARD
        assert (memory == GUARD).all(), "memory between the segments was written"
        return results

    def close(self) -> None:
        for comm in self.comms:
            comm.close(0.0)
        self.threads.shutdown()


Groups = Callable[[int, Setting], Group]


@pytest.fixture(scope="module")
def groups() -> Iterator[Groups]:
    """groups(nranks, setting): kept, so that calls of many kinds follow each other on the same slots and counters."""
    kept: dict[tuple[int, Setting], Group] = {}

    def get(nranks: int, setting: Setting) -> Group:
        key = (nranks, setting)
        if key not in kept:
            kept[key] = Group(nranks, setting)
        return kept[key]

    yield get
    for group in kept.values():
        group.close()


SETTINGS = st.builds(
    Setting,
    simd=st.sampled_from(_native.simd()),
    channels=st.sampled_from([1, 2, 3]),
    slots=st.sampled_from([4, 16]),
    slice_bytes=st.sampled_from([1024, 3000, 0]),  # a group or two; 0 is 128 KiB
)


# Hypothesis likes small numbers: large ones, which give every channel many slices, are chosen on purpose.
sizes = st.builds(lambda big, small: big + small, st.sampled_from([30_000, 0, 256, 9_000]), st.integers(0, 300))


@st.composite
def drawn_cases(draw: st.DrawFn) -> Case:
    codec = draw(st.sampled_from(["none", "fp16"]))
    dtype = draw(st.sampled_from(cases.DTYPES if codec == "none" else ENCODED))
    counts = draw(st.lists(sizes, min_size=1, max_size=4))
    return Case(
        nranks=draw(st.sampled_from([2, 3, 4])),
        dtype=dtype,
        op=draw(st.sampled_from(cases.operations(dtype, codec))),
        codec=codec,
        algorithm=draw(st.sampled_from(["auto", "direct", "oneshot", "ring"])),
        kind=draw(st.sampled_from(["normal", "special", "bits"] if dtype in cases.FLOATS else ["normal"])),
        counts=tuple(counts),
        gaps=tuple(draw(st.lists(st.integers(0, 9), min_size=len(counts), max_size=len(counts)))),
        seed=draw(st.integers(0, 2**32)),
    )


# The same examples in every run: a rare failure belongs in a test of its own, not in somebody else's run.
some = settings(
    max_examples=400,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@some
@given(case=drawn_cases(), setting=SETTINGS, flushing=st.sets(st.integers(0, 3)))
def test_bits_depend_on_nothing_else(groups: Groups, case: Case, setting: Setting, flushing: set[int]) -> None:
    results = groups(case.nranks, setting).run(case, flushing)
    cases.check_bits(results, case.expected(), f"{case}, {setting}, flushing {flushing}")


SPREAD = Case(3, "float32", "sum", "none", "direct", "normal", (20_000, 7), (1, 3), 5)


def every_setting() -> list[Setting]:
    return [
        Setting(simd, channels, slots, slice_bytes)
        for simd in _native.simd()
        for channels, slots, slice_bytes in [(1, 4, 1024), (2, 16, 1024), (3, 4, 3000), (1, 16, 0)]
    ]


@pytest.mark.parametrize("algorithm", ["direct", "oneshot", "ring"])
@pytest.mark.parametrize("codec", ["none", "fp16"])
def test_every_setting_gives_the_same_bits(groups: Groups, codec: str, algorithm: str) -> None:
    """The same large bucket of awkward values through all of them; half of the ranks flush denormals."""
    for kind in ("special", "bits"):
        case = Case(4, "float32", "mean", codec, algorithm, kind, (30_000, 3, 0, 10_001), (1, 0, 2, 5), 7)
        expected = case.expected()
        for setting in every_setting():
            cases.check_bits(groups(4, setting).run(case, {1, 2}), expected, f"{case}, {setting}")


def test_another_order_of_terms_would_be_found(groups: Groups) -> None:
    """Negative control: sums in ring order, or ranks in another order, are other bits."""
    results = groups(3, every_setting()[1]).run(SPREAD, set())
    cases.check_bits(results, SPREAD.expected(), SPREAD)
    inputs: list[Any] = [SPREAD.inputs(rank) for rank in (2, 0, 1)]
    for other in (
        reference.allreduce(inputs[1:] + inputs[:1], bit_class="ring"),
        reference.allreduce(inputs),
    ):
        with pytest.raises(AssertionError, match="elements of segment 0 differ"):
            cases.check_bits(results, other, SPREAD)
