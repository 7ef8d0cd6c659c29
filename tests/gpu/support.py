"""What tests on a GPU have in common: virtual ranks on the first device, and cases run on them.

Virtual ranks live in this process and share one device: one launch plays all of them. Everything here also runs on CPU
tensors (`DEVICE`), so that the tests' own logic can be tried where there is no GPU.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import cases
import pytest
import torch
from cases import Array, Case, check_bits
from faulty import Caught
from rank_process import Failure

import dpcomm

DEVICE = "cuda:0"
TIMEOUT_S = 20.0
RANKS = (2, 4, 8)
Comms = list[dpcomm.Communicator]

# Of every module in this folder. The marker skips where there is no device; the rest says what else is missing.
on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU for torch: a build without CUDA, or no device"),
    pytest.mark.skipif(not dpcomm.info()["cuda_built"], reason="dpcomm was built without CUDA"),
]


@contextmanager
def environment(wanted: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for a while."""
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def make(nranks: int, env: Mapping[str, str] | None = None, **options: Any) -> Comms:
    """New virtual ranks; the caller closes them. A device holds a limited number of CTAs, so kept ones are closed."""
    close_groups()
    with environment(env or {}):
        return dpcomm.init_local([DEVICE] * nranks, **{"timeout_s": TIMEOUT_S, **options})


@contextmanager
def fresh(nranks: int, env: Mapping[str, str] | None = None, **options: Any) -> Iterator[Comms]:
    """New virtual ranks, closed at the end."""
    comms = make(nranks, env, **options)
    try:
        yield comms
    finally:
        for comm in comms:
            comm.close()


_kept: dict[int, Comms] = {}


def group(nranks: int) -> Comms:
    """Virtual ranks that tests in a row share; made again after a failure has poisoned them."""
    if nranks not in _kept or not usable(_kept[nranks]):
        _kept[nranks] = make(nranks)
    return _kept[nranks]


def close_groups() -> None:
    """Gives back what `group` keeps."""
    while _kept:
        close(_kept.popitem()[1])


def close(comms: Comms) -> None:
    for comm in comms:
        comm.close()


def usable(comms: Comms) -> bool:
    try:
        for comm in comms:
            comm.check()
    except dpcomm.Error:
        return False
    return True


# --- cases -----------------------------------------------------------------------------------------------------------


def on_device(xs: Sequence[Array]) -> list[torch.Tensor]:
    return [cases.tensor(x).to(DEVICE) for x in xs]


def whole(xs: list[torch.Tensor]) -> Any:
    """One tensor travels as itself, several as a list."""
    return xs[0] if len(xs) == 1 else xs


def reduce_on(comms: Comms, inputs: Sequence[Sequence[Array]], case: Case) -> list[list[torch.Tensor]]:
    """inputs[rank][segment], reduced on the device; the results on the CPU."""
    xs = [on_device(segments) for segments in inputs]
    dpcomm.allreduce_local(comms, [whole(x) for x in xs], case.op, **case.options)
    return [[x.cpu() for x in segments] for segments in xs]


def check_case(comms: Comms, case: Case) -> None:
    """The reference's bits, and the same on all ranks."""
    inputs = [case.inputs(r) for r in range(len(comms))]
    check_bits(reduce_on(comms, inputs, case), case.expected(len(comms)), f"{len(comms)} virtual ranks, {case}")


def check_sums(comms: Comms, count: int = 1000) -> None:
    """The communicators still add up."""
    xs = [torch.full((count,), float(r + 1), device=DEVICE) for r in range(len(comms))]
    dpcomm.allreduce_local(comms, xs)
    total = len(comms) * (len(comms) + 1) / 2
    for x in xs:
        assert torch.equal(x, torch.full_like(x, total))


# --- errors, which a GPU reports late --------------------------------------------------------------------------------


def first_error(comm: dpcomm.Communicator, call: Callable[[], Any], within_s: float) -> Caught:
    """What a call leads to: it may raise itself, or `check` does once the device has noticed.

    Raises:
        AssertionError: Nothing was raised within `within_s`.
    """
    began = time.monotonic()
    try:
        call()
        while time.monotonic() - began < within_s:
            comm.check()
            time.sleep(0.01)
    except dpcomm.Error as error:
        return Caught(Failure.of(error), began, time.monotonic())
    raise AssertionError(f"no error within {within_s:g} s")


def to_the_end(comm: dpcomm.Communicator, x: torch.Tensor) -> None:
    """One call, until the device has nothing left to do."""
    comm.allreduce(x)
    torch.cuda.synchronize()


def stream() -> Any:
    """A stream of torch's pool; it does not wait for the default stream."""
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]


def event() -> Any:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]


def busy(milliseconds: float) -> None:
    """Keeps the current stream busy, at least about as long: the clock is taken for 1.5 GHz."""
    torch.cuda._sleep(int(milliseconds * 1.5e6))  # type: ignore[no-untyped-call]


def torch_works() -> str:
    """Whether this process's CUDA context lives: "" or what torch says."""
    try:
        total = torch.ones(1000, device=DEVICE).sum().item()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return "" if total == 1000 else f"torch counts {total} ones in 1000"
