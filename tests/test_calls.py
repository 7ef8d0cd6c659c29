"""Asynchronous calls on CPU whose ends are looked for by several threads: each is let go of once, and not early."""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import torch

from dpcomm import arrays
from dpcomm.calls import CpuCalls
from dpcomm.options import Request

LIMIT_S = 10.0
SUM = Request(0, 0, 0, {"float32": (0, 1)}, "sum", "none")


class Done:
    """A job that has ended."""

    def wait(self, timeout_s: float) -> bool:
        return True

    def is_completed(self) -> bool:
        return True

    def exception(self) -> None:
        return None


class Native:
    """Runs calls at once: fills what it is given with sevens. Before that another thread may look for ends."""

    def __init__(self) -> None:
        self.calls: CpuCalls | None = None

    def submit(self, addresses: list[int], counts: list[int], *_: Any) -> Done:
        assert self.calls is not None
        beside = threading.Thread(target=self.calls.release)
        beside.start()
        beside.join(LIMIT_S)
        assert not beside.is_alive()
        for address, count in zip(addresses, counts, strict=True):
            (ctypes.c_float * count).from_address(address)[:] = [7.0] * count
        return Done()


def test_a_call_is_not_let_go_of_before_it_is_submitted() -> None:
    """What is not contiguous is reduced in a copy, which goes back when the call has ended."""
    native = Native()
    native.calls = calls = CpuCalls(native, 25e6)  # type: ignore[arg-type]
    x = torch.ones(3, 4).t()[:, :2]
    assert arrays.direct(x) is None  # so it is copied
    work = calls.submit(calls.parts(x), SUM, None)
    assert work.wait(LIMIT_S)
    assert bool((x == 7).all())
    calls.release()
    assert not calls.in_use


class Slow:
    """A Work that has ended; to look takes until `go`."""

    def __init__(self) -> None:
        self.entered, self.go = threading.Event(), threading.Event()

    def is_completed(self) -> bool:
        self.entered.set()
        return self.go.wait(LIMIT_S)


class Running:
    """A Work that has not."""

    def is_completed(self) -> bool:
        return False


def test_two_threads_that_look_at_once_let_go_of_a_call_once() -> None:
    calls, slow = CpuCalls(None, 25e6), Slow()
    calls._pending.extend([slow, Running()])  # type: ignore[list-item]
    calls.in_use.extend(["of the one that has ended", "of the one that runs"])
    first, second = threading.Thread(target=calls.release), threading.Thread(target=calls.release)
    first.start()
    assert slow.entered.wait(LIMIT_S)
    second.start()
    second.join(LIMIT_S / 4)
    waits = second.is_alive()
    slow.go.set()
    for thread in (first, second):
        thread.join(LIMIT_S)
        assert not thread.is_alive()
    assert list(calls.in_use) == ["of the one that runs"]
    assert not waits, "a thread that submits waits for another's copies"
