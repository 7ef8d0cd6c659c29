"""Order on the device: calls run behind the caller's earlier work and before its later work, on any stream, in graphs.

Long kernels before and after a call make a missing order visible; controls show that they are long enough.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from cases import Case, check_bits
from gpu.support import DEVICE, Comms, busy, check_sums, event, fresh, group, on_device, on_gpu, stream
from torch._C._distributed_c10d import HashStore  # torch.distributed.HashStore, in a way that mypy follows

import dpcomm

pytestmark = on_gpu

LONG_MS = 200.0
COUNT = 100_003


def stale(nranks: int = 2, count: int = COUNT) -> list[torch.Tensor]:
    """Tensors that hold what no result may contain; there when this returns."""
    xs = [torch.full((count,), -1e6, device=DEVICE) for _ in range(nranks)]
    torch.cuda.synchronize()
    return xs


def put_values(xs: list[torch.Tensor]) -> None:
    for rank, x in enumerate(xs):
        x.fill_(rank + 1.0)


def all_are(x: torch.Tensor, value: float) -> bool:
    return bool((x == value).all())


# --- streams ---------------------------------------------------------------------------------------------------------


def test_a_call_sees_what_is_written_behind_a_long_kernel() -> None:
    comms, xs = group(2), stale()
    check_sums(comms, COUNT)  # the first use of a kernel may wait for the device
    other, ended = stream(), event()
    busy(LONG_MS)
    put_values(xs)
    with torch.cuda.stream(other):
        early = xs[0].clone()  # control: a stream that is not ordered reads too early
    dpcomm.allreduce_local(comms, xs)
    late = xs[0].clone()
    ended.record()
    assert not ended.query(), "the call waited for the device"
    torch.cuda.synchronize()
    assert all_are(early, -1e6), "control: the long kernel was too short to show anything"
    assert all(all_are(x, 3.0) for x in [*xs, late])


def test_a_call_on_a_side_stream_is_ordered_on_that_stream() -> None:
    comms, xs, side = group(2), stale(), stream()
    check_sums(comms)
    with torch.cuda.stream(side):
        busy(LONG_MS)
        put_values(xs)
        dpcomm.allreduce_local(comms, xs)
        late = xs[1].clone()
    side.synchronize()
    assert all_are(late, 3.0)


def test_a_consumer_waits_for_a_call_that_takes_long() -> None:
    """The call itself is held up: its second rank enters it late, on a stream of its own."""
    comms, xs, slow = group(2), stale(), stream()
    put_values(xs)
    torch.cuda.synchronize()
    works = [comms[0].allreduce(xs[0], async_op=True)]
    with torch.cuda.stream(slow):
        busy(LONG_MS)
        works.append(comms[1].allreduce(xs[1], async_op=True))
    other = stream()
    with torch.cuda.stream(other):
        early = xs[0].clone()  # control
    works[0].wait()
    late = xs[0].clone()
    works[1].wait()
    torch.cuda.synchronize()
    assert all_are(early, 1.0), "control: the long kernel was too short to show anything"
    assert all_are(late, 3.0)


@pytest.mark.parametrize("same", [True, False], ids=["same-stream", "another-stream"])
def test_wait_orders_the_stream_that_waits(same: bool) -> None:
    comms, xs, side, consumer = group(2), stale(), stream(), stream()
    with torch.cuda.stream(side):
        busy(LONG_MS)
        put_values(xs)
        works = [comm.allreduce(x, async_op=True) for comm, x in zip(comms, xs, strict=True)]
        busy(LONG_MS)  # runs beside the call
    with torch.cuda.stream(side if same else consumer):
        for work in works:
            assert work.wait(10.0)
        late = xs[0].clone()
    torch.cuda.synchronize()
    assert all(work.is_completed() and work.exception() is None for work in works)
    assert all_are(late, 3.0)


@pytest.mark.timeout(120)
def test_two_streams_take_turns_on_one_communicator() -> None:
    comms, streams = group(2), [stream() for _ in range(2)]
    sets = [[torch.full((5000,), float(10 * i + r), device=DEVICE) for r in range(2)] for i in range(2)]
    torch.cuda.synchronize()
    for call in range(400):
        with torch.cuda.stream(streams[call % 2]):
            dpcomm.allreduce_local(comms, sets[call % 2], "mean")
            for x in sets[call % 2]:
                x.add_(1)
    torch.cuda.synchronize()
    for i, xs in enumerate(sets):
        assert all(all_are(x, 10 * i + 0.5 + 200) for x in xs)


# --- graphs ----------------------------------------------------------------------------------------------------------


def test_kernels_of_two_launches_run_at_once() -> None:
    """Ranks that are threads of one process launch for themselves: each kernel waits for the other one's."""
    store, xs = HashStore(), stale()
    put_values(xs)
    torch.cuda.synchronize()
    with ThreadPoolExecutor(2) as threads:

        def make(rank: int) -> dpcomm.Communicator:
            return dpcomm.Communicator(rank=rank, nranks=2, store=store, device=DEVICE, timeout_s=20.0)

        comms = list(threads.map(make, range(2)))
        list(threads.map(lambda comm, x: comm.allreduce(x), comms, xs))
        torch.cuda.synchronize()
        assert all(all_are(x, 3.0) for x in xs)
        list(threads.map(dpcomm.Communicator.close, comms))


