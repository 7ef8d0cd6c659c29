"""The core on one GPU: virtual ranks, each a CTA of one cooperative launch, against the reference, to the bit.

Tests marked gpu need a device and, for memory on it, a torch with CUDA or CuPy. The others check what the launcher does
where there is none.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import time
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import reference
import torch
from cases import Array, Case, check_bits
from conftest import why_no_gpu

from dpcomm import _native
from dpcomm.errors import ArgumentError, CommTimeoutError, Error, MismatchError, UnsupportedError

pytestmark = pytest.mark.skipif(not _native.cuda_built, reason="the extension was built without CUDA")

RANKS = (1, 2, 3, 4, 8)
# (dtype, codec, algorithm): the kernels there are.
KERNELS = (
    ("float32", "none", "direct"),
    ("float32", "none", "oneshot"),
    ("float32", "none", "ring"),
    ("bfloat16", "none", "direct"),
    ("float32", "fp16", "direct"),
    ("float32", "fp16", "oneshot"),
    ("float32", "fp16", "ring"),
)
IDS = tuple("-".join(kernel) for kernel in KERNELS)
GUARD = 0xA5  # what lies around every segment
GUARD_BYTES = 64


def why_no_memory() -> str:
    if torch.cuda.is_available() or importlib.util.find_spec("cupy"):
        return ""
    return "there is a GPU, but neither a torch with CUDA nor CuPy: install one of them"


@pytest.fixture(autouse=True)
def array_library(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu") and why_no_memory():
        pytest.skip(why_no_memory())


class DeviceSegment:
    """One array on the GPU, `shift` bytes behind a 256-byte boundary, between guard bytes."""

    def __init__(self, x: Array, shift: int) -> None:
        self.dtype, self.begin = x.dtype, GUARD_BYTES * 4 + shift
        self.end = self.begin + x.nbytes
        image = np.full(self.end + GUARD_BYTES, GUARD, np.uint8)
        image[self.begin : self.end] = x.view(np.uint8)
        self.memory, start = to_device(image)
        assert start % 256 == 0
        self.address = start + self.begin

    def read(self) -> Array:
        image = from_device(self.memory)
        around = np.concatenate([image[: self.begin], image[self.end :]])
        assert (around == GUARD).all(), "bytes outside the segment were written"
        return image[self.begin : self.end].copy().view(self.dtype)


def to_device(image: Array) -> tuple[Any, int]:
    """The bytes in GPU memory, and their address."""
    if torch.cuda.is_available():
        tensor = torch.from_numpy(image).cuda()
        return tensor, tensor.data_ptr()
    import cupy

    array = cupy.asarray(image)
    return array, int(array.data.ptr)


def from_device(memory: Any) -> Array:
    return np.asarray(memory.cpu().numpy() if isinstance(memory, torch.Tensor) else memory.get())


def make_call(case: Case, addresses: list[list[int]], **settings: float) -> _native.LoopbackCall:
    call = _native.LoopbackCall()
    call.addresses, call.counts = addresses, list(case.counts)
    call.dtype, call.op = _native.DTYPES[case.dtype], _native.OPS[case.op]
    call.codec, call.algorithm = _native.CODECS[case.codec], _native.ALGORITHMS[case.algorithm]
    call.slot_bytes = 4096  # a few groups: small buckets take several slices
    for name, value in settings.items():
        assert hasattr(call, name)
        setattr(call, name, value)
    return call


def run(case: Case, nranks: int, *, shifts: Sequence[int] = (0,), **settings: float) -> tuple[list[list[Array]], int]:
    """The segments of every rank after the call, and the count of groups with a NaN or Inf."""
    ranks = [[DeviceSegment(x, shifts[s % len(shifts)]) for s, x in enumerate(case.inputs(r))] for r in range(nranks)]
    addresses = [[segment.address for segment in segments] for segments in ranks]
    _, nonfinite_groups = _native.loopback_allreduce(make_call(case, addresses, **settings))
    return [[segment.read() for segment in segments] for segments in ranks], nonfinite_groups


def check(case: Case, nranks: int, **settings: Any) -> None:
    results, _ = run(case, nranks, **settings)
    check_bits(results, expected(case, nranks), f"{nranks} virtual ranks, {case}, {settings}")


@cache
def expected(case: Case, nranks: int) -> list[Array]:
    return case.expected(nranks)


def make_cases(kernel: tuple[str, str, str], counts: tuple[int, ...]) -> list[Case]:
    dtype, codec, algorithm = kernel
    ops = ("sum", "mean") if codec == "fp16" else ("sum", "mean", "min", "max")
    return [Case(counts, dtype, op, codec, algorithm, special=special) for op in ops for special in (False, True)]


# --- bits ------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("nranks", RANKS)
@pytest.mark.parametrize("kernel", KERNELS, ids=IDS)
@pytest.mark.parametrize("count", [0, 1, 255, 256, 257, 4099, 65536 + 3])
def test_bits_equal_the_reference(kernel: tuple[str, str, str], nranks: int, count: int) -> None:
    for case in make_cases(kernel, (count,)):
        check(case, nranks)


@pytest.mark.gpu
@pytest.mark.parametrize("nranks", [2, 3, 8])
@pytest.mark.parametrize("kernel", KERNELS, ids=IDS)
def test_segments_of_any_size_and_alignment(kernel: tuple[str, str, str], nranks: int) -> None:
    elem = 2 if kernel[0] == "bfloat16" else 4
    for case in make_cases(kernel, (1, 0, 255, 256, 0, 1000, 513, 4096, 7)):
        check(case, nranks, shifts=[elem * i for i in (0, 1, 2, 3, 4, 0, 8)])


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", KERNELS, ids=IDS)
@pytest.mark.parametrize("slots", [4, 16])
@pytest.mark.parametrize("slot_bytes", [1024, 1152, 65536])
def test_bits_do_not_depend_on_slots(kernel: tuple[str, str, str], slots: int, slot_bytes: int) -> None:
    case = Case((20011, 300), kernel[0], "mean", kernel[1], kernel[2], special=True)
    check(case, 3, slots=slots, slot_bytes=slot_bytes)


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", KERNELS, ids=IDS)
@pytest.mark.parametrize("first_message", [2**32 - 1, 2**32 - 3, 2**31 - 2])
def test_counters_wrap(kernel: tuple[str, str, str], first_message: int) -> None:
    check(Case((30011,), kernel[0], "sum", kernel[1], kernel[2]), 3, first_message=first_message)


@pytest.mark.gpu
@pytest.mark.parametrize("nranks", [2, 4])
@pytest.mark.parametrize("kernel", KERNELS, ids=IDS)
def test_calls_in_a_row(kernel: tuple[str, str, str], nranks: int) -> None:
    """Counters stay in device memory between launches. The mean of equal replicas goes through the codec again."""
    case = Case((5000, 3), kernel[0], "mean", kernel[1], kernel[2])
    want = expected(case, nranks)
    for _ in range(20 - 1):
        want = reference.allreduce([want] * nranks, case.op, codec=case.codec)
    results, _ = run(case, nranks, calls=20, first_message=2**32 - 5)
    check_bits(results, want, f"{nranks} virtual ranks, 20 calls, {case}")


@pytest.mark.gpu
def test_nonfinite_groups_are_counted_once() -> None:
    """One NaN on one of two ranks, in the chunk of the other: one contribution and one result hold it."""
    values = [np.ones(2 * 256, np.float32) for _ in range(2)]
    values[0][300] = np.nan
    segments = [[DeviceSegment(x, 0)] for x in values]
    case = Case((512,), codec="fp16", algorithm="direct")
    _, count = _native.loopback_allreduce(make_call(case, [[s.address for s in row] for row in segments]))
    assert count == 2
    assert [int(np.isnan(row[0].read()).sum()) for row in segments] == [1, 1]


# --- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", KERNELS, ids=IDS)
@pytest.mark.parametrize("absent_rank", [0, 2])
def test_absent_rank_ends_the_wait(kernel: tuple[str, str, str], absent_rank: int) -> None:
    case = Case((5000,), kernel[0], "sum", kernel[1], kernel[2])
    start = time.monotonic()
    with pytest.raises(CommTimeoutError) as raised:
        run(case, 3, absent_rank=absent_rank, timeout_s=0.5, calls=3)
    assert 0.4 < time.monotonic() - start < 20
    assert raised.value.waiting_for == (absent_rank,)
    check(case, 3)  # the context lives


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", KERNELS, ids=IDS)
def test_disagreeing_rank_is_named(kernel: tuple[str, str, str]) -> None:
    case = Case((5000,), kernel[0], "sum", kernel[1], kernel[2])
    with pytest.raises(MismatchError, match=r"ranks \d and \d announce different headers"):
        run(case, 3, disagreeing_rank=1)
    check(case, 3)


@pytest.mark.gpu
def test_host_memory_is_refused() -> None:
    x = np.zeros(8, np.float32)
    with pytest.raises(ArgumentError, match="device memory"):
        _native.loopback_allreduce(make_call(Case((8,), algorithm="direct"), [[x.ctypes.data]] * 2))


@pytest.mark.gpu
def test_misaligned_element_is_refused() -> None:
    segment = DeviceSegment(np.zeros(8, np.float32), 2)
    with pytest.raises(ArgumentError, match="aligned"):
        _native.loopback_allreduce(make_call(Case((8,), algorithm="direct"), [[segment.address]] * 2))


EMPTY = Case((0,), algorithm="direct")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"slots": 3}, "power of two"),
        ({"slots": 2}, "power of two"),
        ({"slot_bytes": 1000}, "multiple of 128"),
        ({"slot_bytes": 512}, "hold a group"),
        ({"timeout_s": 0.0}, "timeout_s"),
        ({"timeout_s": float("nan")}, "timeout_s"),
        ({"calls": 0}, "calls"),
        ({"op": 9}, "operation"),
        ({"algorithm": 0}, "an algorithm must be named"),
        ({"counts": [-1]}, "negative"),
        ({"counts": [0, 0]}, "one address per count"),
        ({"addresses": []}, "ranks"),
        ({"addresses": [[0]] * 65}, "ranks"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_bad_argument_is_refused_before_the_device_is_asked(settings: dict[str, Any], message: str) -> None:
    call = make_call(EMPTY, [[0], [0]])
    for name, value in settings.items():
        setattr(call, name, value)
    with pytest.raises(ArgumentError, match=message):
        _native.loopback_allreduce(call)


@pytest.mark.parametrize(
    "case",
    [
        dataclasses.replace(EMPTY, dtype="float64"),
        dataclasses.replace(EMPTY, dtype="bfloat16", algorithm="oneshot"),
        dataclasses.replace(EMPTY, op="max", codec="fp16"),
        dataclasses.replace(EMPTY, dtype="bfloat16", codec="fp16"),
    ],
    ids=lambda case: f"{case.dtype}-{case.op}-{case.codec}-{case.algorithm}",
)
def test_missing_kernel_is_named(case: Case) -> None:
    with pytest.raises(UnsupportedError, match="no kernel for this combination"):
        _native.loopback_allreduce(make_call(case, [[0], [0]]))


def test_reason_agrees_with_the_driver() -> None:
    assert bool(_native.cuda_reason()) == bool(why_no_gpu())


@pytest.mark.skipif(not why_no_gpu(), reason="there is a GPU")
def test_launch_without_a_gpu_is_a_cuda_error() -> None:
    with pytest.raises(Error, match=r"^\[dpcomm:CUDA\] cuda\w+: .+\(cudaError\w+\)$") as raised:
        _native.loopback_allreduce(make_call(EMPTY, [[0], [0]]))
    assert raised.value.code == "CUDA"
