"""Calls of a torch Store that a rank stops waiting for: TCPStore's client has no time limit while it reads an answer.

Its own limit is for keys that do not come. Knows no keys.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, TypeAlias, TypeVar

T = TypeVar("T")
THREAD = "dpcomm-store"


class NoAnswerError(Exception):
    """The store has not answered in time."""


class StoreCalls:
    """Makes calls one after the other on a daemon thread, which ends with this object."""

    def __init__(self) -> None:
        self._queue: _Queue = SimpleQueue()
        self._given_up: _Call | None = None
        threading.Thread(target=_make_all, args=(self._queue,), name=THREAD, daemon=True).start()
        weakref.finalize(self, self._queue.put, None)

    def make(self, function: Callable[..., T], arguments: tuple[object, ...], timeout_s: float) -> T:
        """What function(*arguments) returns or raises; behind a call that was given up, nothing is waited for.

        Raises:
            NoAnswerError: It has not returned. It is still made as soon as the store answers again.
        """
        call = _Call(function, arguments)
        self._queue.put(call)
        behind = self._given_up is not None and not self._given_up.over.is_set()
        if not call.over.wait(0.0 if behind else min(timeout_s, threading.TIMEOUT_MAX)):
            self._given_up = call
            raise NoAnswerError
        error, call.error = call.error, None
        if error is None:
            result: T = call.result
            return result
        try:
            raise error
        finally:  # its traceback names this frame, which would keep the store until the collector comes
            del error, call, self


class _Call:
    def __init__(self, function: Callable[..., Any], arguments: tuple[object, ...]) -> None:
        self._function, self._arguments = function, arguments
        self.result: Any = None
        self.error: BaseException | None = None
        self.over = threading.Event()

    def make(self) -> None:
        try:
            self.result = self._function(*self._arguments)
        except BaseException as error:  # noqa: BLE001 - raised by the thread that waits
            self.error = error.with_traceback(None)
        self.over.set()


_Queue: TypeAlias = "SimpleQueue[_Call | None]"


def _make_all(queue: _Queue) -> None:
    while (call := queue.get()) is not None:
        call.make()
        del call  # it holds on to the store
