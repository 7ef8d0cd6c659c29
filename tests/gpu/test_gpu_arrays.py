"""GPU memory that is not a torch tensor: CuPy arrays, anything with __cuda_array_interface__, DLPack."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import Case, check_bits
from gpu.support import DEVICE, busy, check_sums, group, on_device, on_gpu

import dpcomm

pytestmark = on_gpu

CASE = Case((20_011,), op="mean", codec="fp16", special=True)
LONG_MS = 200.0


class Exposed:
    """An array that offers nothing but __cuda_array_interface__."""

    def __init__(self, x: torch.Tensor, **changes: Any) -> None:
        self._kept = x
        self.__cuda_array_interface__ = {**x.__cuda_array_interface__, "version": 3, "stream": None, **changes}


class Packed:
    """An array that offers nothing but DLPack."""

    def __init__(self, x: torch.Tensor) -> None:
        self._x = x

    def __dlpack__(self, **keywords: Any) -> Any:
        return self._x.__dlpack__(**keywords)

    def __dlpack_device__(self) -> Any:
        return self._x.__dlpack_device__()


WRAPPERS: dict[str, Any] = {
    "interface": Exposed,
    "interface-on-the-default-stream": lambda x: Exposed(x, stream=1),
    "dlpack": Packed,
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_arrays_have_the_references_bits(wrapper: str) -> None:
    xs = [on_device(CASE.inputs(r))[0] for r in range(2)]
    torch.cuda.synchronize()
    dpcomm.allreduce_local(group(2), [WRAPPERS[wrapper](x) for x in xs], CASE.op, **CASE.options)
    torch.cuda.synchronize()
    check_bits([[x.cpu()] for x in xs], CASE.expected(2), wrapper)


def test_a_list_may_mix_kinds_of_arrays() -> None:
    case = Case((300, 7, 1021), op="mean")
    lists = [on_device(case.inputs(r)) for r in range(2)]
    torch.cuda.synchronize()
    mixed = [[Exposed(a), b, Packed(c)] for a, b, c in lists]
    dpcomm.allreduce_local(group(2), mixed, case.op, **case.options)
    torch.cuda.synchronize()
    check_bits([[x.cpu() for x in xs] for xs in lists], case.expected(2), "mixed")


def test_read_only_memory_is_refused() -> None:
    xs = [torch.ones(10, device=DEVICE) for _ in range(2)]
    address = xs[0].__cuda_array_interface__["data"][0]
    with pytest.raises(dpcomm.ArgumentError, match="read-only"):
        dpcomm.allreduce_local(group(2), [Exposed(x, data=(address, True)) for x in xs])
    check_sums(group(2))


def test_cupy_arrays_are_ordered_on_cupys_stream() -> None:
    cupy = pytest.importorskip("cupy")
    comms = group(2)
    check_sums(comms)
    with cupy.cuda.Stream(non_blocking=True) as own:
        xs = [cupy.full(20_011, -1e6, dtype=cupy.float32) for _ in range(2)]
        own.synchronize()
        with torch.cuda.stream(torch.cuda.ExternalStream(own.ptr)):  # type: ignore[no-untyped-call]
            busy(LONG_MS)
        for rank, x in enumerate(xs):
            x.fill(rank + 1)
        dpcomm.allreduce_local(comms, xs)
        late = xs[0].copy()
        own.synchronize()
        assert all(bool((x == 3).all()) for x in [*xs, late])


def test_cupy_views_are_reduced_in_the_order_of_their_indices() -> None:
    cupy = pytest.importorskip("cupy")
    memory = [cupy.arange(1200, dtype=cupy.float32).reshape(40, 30) + r for r in range(2)]
    before = [m.copy() for m in memory]
    views = [m[:, 3:7].T for m in memory]
    dpcomm.allreduce_local(group(2), views)
    cupy.cuda.Device().synchronize()
    for m, old in zip(memory, before, strict=True):
        expected = old.copy()
        expected[:, 3:7] = before[0][:, 3:7] + before[1][:, 3:7]
        assert bool((m == expected).all())


@pytest.mark.parametrize("name", ["float16", "float64", "int32", "int64"])
def test_cupy_dtypes(name: str) -> None:
    cupy = pytest.importorskip("cupy")
    xs = [cupy.arange(1000).astype(name) * (r + 1) for r in range(2)]
    dpcomm.allreduce_local(group(2), xs)
    cupy.cuda.Device().synchronize()
    wanted = (cupy.arange(1000) * 3).astype(name)
    assert all(bool((x == wanted).all()) for x in xs)
