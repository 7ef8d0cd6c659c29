"""What tests of faults have in common: an exception as plain values with its time, and what must be true of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from rank_process import Failure

import dpcomm

CODES = {
    "ArgumentError": "ARGUMENT",
    "UnsupportedError": "UNSUPPORTED",
    "MismatchError": "MISMATCH",
    "PeerLostError": "PEER_LOST",
    "CommTimeoutError": "TIMEOUT",
    "AbortedError": "ABORTED",
    "SystemResourceError": "RESOURCE",
    "VersionError": "VERSION",
    "ForkError": "FORK",
    "InternalError": "INTERNAL",
}


@dataclass(frozen=True)
class Caught:
    """What a call raised. Times are of the monotonic clock, comparable between processes."""

    failure: Failure
    began: float
    ended: float

    @property
    def seconds(self) -> float:
        return self.ended - self.began

    @property
    def text(self) -> str:
        return self.failure.message


def catch(call: Callable[..., Any], *args: Any, **keywords: Any) -> Caught:
    """Calls, and says what was raised; a call that returns is a failure of the test."""
    began = time.monotonic()
    try:
        result = call(*args, **keywords)
    except BaseException as error:  # noqa: BLE001 - KeyboardInterrupt is one of the outcomes
        return Caught(Failure.of(error), began, time.monotonic())
    raise AssertionError(f"expected an exception, got {result!r}")


def check(caught: Caught, name: str, *fragments: str, within_s: float | None = None) -> None:
    """The class, its code in front of the message, and pieces of the message; how long it took, if that matters."""
    assert caught.failure.name == name, caught.failure.trace
    assert caught.text.startswith(f"[dpcomm:{CODES[name]}] "), caught.text
    assert caught.failure.attributes["code"] == CODES[name]
    for fragment in fragments:
        assert fragment in caught.text, f"{fragment!r} is not in {caught.text!r}"
    if within_s is not None:
        assert caught.seconds < within_s, f"took {caught.seconds:.2f} s: {caught.text}"


def check_all(caught: Sequence[Caught], name: str, *fragments: str, within_s: float) -> None:
    """The same error on all ranks, at the latest `within_s` after the last of them made its call."""
    for one in caught:
        check(one, name, *fragments)
    late = max(c.ended for c in caught) - max(c.began for c in caught)
    assert late < within_s, f"took {late:.2f} s: {caught[0].text}"


def check_poisoned(comm: dpcomm.Communicator, *cause: str) -> None:
    """Every further call raises AbortedError at once and names the first cause; `check` raises, too."""
    for asynchronous in (False, True):
        x = torch.full((300,), 7.0)
        again = catch(lambda x=x, a=asynchronous: _finished(comm.allreduce(x, async_op=a)))
        check(again, "AbortedError", *cause, within_s=1.0)
        assert torch.equal(x, torch.full((300,), 7.0)), "a refused call wrote to its tensor"
    catch(comm.check)


def _finished(result: Any) -> Any:
    return result.wait(5.0) if isinstance(result, dpcomm.Work) else result


def check_usable(comms: Sequence[dpcomm.Communicator]) -> None:
    """All communicators of one process still add up."""
    xs = [torch.full((700,), float(comm.rank + 1)) for comm in comms]
    dpcomm.allreduce_local(comms, xs)
    total = len(comms) * (len(comms) + 1) / 2
    for x in xs:
        assert torch.equal(x, torch.full((700,), total))


def file_store(folder: str, nranks: int) -> Any:
    """A store without a host that could die."""
    return dist.FileStore(f"{folder}/store", nranks)  # type: ignore[attr-defined]


def in_threads(calls: Sequence[Callable[[], Any]], deadline_s: float = 30.0) -> list[Any]:
    """Runs all at once, each in a thread of its own; the results, or what was raised, as Caught."""
    results: list[Any] = [None] * len(calls)

    def run(index: int) -> None:
        began = time.monotonic()
        try:
            results[index] = calls[index]()
        except BaseException as error:  # noqa: BLE001 - an outcome
            results[index] = Caught(Failure.of(error), began, time.monotonic())

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    end = time.monotonic() + deadline_s
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    assert not any(thread.is_alive() for thread in threads), f"still at work after {deadline_s:g} s"
    return results
