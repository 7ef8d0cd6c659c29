"""Tensors and arrays become parts of a call: address, count, dtype. The only module that looks inside tensors.

What lies in CPU memory, contiguous, aligned and in native byte order is reduced where it is; all else is copied into a
buffer and back. Knows nothing of ranks, codecs or calls.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from dpcomm.errors import ArgumentError, Error, UnsupportedError, bare_message

Array: TypeAlias = Any  # torch.Tensor, numpy.ndarray, or an object with __dlpack__ that lies in CPU memory
Intervals: TypeAlias = "npt.NDArray[np.int64]"  # two rows: where each begins and where it ends

NAMES = ("float32", "float64", "float16", "bfloat16", "int32", "int64", "complex64", "complex128")
TORCH_NAMES: dict[torch.dtype, str] = {getattr(torch, name): name for name in NAMES}
NUMPY_NAMES: dict[np.dtype[Any], str] = {np.dtype(name): name for name in NAMES if name != "bfloat16"}
# Without complex tensors, which may be lazily conjugated.
REAL_NAMES = {dtype: name for dtype, name in TORCH_NAMES.items() if not dtype.is_complex}
ITEMSIZES = {name: dtype.itemsize for dtype, name in TORCH_NAMES.items()}
PLAIN = (torch.Tensor, torch.nn.Parameter)
STRIDED = torch.strided
MAX_BYTES = 2**63 - 1
CPU_ONLY = "the engines of this version serve CPU memory only"


class Segment:
    """One array's piece of a call, looked at closely. `finish` must run once, after the call succeeded.

    Attributes:
        address: Of the memory to reduce, 0 where count is 0.
        count: Elements of `dtype`.
        dtype: Its name.
        start, end: The bytes [start, end) of the user's memory that the elements lie in.
    """

    __slots__ = ("_buffer", "_target", "address", "count", "dtype", "end", "itemsize", "shape", "start", "strides")

    def __init__(self, target: torch.Tensor | npt.NDArray[Any], dtype: str) -> None:
        self.dtype = dtype
        self._target = target
        self._buffer: torch.Tensor | npt.NDArray[Any] | None = None
        self.shape = tuple(target.shape)
        if isinstance(target, torch.Tensor):
            self.itemsize = target.element_size()
            self.strides = tuple(stride * self.itemsize for stride in target.stride())
            self.address, self.count = _data_ptr(target), target.numel()
        else:
            self.itemsize = target.dtype.itemsize
            self.strides = target.strides
            self.address, self.count = int(target.__array_interface__["data"][0]), target.size
        if self.count * self.itemsize > MAX_BYTES:
            raise ArgumentError(f"allreduce: {self.count} elements of {dtype} are more bytes than can be addressed")
        steps = [(size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True)]
        empty = self.count == 0
        self.start = self.address + sum(step for step in steps if step < 0 and not empty)
        self.end = self.start if empty else self.start + sum(abs(step) for step in steps) + self.itemsize

    def stage(self, buffer: torch.Tensor | npt.NDArray[Any]) -> None:
        """Lets the call work on a contiguous copy; `finish` copies the result back."""
        self._buffer = buffer
        if isinstance(buffer, torch.Tensor):
            self.address = _data_ptr(buffer)
        else:
            self.address = int(buffer.__array_interface__["data"][0])

    def runs(self) -> Intervals:
        """The user's memory as stretches without gaps. For an array that does not overlap itself."""
        length, starts = self.itemsize, np.array([self.start], np.int64)
        for stride, size in sorted((abs(stride), size) for stride, size in zip(self.strides, self.shape, strict=True)):
            if size > 1 and len(starts) == 1 and stride == length:
                length *= size
            elif size > 1:
                starts = np.add.outer(starts, np.arange(size, dtype=np.int64) * stride).reshape(-1)
        return np.stack([starts, starts + length])

    def finish(self) -> None:
        """Copies the result to where the user wants it."""
        buffer, self._buffer = self._buffer, None
        if isinstance(buffer, torch.Tensor):
            assert isinstance(self._target, torch.Tensor)
            with torch.no_grad():
                self._target.copy_(buffer)
        elif buffer is not None:
            assert isinstance(self._target, np.ndarray)
            self._target[...] = buffer


