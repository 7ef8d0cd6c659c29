"""Arrays in memory of a GPU: where they lie, and the stream that orders them. `arrays` has what is common.

Torch tensors, CuPy arrays, and whatever has `__cuda_array_interface__` (version 3 or older) or `__dlpack__`. What is
contiguous is reduced where it is; tensors and CuPy arrays that are not are copied on the caller's stream and back.
Nothing here initialises CUDA but a call with such an array.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from dpcomm import _native, arrays
from dpcomm.arrays import Array, Layout, Parts, Plain, Segment
from dpcomm.errors import ArgumentError, UnsupportedError

# The interface's number for the legacy default stream, which is 0 for the extension. 2, the per-thread one, is the CUDA
# runtime's own handle of it.
LEGACY = 1


class TorchSegment(Segment):
    """A piece in a tensor on a GPU."""

    __slots__ = ()

    def finish(self) -> None:
        """Copies the result back on torch's current stream; call it behind the join."""
        buffer = self._buffer
        super().finish()
        if buffer is not None:  # its memory is of the stream that was current when the call began
            buffer.record_stream(torch.cuda.current_stream(buffer.device))


class CupySegment(Segment):
    """A piece in a CuPy array."""

    __slots__ = ("_stream",)

    def stage(self, buffer: Array, address: int) -> None:
        """As the base's; remembers the stream whose memory the buffer is."""
        super().stage(buffer, address)
        self._stream = _cupy_stream(buffer.device.id)

    def finish(self) -> None:
        """Copies the result back on CuPy's current stream; call it behind the join."""
        if self._buffer is None:
            return
        with self._target.device:
            super().finish()
        current = _cupy_stream(self._target.device.id)
        if current.ptr != self._stream.ptr:  # CuPy gives freed memory to later work of the stream it was made on
            self._stream.wait_event(current.record())


class Interface(NamedTuple):
    """What `__cuda_array_interface__` says. stream: a handle, or None where nothing needs to be ordered."""

    dtype: np.dtype[Any]
    layout: Layout
    contiguous: bool
    stream: int | None


def direct(x: Array, ordinal: int) -> Plain | None:
    """As `arrays.direct`, for torch tensors on GPU `ordinal`."""
    if type(x) in arrays.PLAIN:
        name = arrays.REAL_NAMES.get(x.dtype)
        if (
            name is not None
            and x.is_cuda
            and x.device.index == ordinal
            and x.layout is arrays.STRIDED
            and x.is_contiguous()
            and not x.is_neg()
            and not (x.requires_grad and torch.is_grad_enabled())
        ):
            return arrays.data_ptr(x), x.numel(), name
    return None


def parts(x: Array | Sequence[Array], ordinal: int) -> Parts:
    """As `arrays.parts`, for arrays that must all lie on GPU `ordinal`."""
    return arrays.collect(x, lambda item: direct(item, ordinal), lambda item: segment(item, ordinal))


def segment(x: Array, ordinal: int) -> Segment:
    """Validates one array and makes its segment; a copy that it needs is made on the array's current stream.

    Raises:
        ArgumentError: Not an array, read-only, overlapping itself, on another device, or requiring grad.
        UnsupportedError: Masked, or gaps between elements where nobody is there to copy them; see `arrays.segment`.
    """
    bound = f"cuda:{ordinal}"
    if isinstance(x, torch.Tensor):
        return arrays.tensor_segment(x, bound, TorchSegment)
    place = arrays.device_of(x)
    if place not in (bound, "cuda"):
        raise arrays.elsewhere(place, bound)
    if hasattr(x, "__cuda_array_interface__"):
        made = _interface_segment(x)
        owner = ordinal if place == bound else _native.cuda_device_of(made.address)  # where it does not say: the driver
        if owner not in (ordinal, -1):
            raise arrays.elsewhere(f"cuda:{owner}", bound)
        return made
    try:
        return arrays.tensor_segment(arrays.from_dlpack(x), bound, TorchSegment)
    except RuntimeError as error:
        if isinstance(error, (ArgumentError, UnsupportedError)):
            raise
        raise UnsupportedError(f"allreduce: torch cannot take {type(x).__name__} through DLPack: {error}") from error


def interface(x: Array) -> Interface:
    """Reads and checks `x.__cuda_array_interface__`.

    Raises:
        ArgumentError: Read-only, or an interface that is malformed.
        UnsupportedError: A mask, or bytes in another order than the machine's.
    """
    kind, facts = type(x).__name__, x.__cuda_array_interface__
    try:
        address, read_only = facts["data"]
        shape, dtype = tuple(int(size) for size in facts["shape"]), np.dtype(facts["typestr"])
        strides, stream = facts.get("strides"), facts.get("stream")
        plain = _contiguous_strides(shape, dtype.itemsize)
        layout = Layout(int(address or 0), dtype.itemsize, shape, plain if strides is None else tuple(strides))
    except (KeyError, TypeError, ValueError) as error:
        raise ArgumentError(f"allreduce: the __cuda_array_interface__ of {kind} is malformed: {error!r}") from None
    if read_only:
        raise ArgumentError(f"allreduce: {kind} is read-only and allreduce works in place. Pass a copy.")
    if facts.get("mask") is not None:
        raise UnsupportedError(f"allreduce: {kind} has a mask; pass the array without it")
    if not dtype.isnative:
        raise UnsupportedError(f"allreduce: {kind} holds {facts['typestr']!r}: not the byte order of this machine")
    if stream is not None and (not isinstance(stream, int) or stream == 0):
        raise ArgumentError(f"allreduce: the __cuda_array_interface__ of {kind} has stream {stream!r}: ambiguous")
    steps = zip(layout.strides, plain, shape, strict=True)
    contiguous = 0 in shape or all(stride == step for stride, step, size in steps if size > 1)
    return Interface(dtype, layout, contiguous, 0 if stream == LEGACY else stream)


