"""Tensors and arrays become parts of a call: address, count, dtype. Only this module and `cuda_arrays` look inside.

What lies in CPU memory, contiguous, aligned and in native byte order is reduced where it is; all else is copied into a
buffer and back. Knows nothing of ranks, codecs or calls. `cuda_arrays` builds on it for memory of GPUs.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from dpcomm.errors import ArgumentError, Error, UnsupportedError, bare_message

# torch.Tensor, numpy.ndarray, CuPy's, or an object with __dlpack__ or __cuda_array_interface__
Array: TypeAlias = Any
Plain: TypeAlias = "tuple[int, int, str]"  # address, count, name of the dtype
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
DLPACK_CPU, DLPACK_CUDA = 1, 2  # kDLCPU, kDLCUDA


class Layout(NamedTuple):
    """Where the elements of an array lie; strides are in bytes."""

    address: int
    itemsize: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Segment:
    """One array's piece of a call, looked at closely. `finish` must run once, after the call succeeded.

    Attributes:
        address: Of the memory to reduce, 0 where count is 0.
        count: Elements of `dtype`.
        dtype: Its name.
        start, end: The bytes [start, end) of the user's memory that the elements lie in.
    """

    __slots__ = ("_buffer", "_target", "address", "count", "dtype", "end", "itemsize", "shape", "start", "strides")

    def __init__(self, target: Array, dtype: str, layout: Layout) -> None:
        self.dtype = dtype
        self._target = target
        self._buffer: Array | None = None
        self.address, self.itemsize, self.shape, self.strides = layout
        self.count = math.prod(self.shape)
        if self.count * self.itemsize > MAX_BYTES:
            raise ArgumentError(f"allreduce: {self.count} elements of {dtype} are more bytes than can be addressed")
        steps = [(size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True)]
        empty = self.count == 0
        self.start = self.address + sum(step for step in steps if step < 0 and not empty)
        self.end = self.start if empty else self.start + sum(abs(step) for step in steps) + self.itemsize

    def stage(self, buffer: Array, address: int) -> None:
        """Lets the call work on a contiguous copy; `finish` copies the result back."""
        self._buffer, self.address = buffer, address

    def memories(self) -> tuple[Array, Array | None]:
        """The user's array, and the copy that the call works on, if there is one."""
        return self._target, self._buffer

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
            with torch.no_grad():
                self._target.copy_(buffer)
        elif buffer is not None:
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


def direct(x: Array) -> Plain | None:
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
            return data_ptr(x), x.numel(), name
    elif type(x) is np.ndarray:
        name = NUMPY_NAMES.get(x.dtype)
        if name is not None and x.flags.carray:  # C-contiguous, aligned, writeable
            return _array_address(x), x.size, name
    return None


def parts(x: Array | Sequence[Array]) -> Parts:
    """Validates what a call was given, an array or a list of them; not whether any share memory (`check_overlap`)."""
    return collect(x, direct, segment)


def collect(
    x: Array | Sequence[Array], plainly: Callable[[Array], Plain | None], closely: Callable[[Array], Segment]
) -> Parts:
    """The parts of a call: of each array what `plainly` says, or the segment that `closely` makes of it."""
    listed = isinstance(x, (list, tuple))
    addresses, counts, dtypes = [], [], []
    segments = {}
    kept = tuple(x) if listed else (x,)
    for place, item in enumerate(kept):
        plain = plainly(item)
        if plain is None:
            made = segments[place] = _item(closely, item, place) if listed else closely(item)
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
        return tensor_segment(x, "cpu")
    if isinstance(x, np.ndarray):
        return _numpy_segment(x)
    if hasattr(x, "__cuda_array_interface__") or speaks_dlpack(x):
        place = device_of(x)
        if place != "cpu":
            raise elsewhere(place, "cpu")
        return tensor_segment(from_dlpack(x), "cpu")
    raise no_array(x)


def device_of(x: Array) -> str:
    """Where an array lies, as torch spells it: "cpu", "cuda:1"; "cuda" where the object does not say on which GPU.

    Raises:
        ArgumentError: Not an array.
        UnsupportedError: Memory of another kind.
    """
    if isinstance(x, torch.Tensor):
        return str(x.device)
    if isinstance(x, np.ndarray):
        return "cpu"
    if hasattr(x, "__dlpack_device__") and not isinstance(x, np.generic):
        kind, ordinal = x.__dlpack_device__()
        if int(kind) in (DLPACK_CPU, DLPACK_CUDA):
            return "cpu" if int(kind) == DLPACK_CPU else f"cuda:{int(ordinal)}"
        raise UnsupportedError(f"allreduce: {type(x).__name__} in memory of DLPack's device type {int(kind)}")
    if hasattr(x, "__cuda_array_interface__"):
        ordinal = getattr(getattr(x, "device", None), "id", None)
        return f"cuda:{ordinal}" if isinstance(ordinal, int) else "cuda"
    raise no_array(x)


def speaks_dlpack(x: Array) -> bool:
    """Whether memory can be shared through DLPack; NumPy's scalars have the methods, but are copies."""
    return hasattr(x, "__dlpack__") and not isinstance(x, np.generic)