def step(comms: Comms, xs: list[Any], op: str = "mean", **options: Any) -> None:
    """Changes all tensors and reduces them: a call that saw old values would show in all later ones."""
    for rank, x in enumerate(xs):
        tensors = x if isinstance(x, list) else [x]
        torch._foreach_mul_(tensors, 0.75)
        torch._foreach_add_(tensors, rank + 1)
    dpcomm.allreduce_local(comms, xs, op, **options)


def make_inputs(counts: tuple[int, ...], nranks: int) -> list[Any]:
    xs = [on_device(Case(counts).inputs(r)) for r in range(nranks)]
    return [x if len(x) > 1 else x[0] for x in xs]


def flat(xs: list[Any]) -> list[list[torch.Tensor]]:
    return [[t.cpu() for t in (x if isinstance(x, list) else [x])] for x in xs]


def capture(work: Callable[[], None]) -> torch.cuda.CUDAGraph:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


@pytest.mark.timeout(120)
@pytest.mark.parametrize("codec", ["none", "fp16"])
@pytest.mark.parametrize("counts", [(COUNT,), (7, 300, 0, 1021), (5, 300) * 80], ids=["one", "few", "160-tensors"])
def test_a_thousand_replays_are_a_thousand_calls(counts: tuple[int, ...], codec: str) -> None:
    with fresh(2) as comms:
        eager, graphed = make_inputs(counts, 2), make_inputs(counts, 2)
        check_sums(comms)
        graph = capture(lambda: step(comms, graphed, codec=codec))
        for _ in range(1000):
            graph.replay()
        for _ in range(1000):
            step(comms, eager, codec=codec)
        check_bits(flat(graphed), [t.numpy() for t in flat(eager)[0]], "1000 replays")
        check_sums(comms)  # direct calls go on behind replayed ones
        for _ in range(3):
            graph.replay()
            step(comms, eager, codec=codec)
        check_bits(flat(graphed), [t.numpy() for t in flat(eager)[0]], "replays between direct calls")
        for comm in comms:
            comm.check()


def test_a_graph_that_misses_a_call_is_noticed() -> None:
    """Control of the test above: one replay fewer must show."""
    with fresh(2) as comms:
        eager, graphed = make_inputs((1000,), 2), make_inputs((1000,), 2)
        check_sums(comms)
        graph = capture(lambda: step(comms, graphed))
        for i in range(3):
            step(comms, eager)
            if i:
                graph.replay()
        with pytest.raises(AssertionError, match="differ"):
            check_bits(flat(graphed), [t.numpy() for t in flat(eager)[0]], "control")


def test_asynchronous_calls_are_captured() -> None:
    with fresh(2) as comms:
        xs, ys = make_inputs((COUNT,), 2), make_inputs((COUNT,), 2)
        check_sums(comms)

        def work() -> None:
            works = [comm.allreduce(x, "mean", async_op=True) for comm, x in zip(comms, xs, strict=True)]
            for one in works:
                one.wait()
            for x in xs:
                x.mul_(0.5)

        graph = capture(work)
        for _ in range(10):
            graph.replay()
            dpcomm.allreduce_local(comms, ys, "mean")
            for y in ys:
                y.mul_(0.5)
        check_bits(flat(xs), [t.numpy() for t in flat(ys)[0]], "captured asynchronous calls")


# --- memory that is given back early ---------------------------------------------------------------------------------


def test_memory_of_a_call_that_runs_is_not_given_away() -> None:
    """Tensors are dropped right after an asynchronous call; memory handed out meanwhile must stay what it is made."""
    comms = group(2)
    check_sums(comms)
    kept: list[torch.Tensor] = []
    for i in range(100):
        if i % 20 == 0:
            busy(20)
        xs = [torch.full((COUNT,), float(i + r), device=DEVICE) for r in range(2)]
        works = [comm.allreduce(x, async_op=True) for comm, x in zip(comms, xs, strict=True)]
        del xs
        if i % 2:
            for work in works:
                work.wait()
        del works
        kept.append(torch.full((COUNT,), 7.0, device=DEVICE))
    dpcomm.allreduce_local(comms, [torch.ones(10, device=DEVICE) for _ in range(2)])
    torch.cuda.synchronize()
    assert all(all_are(x, 7.0) for x in kept)


def test_the_allocator_does_give_memory_away() -> None:
    """Control of the test above: work on a side stream that nobody keeps the memory for writes into another tensor."""
    side = stream()
    torch.cuda.synchronize()
    x = torch.full((COUNT,), 1.0, device=DEVICE)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        busy(LONG_MS)
        x.fill_(9.0)
    address = x.data_ptr()
    del x
    y = torch.full((COUNT,), 7.0, device=DEVICE)
    torch.cuda.synchronize()
    assert y.data_ptr() == address
    assert all_are(y, 9.0)


def test_results_of_dropped_tensors_arrive_in_their_copies() -> None:
    comms, copies = group(2), []
    for i in range(200):
        xs = [torch.full((COUNT,), float(i + r), device=DEVICE) for r in range(2)]
        works = [comm.allreduce(x, async_op=True) for comm, x in zip(comms, xs, strict=True)]
        for work in works:
            work.wait()
        copies.append(xs[i % 2][:100].clone())
        del xs, works
    torch.cuda.synchronize()
    assert [i for i, copy in enumerate(copies) if not all_are(copy, 2.0 * i + 1)] == []
