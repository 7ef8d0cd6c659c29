"""Many calls: memory stays what it was, and no call among a great number of random ones is wrong or hangs."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from gpu.support import DEVICE, fresh, on_gpu
from process_memory import status_kib

import dpcomm

pytestmark = on_gpu

Record = Callable[[str, object], None]
CALLS = 10_000
SOAK_CALLS = 100_000
SOAK_S = 60.0
CHUNK = 500  # calls between two looks at the clock
MOST_ELEMENTS = 20_000
MIB = 1 << 20


def used_mib() -> float:
    """Of the device's memory, by everybody."""
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return (total - free) / MIB


@pytest.mark.timeout(180)
@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_memory_is_flat_over_ten_thousand_calls(asynchronous: bool, record_property: Record) -> None:
    xs = [torch.ones(1024, device=DEVICE) for _ in range(2)]
    with fresh(2, codec="fp16") as comms:

        def calls(count: int) -> None:
            for _ in range(count):
                if not asynchronous:
                    dpcomm.allreduce_local(comms, xs, "mean")
                    continue
                for work in [comm.allreduce(x, "mean", async_op=True) for comm, x in zip(comms, xs, strict=True)]:
                    work.wait()
            torch.cuda.synchronize()

        calls(1000)
        gc.collect()
        device, host = used_mib(), status_kib("RssAnon")
        calls(CALLS)
        gc.collect()
        grown, grown_host = used_mib() - device, status_kib("RssAnon") - host
        leak = torch.empty(64 * MIB, dtype=torch.uint8, device=DEVICE)
        control = used_mib() - device
        del leak
    record_property("device_mib", grown)
    record_property("host_kib", grown_host)
    assert grown < 1
    assert grown_host < 2048  # KiB: 200 bytes a call
    assert control - grown >= 63, "control: an allocation of 64 MiB must show"
    assert all(bool((x == 1).all()) for x in xs)


def wrong_elements(comms: list[dpcomm.Communicator], rng: np.random.Generator, calls: int, tiles: torch.Tensor) -> int:
    """Random small calls on whole numbers that every codec keeps; how many elements are not what they must be.

    Counted on the device, so that calls follow each other as fast as they can.
    """
    nranks = len(comms)
    wrong = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for _ in range(calls):
        begin, count = int(rng.integers(MOST_ELEMENTS)), int(2 ** rng.uniform(0, np.log2(MOST_ELEMENTS)))
        base = tiles[begin : begin + count]
        xs = [base * (r + 1) for r in range(nranks)]
        codec, algorithm = str(rng.choice(["none", "fp16"])), str(rng.choice(["direct", "oneshot", "ring", "auto"]))
        dpcomm.allreduce_local(comms, xs, codec=codec, algorithm=algorithm)
        wanted = base * (nranks * (nranks + 1) // 2)
        for x in xs:
            wrong += (x != wanted).sum()
    return int(wrong.item())


@pytest.mark.timeout(180)
def test_random_calls_are_all_right(record_property: Record) -> None:
    """As many of 100,000 as fit into a minute. Values up to 100: sums of 10 times that have 11 bits at most."""
    rng = np.random.default_rng(1618)
    tiles = (torch.arange(2 * MOST_ELEMENTS, device=DEVICE) % 101).float()
    done, end = 0, time.monotonic() + SOAK_S
    with fresh(2, max_ctas=4) as two, fresh(4, max_ctas=4) as four:
        while done < SOAK_CALLS and time.monotonic() < end:
            assert wrong_elements(two if done // CHUNK % 4 else four, rng, CHUNK, tiles) == 0, f"after {done} calls"
            done += CHUNK
        for comm in [*two, *four]:
            comm.check()
    record_property("calls", done)
    assert done >= 5000


def test_one_wrong_element_is_counted() -> None:
    """Control of the test above, whose values all codecs must keep for it to be one."""
    tiles = (torch.arange(2 * MOST_ELEMENTS, device=DEVICE) % 101).float()
    with fresh(2) as comms:
        x = tiles[:1000].clone()
        y = tiles[:1000] * 2
        dpcomm.allreduce_local(comms, [x, y])
        x[999] += 1
        assert int((x != tiles[:1000] * 3).sum()) == 1
