"""Arguments that cannot work: refused on the rank that passes them, nothing sent, the communicator as good as before.

Numbers in the names count the faults that dpcomm promises to answer; those that are missing have a test elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import numpy as np
import pytest
import torch
from faulty import catch, check, check_usable

import dpcomm


def strided(*strides: int) -> torch.Tensor:
    return torch.zeros(64).as_strided((4, 4), strides)


def read_only(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    x.flags.writeable = False
    return x


def halves_of_one() -> list[torch.Tensor]:
    x = torch.zeros(100)
    return [torch.zeros(3), x[:60], torch.zeros(5), x[40:]]


def two_of_one(make: Callable[[np.ndarray[Any, Any]], list[Any]]) -> list[Any]:
    return make(np.zeros(10, np.float32))


REFUSED: dict[str, tuple[Callable[[], Any], str, str, str]] = {
    "1-str": (lambda: "gradients", "sum", "ArgumentError", "expected a tensor or a list of tensors, got str"),
    "1-int": (lambda: 3, "sum", "ArgumentError", "expected a tensor or a list of tensors, got int"),
    "1-none": (lambda: None, "sum", "ArgumentError", "expected a tensor or a list of tensors, got NoneType"),
    "1-dict": (lambda: {"a": torch.ones(2)}, "sum", "ArgumentError", "tensor or a list of tensors, got dict"),
    "1-numpy-scalar": (lambda: np.float64(3), "sum", "ArgumentError", "tensor or a list of tensors, got float64"),
    "1-list-of-list": (lambda: [torch.ones(2), [torch.ones(2)]], "sum", "ArgumentError", "got list (item 1 of the li"),
    "2-bool": (lambda: torch.ones(3).bool(), "sum", "UnsupportedError", "dtype bool not supported for op=sum"),
    "2-mean-of-int": (
        lambda: torch.ones(3).long(),
        "mean",
        "UnsupportedError",
        "dtype int64 not supported for op=mean; supported: float32, float64, float16, bfloat16",
    ),
    "2-fp8": (lambda: torch.ones(3).to(torch.float8_e4m3fn), "sum", "UnsupportedError", "dtype float8_e4m3fn not supp"),
    "2-uint8": (lambda: np.ones(3, np.uint8), "max", "UnsupportedError", "dtype uint8 not supported for op=max"),
    "2-in-a-list": (lambda: [torch.ones(3), torch.ones(3).bool()], "sum", "UnsupportedError", "dtype bool not suppo"),
    "3-coo": (lambda: torch.eye(3).to_sparse(), "sum", "UnsupportedError", "layout; call .to_dense()"),
    "3-csr": (lambda: torch.eye(3).to_sparse_csr(), "sum", "UnsupportedError", "layout; call .to_dense()"),
    "6-read-only": (lambda: read_only(np.ones(3, np.float32)), "sum", "ArgumentError", "read-only"),
    "6-read-only-view": (lambda: np.frombuffer(bytes(8), np.float32), "sum", "ArgumentError", "read-only"),
    "6-read-only-big-endian": (lambda: read_only(np.ones(3, ">f4")), "sum", "ArgumentError", "read-only"),
    "6-read-only-in-a-list": (
        lambda: [np.ones(3), read_only(np.ones(3)[::-1])],
        "sum",
        "ArgumentError",
        "read-only and allreduce works in place. Pass a copy. (item 1 of the list)",
    ),
    "7-expanded": (
        lambda: torch.zeros(1, 5).expand(4, 5),
        "sum",
        "ArgumentError",
        "tensor has overlapping elements (stride 0 in dim 0)",
    ),
    "7-self-overlapping": (lambda: strided(2, 1), "sum", "ArgumentError", "overlapping elements (stride 2 in dim 0)"),
    "8-two-tensors-overlap": (halves_of_one, "sum", "ArgumentError", "tensors 1 and 3 overlap by 80 bytes"),
    "7-in-a-list": (lambda: [torch.ones(2), torch.ones(1).expand(3)], "sum", "ArgumentError", "(item 1 of the list)"),
    "8-twice": (lambda: [torch.ones(2)] * 2, "sum", "ArgumentError", "tensors 0 and 1 overlap by 8 bytes"),
    "8-in-another-dtype": (
        lambda: two_of_one(lambda x: [x[:6], np.ones(2, np.int32), x.view(np.int32)[5:]]),
        "sum",
        "ArgumentError",
        "tensors 0 and 2 overlap by 4 bytes",
    ),
    "8-array-and-tensor": (
        lambda: two_of_one(lambda x: [torch.from_numpy(x), x[3:7]]),
        "sum",
        "ArgumentError",
        "tensors 0 and 1 overlap by 16 bytes",
    ),
    "8-backwards": (
        lambda: two_of_one(lambda x: [x[::-2], x[:4]]),
        "sum",
        "ArgumentError",
        "tensors 0 and 1 overlap by 8 bytes",
    ),
    "12-too-many-bytes": (lambda: torch.zeros(1).expand(2**61), "sum", "ArgumentError", f"{2**61} elements of float32"),
    "12-in-a-list": (
        lambda: [torch.zeros(1), torch.zeros(1, dtype=torch.float64).expand(2**60)],
        "sum",
        "ArgumentError",
        f"{2**60} elements of float64 are more bytes than can be addressed (item 1 of the list)",
    ),
    "14-requires-grad": (
        lambda: torch.zeros(3, requires_grad=True),
        "sum",
        "ArgumentError",
        "dpcomm is not differentiable; use torch.no_grad() or .detach()",
    ),
    "15-meta": (lambda: torch.ones(3, device="meta"), "sum", "UnsupportedError", "meta or fake"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("fault", REFUSED)
def test_refused_locally(pair: list[dpcomm.Communicator], fault: str, asynchronous: bool) -> None:
    make, op, name, text = REFUSED[fault]
    before = pair[0].describe()["sequence"]
    check(catch(pair[0].allreduce, make(), op, async_op=asynchronous), name, text, within_s=1.0)
    assert pair[0].describe()["sequence"] == before, "something was sent"
    check_usable(pair)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("dtype", ["int32", "int64", "float64", "complex64", "complex128"])
def test_05_a_codec_refuses_a_list_for_one_dtype(
    pair: list[dpcomm.Communicator], dtype: str, asynchronous: bool
) -> None:
    """Before anything is sent, also what it does serve."""
    xs = [torch.ones(300), torch.ones(3).to(getattr(torch, dtype)), torch.ones(300)]
    before = pair[0].describe()["sequence"]
    for asked in (xs, xs[1]):
        caught = catch(pair[0].allreduce, asked, codec="fp16", async_op=asynchronous)
        check(caught, "UnsupportedError", f"{dtype} with codec=fp16; use codec='none'", within_s=1.0)
    assert pair[0].describe()["sequence"] == before, "something was sent"
    assert [set(x.tolist()) for x in xs] == [{1.0}] * 3
    check_usable(pair)


def test_06_views_that_are_not_plain_memory_are_reduced(pair: list[dpcomm.Communicator]) -> None:
    """In the order of their indices, and nothing beside them is written."""
    kinds: dict[str, Callable[[], Any]] = {
        "columns": lambda: torch.arange(12.0).view(3, 4)[:, 1:3],
        "conjugate": lambda: torch.arange(6.0).to(torch.complex64).mul(1j).conj(),
        "negative": lambda: torch._neg_view(torch.arange(5.0)),
        "reversed": lambda: np.arange(5.0)[::-1],
        "big-endian": lambda: np.arange(5.0).astype(">f8"),
        "one-to-many": lambda: torch.zeros(1, 1).expand(1, 1),
    }
    for kind, make in kinds.items():
        xs = [make() for _ in pair]
        dpcomm.allreduce_local(pair, xs)
        wanted = np.asarray(make() + make())
        for x in xs:
            assert np.array_equal(np.asarray(x.resolve_conj().resolve_neg() if torch.is_tensor(x) else x), wanted), kind


@pytest.mark.parametrize("empty", [[], (), [torch.empty(0)], [np.empty((0, 3), np.float32)] * 2], ids=repr)
def test_09_empty_lists_and_lists_of_nothing_are_calls(pair: list[dpcomm.Communicator], empty: Any) -> None:
    before = pair[0].describe()["sequence"]
    for codec in ("none", "fp16"):
        dpcomm.allreduce_local(pair, [empty, empty], "mean", codec=codec)
    works = [comm.allreduce(empty, async_op=True) for comm in pair]
    assert all(work.wait(5.0) for work in works)
    assert [comm.describe()["sequence"] for comm in pair] == [before + 3] * 2
    check_usable(pair)


@pytest.mark.parametrize(
    ("full", "text"),
    [
        ([torch.ones(3)], "numel: rank 0 has 0, rank 1 has 3"),
        ([torch.empty(0)] * 3, "number of tensors: rank 0 has 0, rank 1 has 3"),
    ],
)
def test_09_an_empty_list_meets_another(full: list[torch.Tensor], text: str) -> None:
    comms = cases.local(2)
    works = [comm.allreduce(xs, async_op=True) for comm, xs in zip(comms, ([], full), strict=True)]
    for work in works:
        check(catch(work.wait, 5.0), "MismatchError", text, within_s=1.0)


def test_12_a_huge_view_of_nothing_is_an_empty_call(pair: list[dpcomm.Communicator]) -> None:
    """The size is the product of all dimensions: one zero among them makes it empty."""
    xs = [torch.zeros(0, 2**40) for _ in pair]
    dpcomm.allreduce_local(pair, xs)
    check_usable(pair)


def test_14_requires_grad_is_fine_under_no_grad(pair: list[dpcomm.Communicator]) -> None:
    xs = [torch.ones(5, requires_grad=True) for _ in pair]
    with torch.no_grad():
        dpcomm.allreduce_local(pair, xs)
    assert all(x.tolist() == [2.0] * 5 and x.requires_grad for x in xs)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=["nan", "inf", "minus-inf"])
@pytest.mark.parametrize("codec", ["none", "fp16"])
def test_16_non_finite_values_arrive_everywhere_and_are_counted(
    pair: list[dpcomm.Communicator], codec: str, value: float
) -> None:
    places = [0, 255, 256, 70_000]
    xs = [torch.ones(100_000) for _ in pair]
    xs[1][places] = value
    pair[0].stats(reset=True)
    dpcomm.allreduce_local(pair, xs, "mean", codec=codec)
    for x in xs:
        assert torch.nonzero(~x.isfinite()).reshape(-1).tolist() == places
        assert x[x.isfinite()].unique().tolist() == [1.0]  # type: ignore[no-untyped-call]
    if codec != "none":
        assert pair[0].stats()["nonfinite_groups"] >= 1


@pytest.mark.parametrize("codec", ["none", "fp16"])
def test_17_a_sum_that_overflows_is_inf_and_not_the_largest_number(pair: list[dpcomm.Communicator], codec: str) -> None:
    xs = [torch.full((300,), 3e38) for _ in pair]
    dpcomm.allreduce_local(pair, xs, codec=codec)
    assert all(x.isinf().all() for x in xs)


def thread_count() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def segments_mapped() -> int:
    return len(re.findall("dpcomm-arena", Path("/proc/self/maps").read_text()))


def test_33_one_rank_is_the_identity_without_threads_or_segments() -> None:
    threads, segments = thread_count(), segments_mapped()
    with dpcomm.Communicator(rank=0, nranks=1) as comm:
        for op in ("sum", "mean", "min", "max"):
            x = torch.tensor([1e-45, -0.0, 3e38, float("nan")])
            before = x.clone()
            assert comm.allreduce(x, op) is x
            assert torch.equal(x.view(torch.int32), before.view(torch.int32))
            assert comm.allreduce(x, op, async_op=True).wait()
        lossy = torch.tensor([1.0 + 2**-20])
        assert comm.allreduce(lossy, codec="fp16").item() == 1.0 + 2**-20
        assert thread_count() <= threads
        assert segments_mapped() == segments


def test_58_a_closed_communicator_says_so_and_closes_again() -> None:
    comms = cases.local(2)
    for comm in comms:
        comm.close()
        comm.close()
        for asynchronous in (False, True):
            check(catch(comm.allreduce, torch.ones(2), async_op=asynchronous), "ArgumentError", "closed", within_s=1.0)
        check(catch(comm.check), "ArgumentError", "has been closed")


@pytest.mark.parametrize("variable", ["DPCOMM_TIMEOUT_S"])
@pytest.mark.parametrize("value", ["5 min", "", "0", "-1", "nan", "inf", "1e99"])
def test_68_a_bad_environment_value_names_itself(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    monkeypatch.setenv(variable, value)
    caught = catch(dpcomm.Communicator, rank=0, nranks=1)
    check(caught, "ArgumentError", f"{variable}={value!r}: expected ", "seconds")


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), 1e12, "5", None, True], ids=repr)
def test_69_a_bad_timeout_is_refused(value: Any) -> None:
    for make in (
        lambda: dpcomm.Communicator(rank=0, nranks=1, timeout_s=value),
        lambda: dpcomm.init_local(["cpu"] * 2, timeout_s=value),
    ):
        check(catch(make), "ArgumentError", "timeout_s", within_s=1.0)
    comms = cases.local(2)
    work = comms[0].allreduce(torch.ones(3), async_op=True)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and not value >= 0:
        check(catch(work.wait, value), "ArgumentError", "timeout_s")
    comms[1].allreduce(torch.ones(3), async_op=True).wait(10.0)
    assert work.wait(10.0)