class Parts(NamedTuple):
    """The arrays of one call in columns, so that a list of thousands costs little for each.

    Attributes:
        addresses, counts, dtypes: What is reduced, array by array.
        segments: By their place in the list, the arrays that `direct` did not take.
        kept: The arrays themselves, so that their memory lives whatever becomes of the list.
    """

    addresses: list[int]
    counts: list[int]
    dtypes: list[str]
    segments: dict[int, Segment]
    kept: tuple[Array, ...]

    def extents(self) -> Intervals:
        """Between which bytes of the user's memory each array lies."""
        starts, counts = np.array(self.addresses, np.int64), np.array(self.counts, np.int64)
        both = np.stack([starts, starts + counts * np.array([ITEMSIZES[dtype] for dtype in self.dtypes], np.int64)])
        for place, made in self.segments.items():
            both[:, place] = made.start, made.end
        both[:, counts == 0] = 0
        return both


def direct(x: Array) -> tuple[int, int, str] | None:
    """Address, count and dtype name of the usual case, at the least cost; None where `segment` must look closer."""
    if type(x) in PLAIN:
        name = REAL_NAMES.get(x.dtype)
        if (
            name is not None
            and x.is_cpu
            and x.layout is STRIDED
            and x.is_contiguous()
            and not x.is_neg()
            and not (x.requires_grad and torch.is_grad_enabled())
        ):
            return _data_ptr(x), x.numel(), name
    elif type(x) is np.ndarray:
        name = NUMPY_NAMES.get(x.dtype)
        if name is not None and x.flags.carray:  # C-contiguous, aligned, writeable
            return _array_address(x), x.size, name
    return None


def parts(x: Array | Sequence[Array]) -> Parts:
    """Validates what a call was given, an array or a list of them; not whether any share memory (`check_overlap`)."""
    listed = isinstance(x, (list, tuple))
    addresses, counts, dtypes = [], [], []
    segments = {}
    kept = tuple(x) if listed else (x,)
    for place, item in enumerate(kept):
        plain = direct(item)
        if plain is None:
            made = segments[place] = _item(item, place) if listed else segment(item)
            plain = made.address, made.count, made.dtype
        addresses.append(plain[0])
        counts.append(plain[1])
        dtypes.append(plain[2])
    return Parts(addresses, counts, dtypes, segments, kept)


def segment(x: Array) -> Segment:
    """Validates one array and makes its segment.

    Raises:
        ArgumentError: Not an array, read-only, overlapping itself, on another device, or requiring grad.
        UnsupportedError: Sparse, meta, fake or a wrapper of other tensors.
    """
    if isinstance(x, torch.Tensor):
        return _tensor_segment(x)
    if isinstance(x, np.ndarray):
        return _numpy_segment(x)
    if hasattr(x, "__cuda_array_interface__"):
        raise UnsupportedError(f"allreduce: {type(x).__name__} in GPU memory: {CPU_ONLY}")
    if hasattr(x, "__dlpack__") and not isinstance(x, np.generic):
        return _dlpack_segment(x)
    raise ArgumentError(f"allreduce: expected a tensor or a list of tensors, got {type(x).__name__}")


def check_overlap(lists: Sequence[Parts]) -> None:
    """Raises ArgumentError where two arrays of all lists share memory (row-wise interleaved views do not)."""
    extents = np.concatenate([one.extents() for one in lists], axis=1)
    if _overlap(extents) is None:
        return
    segments = [one.segments.get(place) for one in lists for place in range(len(one.counts))]
    runs = [extents[:, [i]] if made is None or not made.count else made.runs() for i, made in enumerate(segments)]
    found = _overlap(np.concatenate(runs, axis=1))
    if found is not None:
        owners = np.repeat(np.arange(len(runs)), [one.shape[1] for one in runs])
        first, second = sorted(owners[list(found)])
        raise ArgumentError(
            f"allreduce: tensors {first} and {second} overlap by {_shared_bytes(runs[first], runs[second])} bytes. "
            "Pass each memory once."
        )


def is_whole_storage(x: torch.Tensor) -> bool:
    """Whether a tensor is contiguous and begins where its storage does, as DDP expects of a hook's result."""
    return x.is_contiguous() and x.storage_offset() == 0


def digest(x: Array) -> tuple[str, int]:
    """What a tensor is ("float32[3, 4]"), and 63 bits of a hash of its bytes."""
    tensor = x if isinstance(x, torch.Tensor) else torch.from_numpy(np.array(x))
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    size = tensor.numel() * tensor.element_size()
    data = (ctypes.c_char * size).from_address(_data_ptr(tensor)) if size else b""
    value = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 1
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}", value


def _item(x: Array, place: int) -> Segment:
    try:
        return segment(x)
    except Error as error:
        raise type(error)(f"{bare_message(error)} (item {place} of the list)") from None