def elsewhere(place: str, bound: str) -> ArgumentError:
    """The error for an array that lies on another device than its communicator."""
    return ArgumentError(
        f"allreduce: tensor on {place} but communicator bound to {bound}. Move it with .to('{bound}'), or make a "
        f"Communicator with device='{place}'."
    )


def no_array(x: object) -> ArgumentError:
    """The error for what is no array."""
    return ArgumentError(f"allreduce: expected a tensor or a list of tensors, got {type(x).__name__}")


def is_whole_storage(x: torch.Tensor) -> bool:
    """Whether a tensor is contiguous and begins where its storage does, as DDP expects of a hook's result."""
    return x.is_contiguous() and x.storage_offset() == 0


def digest(x: Array) -> tuple[str, int]:
    """What a tensor is ("float32[3, 4]"), and 63 bits of a hash of its bytes."""
    if hasattr(x, "__cuda_array_interface__"):
        x = torch.as_tensor(x)
    tensor = x if isinstance(x, torch.Tensor) else torch.from_numpy(np.array(x))
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    size = tensor.numel() * tensor.element_size()
    data = (ctypes.c_char * size).from_address(data_ptr(tensor)) if size else b""
    value = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 1
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}", value


def _item(closely: Callable[[Array], Segment], x: Array, place: int) -> Segment:
    try:
        return closely(x)
    except Error as error:
        raise type(error)(f"{bare_message(error)} (item {place} of the list)") from None


def bytes_at(address: int, count: int) -> torch.Tensor:
    """Memory that somebody else keeps alive, as a uint8 tensor of at least one byte."""
    return torch.frombuffer((ctypes.c_char * count).from_address(address), dtype=torch.uint8)


def data_ptr(x: torch.Tensor) -> int:
    """A tensor's address.

    Raises:
        UnsupportedError: It has none, or its memory has been freed.
    """
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


def tensor_segment(x: torch.Tensor, bound: str, kind: type[Segment] = Segment) -> Segment:
    """Validates one tensor that shall lie on the device `bound`, and makes its segment, of class `kind`."""
    if x.device.type == "meta" or isinstance(x, torch._subclasses.FakeTensor):
        raise UnsupportedError("allreduce: a meta or fake tensor holds no numbers. Pass a real one.")
    if x.layout is not torch.strided:
        name = str(x.layout).removeprefix("torch.").replace("_", " ")
        raise UnsupportedError(f"allreduce: {name} layout; call .to_dense() or use DDP's default path")
    if type(x) not in PLAIN and torch.utils._python_dispatch.is_traceable_wrapper_subclass(x):
        raise UnsupportedError(f"allreduce: {type(x).__name__} wraps other tensors; pass those (x.to_local())")
    if str(x.device) != bound:
        raise elsewhere(str(x.device), bound)
    if x.requires_grad and torch.is_grad_enabled():
        raise ArgumentError("allreduce: dpcomm is not differentiable; use torch.no_grad() or .detach()")
    target = x.detach()
    itemsize = target.element_size()
    strides = tuple(stride * itemsize for stride in target.stride())
    layout = Layout(data_ptr(target), itemsize, tuple(target.shape), strides)
    made = kind(target, TORCH_NAMES.get(x.dtype, str(x.dtype).removeprefix("torch.")), layout)
    if target.is_contiguous() and not target.is_conj() and not target.is_neg():
        return made
    check_self_overlap(made)
    buffer = target.resolve_conj().resolve_neg().contiguous()
    made.stage(buffer, data_ptr(buffer))
    return made


def _numpy_segment(x: npt.NDArray[Any]) -> Segment:
    if isinstance(x, np.ma.MaskedArray):
        raise UnsupportedError("allreduce: a masked array; pass its .data or .filled()")
    if not x.flags.writeable:
        raise ArgumentError("allreduce: the array is read-only and allreduce works in place. Pass a copy.")
    native = x.dtype.newbyteorder("=")
    layout = Layout(int(x.__array_interface__["data"][0]), x.dtype.itemsize, x.shape, x.strides)
    made = Segment(x, NUMPY_NAMES.get(native, native.name), layout)
    if x.flags.c_contiguous and x.flags.aligned and x.dtype.isnative:
        return made
    check_self_overlap(made)
    if native in NUMPY_NAMES:
        buffer = np.array(x, dtype=native, order="C", copy=True, subok=False)
        made.stage(buffer, int(buffer.__array_interface__["data"][0]))
    return made


def from_dlpack(x: Array) -> torch.Tensor:
    """A tensor over an object's memory; on a GPU, its earlier work is ordered before torch's current stream.

    Raises:
        ArgumentError: The object refuses.
    """
    try:
        return torch.utils.dlpack.from_dlpack(x)
    except (BufferError, TypeError) as error:
        raise ArgumentError(f"allreduce: {type(x).__name__} cannot be shared through DLPack: {error}") from None


def check_self_overlap(made: Segment) -> None:
    """Raises ArgumentError where elements of one array share memory.

    Each stride, smallest first, must step over all that the smaller ones reach.
    """
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
