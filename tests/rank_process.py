"""The inside of one rank's process (ranks.py starts it): takes functions from a pipe, runs them, reports.

Knows nothing of dpcomm but the name of its extension. Each function runs under a deadline of its own, after which this
process writes the stacks of all its threads to its log and ends, even if it hangs in C++ with the GIL held.
"""

from __future__ import annotations

import faulthandler
import importlib.util
import os
import pickle
import sys
import time
import traceback
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Failure:
    """An exception as another process can look at it."""

    name: str  # of its class
    bases: tuple[str, ...]  # names of the class and all above it
    message: str
    attributes: dict[str, Any]
    trace: str
    pickled: bytes | None  # the exception itself, where it can be pickled

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        extra = {n: getattr(error, n) for n in ("rank", "waiting_for", "code", "errno") if hasattr(error, n)}
        kept = {n: v for n, v in {**vars(error), **extra}.items() if packed(v) is not None}
        names = tuple(c.__name__ for c in type(error).__mro__)
        trace = "".join(traceback.format_exception(error))
        return cls(names[0], names, str(error), kept, trace, packed(error))


@dataclass(frozen=True)
class Report:
    """What a function did; times are of the monotonic clock, which all processes of a machine share."""

    began: float
    ended: float
    value: Any = None
    failure: Failure | None = None


@dataclass(frozen=True)
class Place:
    """Where a rank is, on its command line: only plain values."""

    rank: int
    nranks: int
    pipe: int
    log: str
    store_port: int = 0  # of the TCPStore; 0: no process group
    env: dict[str, str] = field(default_factory=dict)
    store_host: str = "127.0.0.1"


def packed(value: Any) -> bytes | None:
    """Pickled, or None for what cannot be pickled and read again."""
    try:
        data = pickle.dumps(value)
        pickle.loads(data)
    except Exception:  # noqa: BLE001 - pickling runs other people's code, and any failure means the same here
        return None
    return data


def attempt(task: bytes, place: Place) -> Report:
    began = time.monotonic()
    try:
        function, args = pickle.loads(task)
        value = function(place.rank, place.nranks, *args)
        if packed(value) is None:
            raise TypeError(f"the result of {function.__name__} cannot be pickled: {value!r}")
    except SystemExit:
        raise  # a rank that leaves on purpose: its exit status is the outcome
    except BaseException as error:  # noqa: BLE001 - KeyboardInterrupt is an outcome, too
        return Report(began, time.monotonic(), failure=Failure.of(error))
    return Report(began, time.monotonic(), value)


def join_group(place: Place) -> None:
    """A gloo process group over the parent's store, which outlives any rank."""
    limit = timedelta(seconds=30)
    store = dist.TCPStore(place.store_host, place.store_port, is_master=False, timeout=limit)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=place.rank, world_size=place.nranks)


def take_stand_in(path: str) -> None:
    """Makes `import dpcomm` take this extension instead of its own; see stand_in.py."""
    spec = importlib.util.spec_from_file_location("dpcomm._native", path)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def main(place: Place) -> None:
    torch.set_num_threads(1)
    if path := os.environ.get("STAND_IN_NATIVE"):
        take_stand_in(path)
    pipe = Connection(place.pipe)
    with Path(place.log).open("w") as log:
        faulthandler.enable(log)
        if place.store_port:
            join_group(place)
        pipe.send_bytes(b"ready")
        try:
            last = False
            while not last:
                deadline_s, last, task = pickle.loads(pipe.recv_bytes())
                faulthandler.dump_traceback_later(deadline_s, exit=True, file=log)
                report = attempt(task, place)
                pipe.send_bytes(pickle.dumps(report))
                faulthandler.cancel_dump_traceback_later()
        except EOFError:
            pass  # the parent has closed the pipe: no more work
        faulthandler.dump_traceback_later(30, exit=True, file=log)  # the way out has a deadline, too
        if place.store_port and dist.is_initialized():
            dist.destroy_process_group()
        faulthandler.cancel_dump_traceback_later()
        faulthandler.disable()  # before the log closes
