"""A GPU that is not there: arrays with the interfaces of CUDA over NumPy's memory, and the extension's classes for p2p.

What the fakes do is written to one log, in order. A call "ends on the device" when somebody waits for it, not before:
so a result that is used without having been waited for is the input.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
import threading
import types
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from dpcomm import _native, arrays
from dpcomm.errors import Error, P2PUnavailableError

STREAM = 77  # of every fake communicator
NAMES = {code: name for name, code in _native.DTYPES.items()}


class Gpu:
    """What happens on it, and what it is set to.

    Attributes:
        log: What was done, in order.
        torch_stream, cupy_stream: The current streams.
        capturing: Whether torch's current stream is being captured.
        owners: By address, the GPU that the driver names; others it does not know.
        channels: What `p2p_channels` answers, by device.
        fail: By (stage, rank, pinned), what a builder raises there.
    """

    def __init__(self) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.torch_stream, self.cupy_stream, self.capturing = 5, 6, False
        self.owners: dict[int, int] = {}
        self.channels: dict[int, int] = {}
        self.fail: dict[tuple[str, int, bool], BaseException] = {}
        self.unreachable: set[int] = set()
        self.builders: list[Any] = []
        self.lock = threading.Lock()

    def named(self, *names: str) -> list[tuple[Any, ...]]:
        return [entry for entry in self.log if entry[0] in names]


class Pending:
    """A call of a fake communicator."""

    def __init__(self, gpu: Gpu, name: str, memory: list[npt.NDArray[Any]], factor: int) -> None:
        self.gpu, self.name, self.memory, self.factor = gpu, name, memory, factor
        self.ended, self.error, self.queried = False, None, 0
        self.slow = False  # never ends by itself

    def end(self) -> None:
        if not self.ended:
            self.ended = True
            for part in self.memory:
                part *= self.factor

    def join(self, stream: int, timeout_s: float) -> None:
        self.gpu.log.append(("join", self.name, stream, timeout_s))
        self.end()

    def synchronize(self, timeout_s: float) -> bool:
        self.gpu.log.append(("synchronize", self.name))
        if self.error is not None:
            raise self.error
        if not self.slow:
            self.end()
        return self.ended

    def is_completed(self) -> bool:
        assert not self.gpu.capturing, "queried during capture"
        self.queried += 1
        return self.ended

    def exception(self) -> Any:
        return self.error


class Comm:
    """A fake native communicator: each call multiplies by the number of ranks, as if all had the same."""

    def __init__(self, gpu: Gpu, rank: int, nranks: int, device: int, arena: str) -> None:
        self.gpu, self.rank, self.nranks, self.device, self.stream, self.arena = (
            gpu,
            rank,
            nranks,
            device,
            STREAM,
            arena,
        )
        self.failure: Error | None = None
        self.pendings: list[Pending] = []
        self.timeout_s = 0.0  # of the last synchronous call

    def _call(self, addresses: list[int], counts: list[int], dtype: int) -> Pending:
        memory = [_memory(a, n, NAMES[dtype]) for a, n in zip(addresses, counts, strict=True)]
        return Pending(self.gpu, f"rank {self.rank}", memory, self.nranks)

    def run_on(self, *call: Any) -> None:
        *call_, self.timeout_s = call
        self.gpu.log.append(("run_on", self.rank, *call_))
        self._call(*call[:3]).end()

    def enqueue(self, *call: Any) -> Pending:
        self.gpu.log.append(("enqueue", self.rank, *call))
        self.pendings.append(self._call(*call[:3]))
        return self.pendings[-1]

    def describe(self) -> dict[str, object]:
        return {"engine": "p2p", "device": self.device, "arena": self.arena, "arena_bytes": 0, "sequence": 0}

    def check(self) -> None:
        if self.failure is not None:
            raise self.failure

    def abort(self, reason: str) -> None:
        self.gpu.log.append(("abort", self.rank, reason))

    def close(self, grace_s: float) -> None:
        self.gpu.log.append(("close", self.rank))


class Wish:
    """Of the engine p2p."""

    def __init__(
        self, arena_bytes: int, max_ctas: int = 0, slots: int = 0, slice_bytes: int = 0, pinned: bool = False
    ) -> None:
        self.arena_bytes, self.max_ctas, self.pinned = arena_bytes, max_ctas, pinned


class Builder:
    """One rank of a fake communicator under construction."""

    def __init__(self, gpu: Gpu, rank: int, nranks: int, device: int, wish: Wish, channels: int) -> None:
        self.gpu, self.rank, self.nranks, self.device, self.wish = gpu, rank, nranks, device, wish
        self._do("allocate", device, wish.max_ctas, channels)

    def _do(self, stage: str, *more: Any) -> None:
        with self.gpu.lock:
            self.gpu.log.append((stage, self.rank, self.wish.pinned, *more))
        error = self.gpu.fail.get((stage, self.rank, self.wish.pinned))
        if error is not None:
            raise error

    def endpoint(self) -> bytes:
        return bytes(32)

    def probe(self, endpoints: list[bytes]) -> list[bool]:
        return [rank >= self.rank or rank not in self.gpu.unreachable for rank in range(self.nranks)]

    def bind(self, secret: bytes, timeout_s: float) -> None:
        self._do("bind")

    def warnings(self) -> list[str]:
        return []

    def finish(self, timeout_s: float, name: str) -> Comm:
        self._do("verify")
        return Comm(self.gpu, self.rank, self.nranks, self.device, "pinned" if self.wish.pinned else "device")


class Array:
    """Has `__cuda_array_interface__` over NumPy's memory, and nothing else."""

    def __init__(self, memory: npt.NDArray[Any], **facts: Any) -> None:
        self.memory = memory
        self.facts = {
            "version": 3,
            "shape": memory.shape,
            "typestr": memory.dtype.str,
            "data": (memory.__array_interface__["data"][0], False),
            "strides": None if memory.flags.c_contiguous else memory.strides,
            **facts,
        }

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return self.facts