def stream_of(kept: Sequence[Array], ordinal: int) -> int:
    """The one stream that orders the arrays of a call, as a cudaStream_t; 0 is the legacy default stream.

    Raises:
        ArgumentError: They are ordered by several.
    """
    streams = streams_of(kept, ordinal)
    if len(streams) > 1:
        raise ArgumentError(
            f"allreduce: the arrays of the list are ordered by {len(streams)} streams "
            f"({', '.join(hex(stream) for stream in streams)}). Make one of them current for all libraries."
        )
    return streams[0]


def streams_of(kept: Sequence[Array], ordinal: int) -> list[int]:
    """The current streams of the arrays' libraries, each once; torch's where the arrays need none."""
    streams = sorted({stream for stream in _streams(kept, ordinal) if stream is not None})
    return streams or [torch_stream(ordinal) if _torch_has_cuda() else 0]


def capturing(ordinal: int) -> bool:
    """Whether torch's or CuPy's current stream is being captured into a graph: then nothing may be queried."""
    if _torch_has_cuda():
        with torch.cuda.device(ordinal):
            if torch.cuda.is_current_stream_capturing():
                return True
    return "cupy" in sys.modules and bool(_cupy_stream(ordinal).is_capturing())


def protect(held: Parts, stream: int, ordinal: int) -> None:
    """Tells torch's allocator that a stream of ours uses the tensors of a call, so that it does not give them away."""
    of_segments = (array for made in held.segments.values() for array in made.memories())
    tensors = [array for array in (*held.kept, *of_segments) if isinstance(array, torch.Tensor)]
    if tensors:
        ours = external_stream(stream, ordinal)
        for tensor in tensors:
            tensor.record_stream(ours)


def external_stream(stream: int, ordinal: int) -> torch.cuda.Stream:
    """A stream of ours in torch's clothes."""
    made: torch.cuda.Stream = torch.cuda.ExternalStream(stream, device=ordinal)  # type: ignore[no-untyped-call]
    return made


def _interface_segment(x: Array) -> Segment:
    read = interface(x)
    dtype = arrays.NUMPY_NAMES.get(read.dtype, read.dtype.name)
    if not _is_cupy(x):
        if not read.contiguous:
            raise UnsupportedError(
                f"allreduce: {type(x).__name__} is not contiguous (shape {read.layout.shape}, strides "
                f"{read.layout.strides} bytes). dpcomm copies torch and CuPy arrays only; pass a contiguous one."
            )
        if read.layout.address % max(read.dtype.alignment, 1):
            raise ArgumentError(f"allreduce: {type(x).__name__} at {read.layout.address:#x} is not aligned to {dtype}")
        return Segment(x, dtype, read.layout)
    made = CupySegment(x, dtype, read.layout)
    if not read.contiguous:
        arrays.check_self_overlap(made)
        with x.device:
            buffer = x.copy(order="C")
        made.stage(buffer, interface(buffer).layout.address)
    return made


def _contiguous_strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    strides: list[int] = []
    for size in reversed(shape):
        strides.append(itemsize)
        itemsize *= size
    return tuple(reversed(strides))


def _streams(kept: Sequence[Array], ordinal: int) -> Iterator[int | None]:
    """Of each array, with what is the same for many asked once."""
    asked: dict[Callable[[int], int], int] = {}
    for x in kept:
        torch_like = isinstance(x, torch.Tensor) or not hasattr(x, "__cuda_array_interface__")
        if not torch_like and not _is_cupy(x):
            yield interface(x).stream
            continue
        ask = torch_stream if torch_like else _cupy_handle
        if ask not in asked:
            asked[ask] = ask(ordinal)
        yield asked[ask]


def _torch_has_cuda() -> bool:
    """Whether torch uses CUDA in this process already."""
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def torch_stream(ordinal: int) -> int:
    """Torch's current stream on a GPU, as a cudaStream_t."""
    return int(torch.cuda.current_stream(ordinal).cuda_stream)


def _cupy_handle(ordinal: int) -> int:
    return int(_cupy_stream(ordinal).ptr)


def _cupy_stream(ordinal: int) -> Any:
    cupy = importlib.import_module("cupy")
    with cupy.cuda.Device(ordinal):
        return cupy.cuda.get_current_stream()


def _is_cupy(x: Array) -> bool:
    return type(x).__module__.partition(".")[0] == "cupy"
