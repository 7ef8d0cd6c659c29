"""Arrays on GPUs become calls: what is read from them, on which stream, and how long they live. Without a GPU.

The GPUs are those of `fake_cuda`; numbers in the names count the faults that dpcomm promises to answer.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from fake_cuda import STREAM, Array, CupyArray, Gpu, OfLibrary, Pending, fake_gpu, tensor
from faulty import catch, check

import dpcomm
from dpcomm import _native, arrays, cuda_arrays

__all__ = ["fake_gpu"]  # the fixture `gpu`
NONE, SUM, AUTO = _native.CODECS["none"], _native.OPS["sum"], _native.ALGORITHMS["auto"]


def two(**options: Any) -> list[dpcomm.Communicator]:
    return dpcomm.init_local([0, 0], **options)


def ones(*shape: int, dtype: str = "<f4") -> np.ndarray[Any, Any]:
    return np.ones(shape, dtype)


def columns(x: Any) -> Any:
    return x[:, 1:3]


# --- what is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typestr", "native", "width"),
    [
        ("<f4", "float32", 1),
        ("<f2", "float16", 1),
        ("<f8", "float64", 1),
        ("<i4", "int32", 1),
        ("<i8", "int64", 1),
        ("<c8", "float32", 2),
        ("<c16", "float64", 2),
    ],
)
def test_an_interface_is_read(gpu: Gpu, typestr: str, native: str, width: int) -> None:
    memory = ones(3, 5, dtype=typestr)
    x = Array(memory, stream=9)
    assert two()[0].allreduce(x) is x
    (call,) = gpu.named("run_on")
    address = memory.__array_interface__["data"][0]
    assert call == ("run_on", 0, [address], [15 * width], _native.DTYPES[native], SUM, NONE, AUTO, -1, 9)
    assert np.array_equal(memory, 2 * ones(3, 5, dtype=typestr))


@pytest.mark.parametrize(
    ("facts", "wanted"),
    [({}, 5), ({"stream": None}, 5), ({"stream": 1}, 0), ({"stream": 2}, 2), ({"stream": 0x7F00}, 0x7F00)],
    ids=repr,
)
def test_the_interfaces_stream_is_the_callers(gpu: Gpu, facts: dict[str, Any], wanted: int) -> None:
    two()[0].allreduce(Array(ones(4), **facts))
    assert gpu.named("run_on")[0][-1] == wanted


def test_without_torchs_cuda_what_needs_no_order_is_on_the_default_stream(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    two()[0].allreduce(Array(ones(4)))
    assert gpu.named("run_on")[0][-1] == 0


@pytest.mark.parametrize(
    ("strides", "shape", "contiguous"),
    [
        (None, (2, 3), True),
        ((12, 4), (2, 3), True),
        ((99, 4), (1, 3), True),  # a dimension of one has no step
        ((4, 8), (2, 3), False),
        ((7, 7), (0, 3), True),
        ((16, 4), (2, 3), False),
    ],
)
def test_strides_are_contiguous_or_not(
    strides: tuple[int, ...] | None, shape: tuple[int, ...], contiguous: bool
) -> None:
    read = cuda_arrays.interface(Array(ones(64), shape=shape, strides=strides))
    assert read.contiguous is contiguous


def test_streams_of_the_libraries(gpu: Gpu) -> None:
    comm = two()[0]
    comm.allreduce(tensor(gpu, torch.ones(3)))
    comm.allreduce(CupyArray(gpu, ones(3)))
    assert [call[-1] for call in gpu.named("run_on")] == [gpu.torch_stream, gpu.cupy_stream]
    mixed = [tensor(gpu, torch.ones(3)), CupyArray(gpu, ones(3))]
    check(catch(comm.allreduce, mixed), "ArgumentError", "ordered by 2 streams (0x5, 0x6)")
    gpu.cupy_stream = gpu.torch_stream
    comm.allreduce([*mixed, Array(ones(3))])  # the last needs no order
    assert len(gpu.named("run_on")) == 3


# --- what is refused -------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Callable[[Gpu], Any], str, str]] = {
    "13-other-gpu": (
        lambda g: tensor(g, torch.ones(3), 1),
        "ArgumentError",
        "tensor on cuda:1 but communicator bound to cuda:0",
    ),
    "13-cpu-tensor": (lambda g: torch.ones(3), "ArgumentError", "tensor on cpu but communicator bound to cuda:0"),
    "13-cpu-array": (lambda g: ones(3), "ArgumentError", "tensor on cpu but communicator bound to cuda:0"),
    "13-other-gpus-cupy": (lambda g: CupyArray(g, ones(3), 1), "ArgumentError", "tensor on cuda:1 but communicator"),
    "13-dlpack": (lambda g: OfLibrary(2, 1), "ArgumentError", "tensor on cuda:1 but communicator bound to cuda:0"),
    "13-two-gpus-in-a-list": (
        lambda g: [tensor(g, torch.ones(3)), tensor(g, torch.ones(3), 1)],
        "ArgumentError",
        "tensor on cuda:1 but communicator bound to cuda:0. Move it with .to('cuda:0'), or make a Communicator with "
        "device='cuda:1'. (item 1 of the list)",
    ),
    "dlpack-refuses": (lambda g: OfLibrary(2, 0), "ArgumentError", "cannot be shared through DLPack: not this one"),
    "dlpack-other": (lambda g: OfLibrary(10, 0), "UnsupportedError", "memory of DLPack's device type 10"),
    "1-str": (lambda g: "x", "ArgumentError", "expected a tensor or a list of tensors, got str"),
    "2-uint8": (lambda g: Array(ones(3, dtype="|u1")), "UnsupportedError", "dtype uint8 not supported for op=sum"),
    "6-read-only": (
        lambda g: Array(ones(3), data=(4096, True)),
        "ArgumentError",
        "Array is read-only and allreduce wo",
    ),
    "7-expanded": (
        lambda g: CupyArray(g, ones(4), shape=(3, 4), strides=(0, 4)),
        "ArgumentError",
        "overlapping elements (stride 0 in dim 0)",
    ),
    "8-overlap": (
        lambda g: (lambda x: [Array(x[:6]), Array(x[4:])])(ones(10)),
        "ArgumentError",
        "tensors 0 and 1 overlap by 8 bytes",
    ),
    "14-requires-grad": (
        lambda g: tensor(g, torch.ones(3)).requires_grad_(),
        "ArgumentError",
        "dpcomm is not differentiable",
    ),
    "mask": (lambda g: Array(ones(3), mask=Array(ones(3))), "UnsupportedError", "Array has a mask"),
    "big-endian": (lambda g: Array(ones(3, dtype=">f4")), "UnsupportedError", "not the byte order of this machine"),
    "gaps": (
        lambda g: Array(columns(ones(3, 4))),
        "UnsupportedError",
        "Array is not contiguous (shape (3, 2), strides",
    ),
    "misaligned": (lambda g: Array(ones(3), data=(4097, False)), "ArgumentError", "is not aligned to float32"),
    "stream-0": (lambda g: Array(ones(3), stream=0), "ArgumentError", "has stream 0: ambiguous"),
    "malformed": (lambda g: Array(ones(3), shape=None), "ArgumentError", "interface__ of Array is malformed"),
}


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("fault", REFUSED)
def test_refused_locally(gpu: Gpu, fault: str, asynchronous: bool) -> None:
    make, name, text = REFUSED[fault]
    caught = catch(two()[0].allreduce, make(gpu), async_op=asynchronous)
    check(caught, name, text)
    assert not gpu.named("run_on", "enqueue"), "something was sent"


def test_13_driver_is_asked_where_the_object_does_not_say(gpu: Gpu) -> None:
    mine, other = Array(ones(3)), Array(ones(3))
    gpu.owners = {x.__cuda_array_interface__["data"][0]: ordinal for ordinal, x in enumerate((mine, other))}
    comm = two()[0]
    comm.allreduce(mine)
    check(catch(comm.allreduce, other), "ArgumentError", "tensor on cuda:1 but communicator bound to cuda:0")
    assert len(gpu.named("run_on")) == 1


def test_13_gpu_arrays_for_a_communicator_on_cpu(gpu: Gpu) -> None:
    comms = dpcomm.init_local(["cpu"] * 2)
    for x in (tensor(gpu, torch.ones(3), 1), CupyArray(gpu, ones(3), 1), OfLibrary(2, 1)):
        for given in (x, [x]):
            check(catch(comms[0].allreduce, given), "ArgumentError", "tensor on cuda:1 but communicator bound to cpu")


def test_one_rank_validates_and_moves_nothing(gpu: Gpu) -> None:
    with dpcomm.Communicator(rank=0, nranks=1, device=0) as comm:
        x = tensor(gpu, torch.ones(3))
        assert comm.allreduce(x) is x
        assert comm.allreduce([x, Array(ones(2))], async_op=True).wait()
        check(catch(comm.allreduce, torch.ones(3)), "ArgumentError", "tensor on cpu but communicator bound to cuda:0")
    check(catch(comm.allreduce, x), "ArgumentError", "has been closed")


# --- copies, and what lives how long ---------------------------------------------------------------------------------


def staged(gpu: Gpu, kind: str) -> tuple[Any, Callable[[], np.ndarray[Any, Any]]]:
    """An array that is not contiguous, and its numbers."""
    if kind == "cupy":
        memory = ones(3, 4)
        return CupyArray(gpu, columns(memory)), lambda: memory
    under = torch.ones(3, 4)
    return columns(tensor(gpu, under)), lambda: under.numpy()


@pytest.mark.parametrize("kind", ["cupy", "torch"])
def test_a_copy_comes_back_behind_the_join(gpu: Gpu, kind: str) -> None:
    """The fake's result exists only once it is joined: a copy back before that brings the input."""
    x, numbers = staged(gpu, kind)
    wanted = ones(3, 4)
    columns(wanted)[...] = 2
    comm = two()[0]
    comm.allreduce(x)
    assert np.array_equal(numbers(), wanted)
    work = comm.allreduce(x, async_op=True)
    assert np.array_equal(numbers(), wanted)
    gpu.torch_stream = gpu.cupy_stream = 8
    gpu.log.clear()
    work.wait()
    assert [entry[:3] for entry in gpu.named("join", "copy back")] == [("join", "rank 0", 8), ("copy back", 8)]
    assert np.array_equal(numbers(), 2 * wanted - (wanted == 1))
    work.wait()
    assert len(gpu.named("copy back")) == 1
    if kind == "cupy":  # the buffer is memory of stream 6, and was read on 8
        assert gpu.named("wait_event") == [("wait_event", 6, 8)]
    else:
        assert ("record_stream", 8) in gpu.log


