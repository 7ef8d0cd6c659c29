"""The thread that completes the futures DDP waits on, in the order of the calls.

A failed future is completed only when no job of the communicator can touch a bucket any more: DDP goes on at the first
failed one, and the next backward writes into the same buckets. Knows no DDP and no tensor's insides.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from typing import Any, NamedTuple

import torch

from dpcomm import _native
from dpcomm.errors import Error, InternalError

ADVICE = "The gradients of this step are undefined; call zero_grad() and dpcomm.recover(ddp) on all ranks."


class Pending(NamedTuple):
    """One future to complete: with `buffer` when the job has ended, or with the error."""

    job: _native.Job | None
    error: Error | None  # set where there is no job: the call failed before it was queued
    future: torch.futures.Future[Any]
    buffer: torch.Tensor | None

    def outcome(self) -> Error | None:
        """Waits for the job, with the GIL released; never raises. Its end is bounded by the communicator's timeout."""
        try:
            if self.job is not None:
                self.job.wait(-1.0)
        except Error as error:
            return error
        except Exception as error:  # noqa: BLE001 - whatever it is, backward() waits for the future
            return InternalError(f"{type(error).__name__}: {error}")
        return self.error


class Failure(NamedTuple):
    """What a failed future's inner one holds."""

    error: Error


class Completer:
    """Owns the thread; starts it with the first call and ends it with `close`.

    Attributes:
        last_error: The first error since it was last set to None.
    """

    def __init__(self) -> None:
        self.last_error: Error | None = None
        self._queue: queue.SimpleQueue[Pending | threading.Event | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = False

    def future(
        self, job: _native.Job | None, error: Error | None, buffer: torch.Tensor | None
    ) -> torch.futures.Future[torch.Tensor]:
        """The future of one call; completes when the job ends, after those of all earlier calls."""
        inner: torch.futures.Future[Any] = torch.futures.Future()
        outer = inner.then(_unwrap)
        item = Pending(job, error, inner, buffer)
        with self._lock:
            if not self._closed:
                if self._thread is None:
                    self._thread = threading.Thread(target=self._run, name="dpcomm-completer", daemon=True)
                    self._thread.start()
                self._queue.put(item)
                return outer
        self._complete(item, item.outcome())
        return outer

    def drain(self, timeout_s: float) -> bool:
        """Waits until all futures made so far are complete; False if timeout_s ran out."""
        with self._lock:
            if self._thread is None or self._closed:
                return True
            reached = threading.Event()
            self._queue.put(reached)
        return reached.wait(timeout_s)

    def close(self, timeout_s: float) -> None:
        """Completes what is queued and ends the thread; after timeout_s leaves it behind (it is a daemon)."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            thread = self._thread
            self._queue.put(None)
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout_s)

    def _run(self) -> None:
        while True:
            item = self._queue.get()
            if item is None:
                return
            if isinstance(item, threading.Event):
                item.set()
            else:
                error = item.outcome()
                if error is None:
                    self._complete(item, None)
                elif self._fail(item, error):
                    return
            del item  # not kept until the next call: it holds the bucket's memory

    def _fail(self, first: Pending, error: Error) -> bool:
        """Waits for all that is queued behind a failure, then completes it in order. True if told to end.

        Calls that come later cannot touch memory: the communicator is poisoned by then.
        """
        ended = [(first, error)]
        events: list[threading.Event] = []
        stop = False
        with contextlib.suppress(queue.Empty):
            while True:
                item = self._queue.get_nowait()
                if item is None:
                    stop = True
                elif isinstance(item, threading.Event):
                    events.append(item)
                else:
                    ended.append((item, item.outcome()))  # type: ignore[arg-type]
        for item, outcome in ended:
            self._complete(item, outcome)
        for event in events:
            event.set()
        return stop

    def _complete(self, item: Pending, error: Error | None) -> None:
        if error is not None and self.last_error is None:
            self.last_error = error
        item.future.set_result(item.buffer if error is None else Failure(error))


def _unwrap(inner: torch.futures.Future[Any]) -> torch.Tensor:
    """Turns a Failure into the future's error. DDP keeps an error's text only, so the text holds code and advice."""
    value = inner.value()
    if isinstance(value, Failure):
        text = str(value.error)
        raise RuntimeError(f"{text}{'' if text.endswith('.') else '.'} {ADVICE}") from value.error
    assert isinstance(value, torch.Tensor)
    return value
