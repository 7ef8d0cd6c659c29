"""A store that does not answer: nothing waits for it longer than it must, and what is known already is said."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Iterator

import pytest
import torch.distributed as dist
from stores import Spy

import dpcomm
from dpcomm.rendezvous import ANSWER_S, Rendezvous, Site
from dpcomm.store_calls import THREAD, NoAnswerError, StoreCalls

LIMIT_S = 10.0


@pytest.fixture
def go() -> Iterator[threading.Event]:
    """What is stuck goes on when it is set, at the latest at the end."""
    event = threading.Event()
    yield event
    event.set()


def test_a_call_is_given_up_in_time_and_made_later(go: threading.Event) -> None:
    calls, made = StoreCalls(), threading.Event()
    began = time.monotonic()
    with pytest.raises(NoAnswerError):
        calls.make(go.wait, (LIMIT_S,), 0.1)
    with pytest.raises(NoAnswerError):  # behind it nothing is waited for
        calls.make(made.set, (), LIMIT_S)
    assert time.monotonic() - began < LIMIT_S / 4
    assert not made.is_set()
    go.set()
    assert made.wait(LIMIT_S)
    assert calls.make(int, ("7",), LIMIT_S) == 7  # and then it works again


def test_an_error_of_the_store_keeps_nothing() -> None:
    class Broken:
        def get(self) -> None:
            raise RuntimeError("connection reset")

    gc.disable()  # nothing may need it
    try:
        store, calls = Broken(), StoreCalls()
        seen = weakref.ref(store), weakref.ref(calls)
        with pytest.raises(RuntimeError, match="connection reset"):
            calls.make(store.get, (), LIMIT_S)
        del store, calls
        until = time.monotonic() + LIMIT_S
        while any(each() is not None for each in seen) and time.monotonic() < until:
            time.sleep(0.01)
        assert [each() for each in seen] == [None, None]
    finally:
        gc.enable()


def test_threads_of_store_calls_end_with_them() -> None:
    def alive() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name == THREAD}

    others = alive()  # of tests before; they may end at any time
    several = [StoreCalls() for _ in range(5)]
    mine = alive() - others
    assert len(mine) == 5  # control
    del several
    for thread in mine:
        thread.join(LIMIT_S)
    assert not mine & alive()


@pytest.mark.parametrize("failing", [False, True], ids=["well", "failing"])
def test_a_ranks_own_error_comes_before_the_silence_of_the_store(failing: bool, go: threading.Event) -> None:
    """Else the one who knows what happened would say that the store is silent, and only when its time is up."""

    def publish(stage: str, record: bytes) -> bytes:
        go.wait(LIMIT_S)
        return record

    def work() -> bytes:
        if failing:
            raise dpcomm.PeerLostError("rank 1 is gone")
        return b""

    timeout_s = 2.0
    site = Site(Spy(dist.HashStore(), publish), 0, 1, "ranks [0]", "")  # type: ignore[attr-defined]
    meeting = Rendezvous(site, timeout_s)
    began = time.monotonic()
    with pytest.raises(dpcomm.PeerLostError if failing else dpcomm.CommTimeoutError) as caught:
        meeting.stage("allocate", work)
    took = time.monotonic() - began
    if failing:
        assert took < ANSWER_S + 1.0
        assert isinstance(caught.value.__cause__, dpcomm.CommTimeoutError)
        assert "did not answer" in str(caught.value.__cause__)
    else:
        assert timeout_s - 0.5 < took < timeout_s + 1.0
        assert "the torch store did not answer within the 2 s" in str(caught.value)