def _data_ptr(x: torch.Tensor) -> int:
    try:
        address = x.data_ptr()
    except RuntimeError as error:  # functorch wrappers
        raise UnsupportedError(f"allreduce: the tensor has no memory of its own ({error})") from None
    if address == 0 and x.numel():  # a storage that was freed, or zeros that torch does not store
        raise UnsupportedError(f"allreduce: the tensor has {x.numel()} elements, but its memory has been freed")
    return address


def _array_address(x: npt.NDArray[Any]) -> int:
    """Of a writeable C-contiguous array; a third of what `__array_interface__` costs. 0 where it is empty."""
    return ctypes.addressof(ctypes.c_char.from_buffer(x)) if x.size else 0  # type: ignore[arg-type]


def _tensor_segment(x: torch.Tensor) -> Segment:
    if x.device.type == "meta" or isinstance(x, torch._subclasses.FakeTensor):
        raise UnsupportedError("allreduce: a meta or fake tensor holds no numbers. Pass a real one.")
    if x.layout is not torch.strided:
        kind = str(x.layout).removeprefix("torch.").replace("_", " ")
        raise UnsupportedError(f"allreduce: {kind} layout; call .to_dense() or use DDP's default path")
    if type(x) not in PLAIN and torch.utils._python_dispatch.is_traceable_wrapper_subclass(x):
        raise UnsupportedError(f"allreduce: {type(x).__name__} wraps other tensors; pass those (x.to_local())")
    if x.device.type != "cpu":
        raise UnsupportedError(f"allreduce: tensor on {x.device}: {CPU_ONLY}. Move it with .cpu().")
    if x.requires_grad and torch.is_grad_enabled():
        raise ArgumentError("allreduce: dpcomm is not differentiable; use torch.no_grad() or .detach()")
    target = x.detach()
    made = Segment(target, TORCH_NAMES.get(x.dtype, str(x.dtype).removeprefix("torch.")))
    if target.is_contiguous() and not target.is_conj() and not target.is_neg():
        return made
    _check_self_overlap(made)
    made.stage(target.resolve_conj().resolve_neg().contiguous())
    return made


def _numpy_segment(x: npt.NDArray[Any]) -> Segment:
    if isinstance(x, np.ma.MaskedArray):
        raise UnsupportedError("allreduce: a masked array; pass its .data or .filled()")
    if not x.flags.writeable:
        raise ArgumentError("allreduce: the array is read-only and allreduce works in place. Pass a copy.")
    native = x.dtype.newbyteorder("=")
    made = Segment(x, NUMPY_NAMES.get(native, native.name))
    if x.flags.c_contiguous and x.flags.aligned and x.dtype.isnative:
        return made
    _check_self_overlap(made)
    if native in NUMPY_NAMES:
        made.stage(np.array(x, dtype=native, order="C", copy=True, subok=False))
    return made


def _dlpack_segment(x: Array) -> Segment:
    device_type = int(x.__dlpack_device__()[0])
    if device_type != 1:  # kDLCPU
        raise UnsupportedError(f"allreduce: {type(x).__name__} is not in CPU memory: {CPU_ONLY}")
    try:
        return _tensor_segment(torch.utils.dlpack.from_dlpack(x))
    except (BufferError, TypeError) as error:
        raise ArgumentError(f"allreduce: {type(x).__name__} cannot be shared through DLPack: {error}") from None


def _check_self_overlap(made: Segment) -> None:
    """Each stride, smallest first, must step over all that the smaller ones reach."""
    if made.count == 0:
        return
    reach = made.itemsize
    dims = [(abs(made.strides[dim]), dim) for dim, size in enumerate(made.shape) if size > 1]
    for stride, dim in sorted(dims):
        if stride < reach:
            raise ArgumentError(
                f"allreduce: tensor has overlapping elements (stride {stride // made.itemsize} in dim {dim}). "
                "Pass x.contiguous() or x.clone()."
            )
        reach += (made.shape[dim] - 1) * stride


def _overlap(intervals: Intervals) -> tuple[int, int] | None:
    """Two intervals that overlap, if any do."""
    order = intervals[0].argsort(kind="stable")
    starts, ends = intervals[:, order]
    inside = starts[1:] < np.maximum.accumulate(ends)[:-1]
    if not inside.any():
        return None
    later = int(inside.argmax()) + 1
    return int(order[ends[:later].argmax()]), int(order[later])


def _shared_bytes(a: Intervals, b: Intervals) -> int:
    """How many bytes two arrays share, of which neither overlaps itself."""
    both = np.concatenate([a, b], axis=1)
    starts, ends = both[:, both[0].argsort()]
    reach = np.maximum.accumulate(ends)
    covered = reach[0] - starts[0] + (reach[1:] - np.maximum(starts[1:], reach[:-1])).sum()
    return int((both[1] - both[0]).sum() - covered)