class OfLibrary:
    """Lies on a GPU according to `__dlpack_device__`, which is all that it can do."""

    def __init__(self, kind: int, ordinal: int) -> None:
        self.place = (kind, ordinal)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.place

    def __dlpack__(self, **_: Any) -> Any:
        raise BufferError("not this one")


class CupyStream:
    """A stream of the fake CuPy."""

    def __init__(self, gpu: Gpu, ptr: int) -> None:
        self.gpu, self.ptr = gpu, ptr

    def is_capturing(self) -> bool:
        return False

    def record(self) -> int:
        return self.ptr

    def wait_event(self, event: int) -> None:
        self.gpu.log.append(("wait_event", self.ptr, event))


class CupyDevice:
    """A device of the fake CuPy, which `with` makes current."""

    def __init__(self, ordinal: int) -> None:
        self.id = ordinal

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None


class CupyArray(Array):
    """As CuPy's: says where it lies, copies itself."""

    def __init__(self, gpu: Gpu, memory: npt.NDArray[Any], ordinal: int = 0, **facts: Any) -> None:
        super().__init__(memory, **facts)
        self.gpu, self.device = gpu, CupyDevice(ordinal)

    def copy(self, order: str) -> CupyArray:
        self.gpu.log.append(("copy", self.gpu.cupy_stream))
        return CupyArray(self.gpu, self.memory.copy(order="C"), self.device.id)

    def __setitem__(self, place: Any, other: CupyArray) -> None:
        self.gpu.log.append(("copy back", self.gpu.cupy_stream))
        self.memory[place] = other.memory


CupyArray.__module__ = "cupy.fake"


class Tensor(torch.Tensor):
    """A tensor on CPU that says it lies on cuda:0; cuda:1 if `of` says so."""

    gpu: Gpu
    ordinal = 0

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", self.ordinal)

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @property
    def is_cpu(self) -> bool:  # type: ignore[override]
        return False

    def record_stream(self, stream: Any) -> None:
        self.gpu.log.append(("record_stream", stream.cuda_stream))

    def copy_(self, other: torch.Tensor) -> Any:  # type: ignore[override]
        self.gpu.log.append(("copy back", self.gpu.torch_stream))
        return super().copy_(other)


class OtherTensor(Tensor):
    """A tensor on cuda:1."""

    ordinal = 1


def tensor(gpu: Gpu, values: torch.Tensor, ordinal: int = 0) -> Any:
    """A torch tensor on a fake GPU."""
    kind = OtherTensor if ordinal else Tensor
    kind.gpu = gpu
    return values.as_subclass(kind)


@pytest.fixture(name="gpu")
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """Two GPUs that torch, CuPy and the extension believe in."""
    gpu = Gpu()

    def channels(device: int, ranks_here: int, wish: Wish) -> int:
        with gpu.lock:
            gpu.log.append(("channels", device, ranks_here, wish.max_ctas, wish.pinned))
        return gpu.channels.get(device, 8)

    def builder(rank: int, nranks: int, device: int, wish: Wish, channels: int) -> Builder:
        return Builder(gpu, rank, nranks, device, wish, channels)

    def local(devices: list[int], wish: Wish, timeout_s: float, name: str) -> list[Comm]:
        gpu.log.append(("p2p_local", list(devices), wish.max_ctas, wish.pinned))
        error = gpu.fail.get(("local", 0, wish.pinned))
        if error is not None:
            raise error
        arena = "pinned" if wish.pinned else "device"
        return [Comm(gpu, rank, len(devices), device, arena) for rank, device in enumerate(devices)]

    def stream(device: Any = None) -> Any:
        return types.SimpleNamespace(cuda_stream=gpu.torch_stream)

    natives = {
        "cuda_reason": lambda: "",
        "cuda_devices": lambda: [{"ordinal": 0, "name": "Fake", "capability": "9.0", "sms": 1, "pci_bus_id": "0:1"}],
        "cuda_device_of": lambda address: gpu.owners.get(address, -1),
        "P2pWish": Wish,
        "P2pBuilder": builder,
        "p2p_channels": channels,
        "p2p_local": local,
    }
    for name, value in natives.items():
        monkeypatch.setattr(_native, name, value, raising=False)
    torches = {
        "is_initialized": lambda: True,
        "current_stream": stream,
        "is_current_stream_capturing": lambda: gpu.capturing,
        "device": lambda ordinal: contextlib.nullcontext(),
        "ExternalStream": lambda handle, device: types.SimpleNamespace(cuda_stream=handle),
    }
    for name, value in torches.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(arrays, "PLAIN", (*arrays.PLAIN, Tensor, OtherTensor))
    cuda = types.SimpleNamespace(Device=CupyDevice, get_current_stream=lambda: CupyStream(gpu, gpu.cupy_stream))
    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(cuda=cuda))
    return gpu


def unavailable(text: str) -> P2PUnavailableError:
    """What a builder raises where GPUs do not reach each other."""
    return P2PUnavailableError(text)


def _memory(address: int, count: int, dtype: str) -> npt.NDArray[Any]:
    size = count * np.dtype(dtype).itemsize
    if size == 0:
        return np.empty(0, dtype)
    memory: npt.NDArray[Any] = np.ctypeslib.as_array((ctypes.c_char * size).from_address(address)).view(dtype)
    return memory
