"""How a communicator's calls are issued where data is on the CPU: they end before they return, or run on its thread.

`cuda_calls` is the same for GPUs. Both take validated arrays and requests; a communicator picks one and asks no more.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import Any, Protocol, TypeAlias

import torch

from dpcomm import _native, arrays
from dpcomm import options as opt
from dpcomm.arrays import Array, Parts
from dpcomm.buckets import pack
from dpcomm.errors import InternalError
from dpcomm.work import Work

# addresses, counts, dtype, op, codec, algorithm, DDP's bucket (-1 outside DDP)
Arguments: TypeAlias = "tuple[list[int], list[int], int, int, int, int, int]"


class Calls(Protocol):
    """What a communicator asks of them."""

    def parts(self, x: Any) -> Parts:
        """Validates an array or a list of them, which must lie on the communicator's device."""

    def run_plainly(self, x: Array, request: opt.Request) -> bool:
        """All-reduces x at the least cost, if it is of the usual kind; False where it is not and nothing was done."""

    def run(self, parts: Parts, request: opt.Request) -> None:
        """All-reduces in place; afterwards the caller may use the arrays as after any operation of their library."""

    def submit(self, parts: Parts, request: opt.Request, owner: object) -> Work:
        """The same, to be waited for. owner: lives as long as the Work."""

    def release(self) -> None:
        """Lets go of the arrays of calls that have ended."""


def arguments(parts: Parts, request: opt.Request, cap_bytes: float) -> list[Arguments]:
    """What the extension is called with: the parts in buckets of at most `cap_bytes`."""
    made = []
    for bucket in pack(parts, cap_bytes):
        dtype, width = request.dtypes[bucket.dtype]
        counts = bucket.counts if width == 1 else [count * width for count in bucket.counts]
        made.append((bucket.addresses, counts, dtype, request.op, request.codec, request.algorithm, -1))
    return made


def plain_arguments(plain: arrays.Plain, request: opt.Request, bucket: int) -> Arguments:
    """The same for one array.

    Raises:
        UnsupportedError: The request does not serve its dtype.
    """
    address, count, dtype = plain
    served = request.dtypes.get(dtype)
    if served is None:
        raise opt.refuse_dtype(dtype, request)
    return [address], [count * served[1]], served[0], request.op, request.codec, request.algorithm, bucket


class CpuCalls:
    """Calls of engine shm; with native None of one rank, which has nothing to do."""

    def __init__(self, native: _native.Comm | None, cap_bytes: float) -> None:
        self._native, self._cap_bytes = native, cap_bytes
        self._pending: deque[Work] = deque()
        # Of those, what a call works on, and not the communicator: its finalizer holds on to this while it closes.
        self.in_use: deque[object] = deque()
        self._both = threading.RLock()  # over the two; a signal's handler may submit, too

    def parts(self, x: Any) -> Parts:
        """See `Calls`."""
        return arrays.parts(x)

    def run_plainly(self, x: Array, request: opt.Request) -> bool:
        """Nothing: `Communicator.allreduce` itself has taken what is usual."""
        return False

    def run(self, parts: Parts, request: opt.Request) -> None:
        """See `Calls`."""
        if self._native is None:
            return
        for call in arguments(parts, request, self._cap_bytes):
            self._native.run(*call)
        for segment in parts.segments.values():
            segment.finish()

    def submit(self, parts: Parts, request: opt.Request, owner: object) -> Work:
        """See `Calls`."""
        self.release()
        work = Work(list(parts.segments.values()), (owner, parts.kept))
        if self._native is None:
            return work
        try:
            for call in arguments(parts, request, self._cap_bytes):
                work._add(self._native.submit(*call))
        finally:  # the arrays must live even if a later submit raises; a Work without its jobs would look complete
            with self._both:
                self._pending.append(work)
                self.in_use.append(parts)
        return work

    def submit_bucket(self, x: torch.Tensor, request: opt.Request, bucket: int) -> _native.Job | None:
        """Queues one DDP bucket, which must need no copy; the caller keeps x alive. None where there is one rank."""
        plain = arrays.direct(x)
        if plain is None:
            raise InternalError(
                f"DDP bucket {bucket} is not contiguous memory on CPU: {x.device}, strides {x.stride()}"
            )
        if self._native is None:
            return None
        return self._native.submit(*plain_arguments(plain, request, bucket))

    def release(self) -> None:
        """See `Calls`; calls end in the order of their submission."""
        if not self._both.acquire(blocking=False):
            return  # another thread does it
        try:
            while self._pending and (work := self._pending[0]).is_completed():
                if self._pending and self._pending[0] is work:  # else a signal's handler was here
                    self._pending.popleft()
                    self.in_use.popleft()
        finally:
            self._both.release()