def test_without_the_join_the_copy_would_bring_the_input(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the test above."""
    x, numbers = staged(gpu, "cupy")
    monkeypatch.setattr(Pending, "join", lambda self, stream, timeout_s: None)
    two()[0].allreduce(x, async_op=True).wait()
    assert np.array_equal(numbers(), ones(3, 4))


def test_tensors_of_asynchronous_calls_are_known_to_the_allocator(gpu: Gpu) -> None:
    x = tensor(gpu, torch.ones(3))
    comm = two()[0]
    comm.allreduce(x)
    assert not gpu.named("record_stream"), "a synchronous call is in the order of the caller's stream"
    comm.allreduce(x, async_op=True)
    assert gpu.named("record_stream") == [("record_stream", STREAM)]
    comm.allreduce(columns(tensor(gpu, torch.ones(3, 4))), async_op=True)  # its view, and the copy
    assert len(gpu.named("record_stream")) >= 3


def test_arrays_of_dropped_works_live_until_the_device_is_done(gpu: Gpu) -> None:
    comm = two()[0]
    x = Array(ones(3))
    alive = weakref.ref(x)
    comm.allreduce(x, async_op=True)
    del x
    gc.collect()
    assert alive() is not None
    comm.allreduce(Array(ones(3)), async_op=True)
    assert alive() is not None, "the first has not ended"
    for pending in comm._native.pendings:  # type: ignore[union-attr]
        pending.end()
    comm.allreduce(Array(ones(3)), async_op=True)
    gc.collect()
    assert alive() is None


def test_nothing_is_queried_while_a_graph_is_captured(gpu: Gpu) -> None:
    comm = two()[0]
    before = comm.allreduce(tensor(gpu, torch.ones(3)), async_op=True)
    gpu.capturing = True  # the fake's is_completed fails now
    x = Array(ones(3))
    alive = weakref.ref(x)
    comm.allreduce(x, async_op=True).wait()
    del x
    gpu.capturing = False
    before.wait()
    comm.allreduce(Array(ones(3)), async_op=True)
    gc.collect()
    assert alive() is not None, "a graph may be replayed"
    assert [pending.queried for pending in comm._native.pendings] == [1, 0, 0]  # type: ignore[union-attr]


# --- works -----------------------------------------------------------------------------------------------------------


def test_wait_is_a_wait_of_the_stream_and_with_a_time_limit_of_the_host(gpu: Gpu) -> None:
    comm = two(timeout_s=12.0)[0]
    comm.allreduce(tensor(gpu, torch.ones(3)))
    assert comm._native.timeout_s == 12.0  # type: ignore[union-attr]
    work = comm.allreduce(tensor(gpu, torch.ones(3)), async_op=True)
    assert not work.is_completed()
    gpu.torch_stream = 8
    assert work.wait()
    assert gpu.named("join", "synchronize") == [("join", "rank 0", 8, 12.0)]
    assert work.is_completed()
    gpu.log.clear()
    assert comm.allreduce(tensor(gpu, torch.ones(3)), async_op=True).wait(5.0)
    assert [entry[0] for entry in gpu.named("join", "synchronize")] == ["synchronize", "join"]
    check(catch(work.wait, -1.0), "ArgumentError", "timeout_s=-1.0")


def test_a_works_time_runs_out_and_it_goes_on(gpu: Gpu) -> None:
    comm = two()[0]
    work = comm.allreduce(tensor(gpu, torch.ones(3)), async_op=True)
    (pending,) = comm._native.pendings  # type: ignore[union-attr]
    pending.slow = True
    check(catch(work.wait, 0.05), "CommTimeoutError", "has not ended in 0.05 s", within_s=5.0)
    assert not gpu.named("join")
    pending.slow = False
    assert work.wait(1.0)
    pending.error = dpcomm.PeerLostError("rank 1 is gone")
    assert work.exception() is pending.error
    check(catch(work.wait, 1.0), "PeerLostError", "rank 1 is gone")


def test_allreduce_local_starts_all_before_any_stream_waits(gpu: Gpu) -> None:
    comms = dpcomm.init_local([0, 0, 1])
    xs = [Array(ones(3), stream=20 + rank) for rank in range(3)]
    dpcomm.allreduce_local(comms, xs)
    order = [(entry[0], entry[-1] if entry[0] == "enqueue" else entry[2]) for entry in gpu.named("enqueue", "join")]
    assert order == [(what, 20 + rank) for what in ("enqueue", "join") for rank in range(3)]
    assert all(x.memory.tolist() == [3.0] * 3 for x in xs)


def test_lists_are_packed_as_on_cpu(gpu: Gpu) -> None:
    comm = two()[0]
    xs = [Array(ones(3)), Array(ones(4, dtype="<f8")), tensor(gpu, torch.ones(5))]
    comm.allreduce(xs, "mean")
    counts = [call[3] for call in gpu.named("run_on")]
    assert counts == [[3, 5], [4]]
    assert arrays.device_of(xs[0]) == "cuda"
