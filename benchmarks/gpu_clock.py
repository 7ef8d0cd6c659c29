"""Times by the device's clock, on torch's current CUDA stream. It imports no dpcomm."""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

CYCLES_A_S = 2_000_000_000  # at least about as many as a GPU's clock makes


class Times(NamedTuple):
    """Microseconds of one repetition: on the device, and for the host to enqueue it."""

    gpu_us: float
    host_us: float


def time_on_device(body: Callable[[int], object], times: int, hold_s: float = 0.0) -> Times:
    """Runs body(0), body(1) ... back to back between two events, and waits for the end.

    Args:
        body: enqueues work on the current stream.
        hold_s: keeps the device busy for about so long before the first event. If that is longer than the host needs to
            enqueue everything, the time is the device's alone.
    """
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    if hold_s > 0:
        torch.cuda._sleep(int(hold_s * CYCLES_A_S))  # type: ignore[no-untyped-call]
    begin.record()
    start = time.perf_counter()
    for number in range(times):
        body(number)
    host_s = time.perf_counter() - start
    end.record()
    end.synchronize()
    return Times(float(begin.elapsed_time(end)) * 1e3 / times, host_s * 1e6 / times)
