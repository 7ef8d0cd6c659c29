"""A call that runs while the caller goes on. Knows jobs and segments, not what they compute."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from dpcomm import _native
from dpcomm.arrays import Segment
from dpcomm.errors import ArgumentError, CommTimeoutError

# Python handles signals between two waits, so Ctrl-C ends `wait` within this time; the call itself goes on.
WAIT_SLICE_S = 0.1


def check_timeout(timeout_s: float | None) -> None:
    """Raises ArgumentError where this is no time to wait for."""
    if timeout_s is not None and not timeout_s >= 0:
        raise ArgumentError(f"wait: timeout_s={timeout_s}: expected 0 or more seconds")


class Work:
    """The handle of an asynchronous all-reduce; its arrays hold the result once it is completed.

    The result is in place when `wait` has returned or `is_completed` has said True. On a GPU, `wait` without a time
    limit does not block the host: it lets the current stream of the arrays' library wait, as torch's own works do.
    """

    def __init__(self, segments: Sequence[Segment], keep: object) -> None:
        self._jobs: list[_native.Job] = []
        self._segments = segments
        self._keep = keep  # the arrays and the communicator live until the job is done
        self._finished = False
        self._lock = threading.Lock()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Waits for the call to end.

        Args:
            timeout_s: Seconds to wait at most; None waits as long as the communicator's own timeout lets the call run.

        Returns:
            True.

        Raises:
            CommTimeoutError: timeout_s ran out. The call goes on; wait again.
            Error: The call's own error.
        """
        check_timeout(timeout_s)
        deadline = float("inf") if timeout_s is None else time.monotonic() + timeout_s
        for job in self._jobs:
            while not job.wait(min(WAIT_SLICE_S, max(deadline - time.monotonic(), 0.0))):
                if time.monotonic() >= deadline:
                    raise CommTimeoutError(f"wait: the call has not ended in {timeout_s} s. It goes on; wait again.")
        self._finish()
        return True

    def is_completed(self) -> bool:
        """Whether the call has ended, with or without an error."""
        if not all(job.is_completed() for job in self._jobs):
            return False
        if self.exception() is None:
            self._finish()
        return True

    def exception(self) -> Exception | None:
        """The call's error; None if it succeeded or still runs."""
        errors = (job.exception() for job in self._jobs)
        return next((error for error in errors if error is not None), None)

    def _add(self, job: _native.Job) -> None:
        """Takes one more job; called by the communicator while it submits the buckets."""
        self._jobs.append(job)

    def _finish(self) -> None:
        with self._lock:
            if not self._finished:
                self._finished = True
                for segment in self._segments:
                    segment.finish()
