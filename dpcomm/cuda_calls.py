"""How a communicator's calls are issued on a GPU: behind the caller's stream, on one of the communicator's own.

The host does not wait for the device, so memory must outlive the call: torch's allocator is told which stream uses it,
and what an asynchronous call was given is held until it has ended on the device.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch

from dpcomm import _native, cuda_arrays
from dpcomm import options as opt
from dpcomm.arrays import Array, Parts, Segment
from dpcomm.calls import Arguments, arguments, plain_arguments
from dpcomm.errors import CommTimeoutError, InternalError
from dpcomm.work import WAIT_SLICE_S, Work, check_timeout


class CudaWork(Work):
    """The handle of an asynchronous all-reduce on a GPU. Without a time limit, `wait` does not block the host."""

    def __init__(self, segments: Sequence[Segment], kept: Sequence[Array], owner: object, calls: CudaCalls) -> None:
        super().__init__(segments, (owner, kept))
        self._kept, self._calls = kept, calls
        self._pendings: list[_native.Pending] = []

    def wait(self, timeout_s: float | None = None) -> bool:
        """Lets the current stream of the arrays' library wait for the call's end; see `Work.wait`.

        Args:
            timeout_s: None does not block the host. Else the host waits, too, for that many seconds at most.
        """
        check_timeout(timeout_s)
        if timeout_s is not None:
            self._wait_on_host(timeout_s)
        self._join()
        super()._finish()
        return True

    def is_completed(self) -> bool:
        """Whether the call has ended on the device, with or without an error."""
        if not all(pending.is_completed() for pending in self._pendings):
            return False
        if self.exception() is None:
            self._finish()
        return True

    def exception(self) -> Exception | None:
        """The call's error; None if it succeeded or still runs."""
        errors = (pending.exception() for pending in self._pendings)
        return next((error for error in errors if error is not None), None)

    def _wait_on_host(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        for pending in self._pendings:
            while not pending.synchronize(min(WAIT_SLICE_S, max(deadline - time.monotonic(), 0.0))):
                if time.monotonic() >= deadline:
                    raise CommTimeoutError(f"wait: the call has not ended in {timeout_s} s. It goes on; wait again.")

    def _join(self) -> None:
        if self._pendings:
            for stream in cuda_arrays.streams_of(self._kept, self._calls.ordinal):
                for pending in self._pendings:
                    pending.join(stream, self._calls.timeout_s)

    def _finish(self) -> None:
        if self._segments:  # the copies back run on streams that may know nothing of the call yet
            self._join()
        super()._finish()


class CudaCalls:
    """Calls of engine p2p; with native None of one rank, which has nothing to do.

    Attributes:
        ordinal: Of the GPU.
        timeout_s: For which the host may wait for other ranks of this process.
    """

    def __init__(self, native: _native.Comm | None, ordinal: int, cap_bytes: float, timeout_s: float) -> None:
        self._native, self._cap_bytes = native, cap_bytes
        self.ordinal, self.timeout_s = ordinal, timeout_s
        self._held: deque[tuple[list[_native.Pending], Parts]] = deque()
        # A graph uses its arrays whenever it is replayed, and nobody says when that was the last time.
        self._of_graphs: list[Parts] = []

    def parts(self, x: Any) -> Parts:
        """See `calls.Calls`."""
        return cuda_arrays.parts(x, self.ordinal)

    def run_plainly(self, x: Array, request: opt.Request) -> bool:
        """See `calls.Calls`: one contiguous torch tensor."""
        plain = cuda_arrays.direct(x, self.ordinal)
        if plain is None:
            return False
        call = plain_arguments(plain, request, -1)
        if self._native is not None:
            self._native.run_on(*call, cuda_arrays.torch_stream(self.ordinal), self.timeout_s)
        return True

    def run(self, parts: Parts, request: opt.Request) -> None:
        """See `calls.Calls`. Nothing needs to be held: all of it is in the order of the caller's stream."""
        if self._native is None:
            return
        stream = cuda_arrays.stream_of(parts.kept, self.ordinal)
        for call in arguments(parts, request, self._cap_bytes):
            self._native.run_on(*call, stream, self.timeout_s)
        for segment in parts.segments.values():
            segment.finish()

    def submit(self, parts: Parts, request: opt.Request, owner: object) -> Work:
        """See `calls.Calls`."""
        work = CudaWork(list(parts.segments.values()), parts.kept, owner, self)
        if self._native is not None:
            work._pendings = self._enqueue(self._native, parts, arguments(parts, request, self._cap_bytes))
        return work

    def enqueue_bucket(self, x: torch.Tensor, request: opt.Request, bucket: int) -> torch.cuda.Stream | None:
        """Starts one DDP bucket, which must need no copy, behind torch's current stream.

        Returns:
            The stream behind whose present work the bucket is reduced; None where there is one rank.
        """
        plain = cuda_arrays.direct(x, self.ordinal)
        if plain is None:
            raise InternalError(
                f"DDP bucket {bucket} is not contiguous memory on cuda:{self.ordinal}: {x.device}, strides {x.stride()}"
            )
        if self._native is None:
            return None
        call = plain_arguments(plain, request, bucket)
        parts = Parts([plain[0]], [plain[1]], [plain[2]], {}, (x,))
        for pending in self._enqueue(self._native, parts, [call]):
            # The launch may be another rank's of this process, on its stream: ours must wait for it.
            pending.join(self._native.stream, self.timeout_s)
        return cuda_arrays.external_stream(self._native.stream, self.ordinal)

    def release(self) -> None:
        """See `calls.Calls`; calls end in the order in which they were started."""
        if cuda_arrays.capturing(self.ordinal):
            return
        with contextlib.suppress(IndexError):  # another thread may empty the queue meanwhile
            while all(pending.is_completed() for pending in self._held[0][0]):
                self._held.popleft()

    def settle(self, timeout_s: float) -> None:
        """The host waits for what is under way, timeout_s at most; raises the first error of it."""
        deadline = time.monotonic() + timeout_s
        for pendings, _ in list(self._held):
            for pending in pendings:
                if not pending.synchronize(max(deadline - time.monotonic(), 0.0)):
                    return

    def _enqueue(self, native: _native.Comm, parts: Parts, calls: list[Arguments]) -> list[_native.Pending]:
        stream = cuda_arrays.stream_of(parts.kept, self.ordinal)
        self.release()
        cuda_arrays.protect(parts, native.stream, self.ordinal)
        captured = cuda_arrays.capturing(self.ordinal)
        pendings: list[_native.Pending] = []
        try:
            for call in calls:
                pendings.append(native.enqueue(*call, stream))
        finally:  # what was started before an error goes on
            if captured:
                self._of_graphs.append(parts)
            elif pendings:
                self._held.append((pendings, parts))
        return pendings
