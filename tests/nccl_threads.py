"""Engine nccl without a GPU: ranks that are threads of one process, which has both stand-ins of stand_in.py.

def body(_: int, __: int, nranks: int) -> ...:      what a test runs in that process: nccl.run(body, nranks)
    with ranks(nranks) as members:                  their communicators; closed at the end, together
        results = together(members, lambda m: m.reduce(m.array(...)).x)
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import stand_in
import torch.distributed as dist
from faulty import Caught, in_threads
from numpy.typing import NDArray
from ranks import Pool
from stand_in import GpuArray
from stores import build

import dpcomm

LONG_S = 20.0  # of whatever should succeed
DEVICES = 8

marks = [
    pytest.mark.timeout(900),  # the first test waits for the compiler
    pytest.mark.skipif(bool(stand_in.WHY_NOT), reason=stand_in.WHY_NOT),
]


class Process:
    """The process of all tests of a module; a new one after a failure."""

    def __init__(self) -> None:
        self._pool: Pool | None = None

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """function(0, 1, *args) in the process, with knobs and counters of the stand-in NCCL as at its start."""
        if self._pool is None or self._pool.broken:
            self._pool = Pool(1, env=stand_in.nccl_environment(f"devices={DEVICES}"))
        return self._pool.run(with_fresh_knobs, function, args)[0]

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()


@pytest.fixture(scope="module", name="nccl")
def nccl_process() -> Iterator[Process]:
    process = Process()
    yield process
    process.close()


def with_fresh_knobs(rank: int, nranks: int, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Also looks for communicators that nobody gave back."""
    try:
        result = function(rank, nranks, *args)
    finally:
        library().stand_in_nccl_reset()
    assert count("comms") == 0, f"{count('comms')} communicators of NCCL are left"
    return result


# --- in that process -------------------------------------------------------------------------------------------------


@cache
def library() -> ctypes.CDLL:
    """The stand-in NCCL; tests/cpp/stand_in_nccl/stand_in_nccl.h says what its knobs and counters are."""
    made = ctypes.CDLL(os.environ["DPCOMM_NCCL_LIBRARY"])
    made.stand_in_nccl_set.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_int64]
    made.stand_in_nccl_fail.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_char_p]
    made.stand_in_nccl_count.argtypes = [ctypes.c_char_p, ctypes.c_int]
    made.stand_in_nccl_count.restype = ctypes.c_int64
    return made


def turn(knob: str, value: int, rank: int = -1) -> None:
    """Sets a knob, until the test ends; rank -1: of all."""
    library().stand_in_nccl_set(knob.encode(), rank, value)


def break_rank(rank: int, result: int, text: str) -> None:
    """NCCL's own threads of that rank meet an error now."""
    library().stand_in_nccl_fail(rank, result, text.encode())


def count(counter: str, rank: int = -1) -> int:
    return int(library().stand_in_nccl_count(counter.encode(), rank))


class Member:
    """One rank. Its arrays live as long as it: streams may be at work on them."""

    def __init__(self, comm: dpcomm.Communicator) -> None:
        self.comm, self.rank, self.nranks = comm, comm.rank, comm.nranks
        self._arrays: list[GpuArray] = []

    def array(self, x: NDArray[Any], **facts: Any) -> GpuArray:
        assert self.comm.device.index is not None
        self._arrays.append(GpuArray(x, self.comm.device.index, **facts))
        return self._arrays[-1]

    def full(self, value: float, size: int = 1000) -> GpuArray:
        return self.array(np.full(size, value, np.float32))

    def reduce(self, x: Any = None, op: str = "sum", **options: Any) -> Any:
        """One call, waited for on the host: what fails on the device is raised."""
        x = self.full(self.rank + 1.0) if x is None else x
        assert self.comm.allreduce(x, op, async_op=True, **options).wait(LONG_S)
        return x


def asked(nranks: int, **options: Any) -> list[dict[str, Any]]:
    """The options of each rank, a GPU for each; options that are lists are by rank."""
    by_rank: dict[str, list[Any]] = {
        "engine": ["nccl"] * nranks,
        "device": list(range(nranks)),
        "timeout_s": [LONG_S] * nranks,
        **{name: value if isinstance(value, list) else [value] * nranks for name, value in options.items()},
    }
    return [{name: values[rank] for name, values in by_rank.items()} for rank in range(nranks)]


def hash_store() -> Any:
    return dist.HashStore()  # type: ignore[attr-defined]


def construct(nranks: int, **options: Any) -> list[Any]:
    """Communicators, or what their construction raised."""
    return build([hash_store()] * nranks, asked(nranks, **options))


@contextmanager
def ranks(nranks: int, **options: Any) -> Iterator[list[Member]]:
    """Ranks whose construction must succeed."""
    with members_of(construct(nranks, **options)) as members:
        yield members


@contextmanager
def members_of(comms: Sequence[Any]) -> Iterator[list[Member]]:
    """Takes over communicators that `build` made."""
    failed = [comm.failure.trace for comm in comms if isinstance(comm, Caught)]
    try:
        assert not failed, failed[0]
        yield [Member(comm) for comm in comms]
    finally:
        good(in_threads([comm.close for comm in comms if not isinstance(comm, Caught)]))


def together(members: Sequence[Member], body: Callable[[Member], Any]) -> list[Any]:
    """body on all ranks at once; the results, or what was raised, as Caught."""
    return in_threads([partial(body, member) for member in members])


def good(results: list[Any]) -> list[Any]:
    """Results none of which may be an error."""
    failed = [result.failure.trace for result in results if isinstance(result, Caught)]
    assert not failed, failed[0]
    return results
