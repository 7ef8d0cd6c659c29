"""Lists of thousands of small tensors: their bits, what their check lets through, and that nothing is copied flat."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import suppress
from itertools import product
from typing import Any

import cases
import numpy as np
import pytest
import reference
import torch
from cases import Case, check_bits, check_local, digest, tensor
from faulty import catch, check
from process_memory import memory_limit
from ranks import Pool

import dpcomm

Pools = Callable[[int], Pool]
MIB = 1 << 20


def sizes(count: int, seed: int = 0) -> tuple[int, ...]:
    """Biases and norms of a large model: most fit into one group, some are empty."""
    drawn = np.random.default_rng(seed).integers(16, 401, count)
    drawn[::97] = 0
    return tuple(int(n) for n in drawn)


# --- bits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["none", "fp16"])
@pytest.mark.parametrize("algorithm", cases.ALGORITHMS)
def test_bits_equal_the_reference(pair: list[dpcomm.Communicator], algorithm: str, codec: str) -> None:
    check_local(pair, Case(sizes(2000), "float32", "mean", codec, algorithm, special=True))


def test_lists_larger_than_a_bucket_are_several_calls() -> None:
    case = Case(sizes(1000), "float32", "sum")
    comms = dpcomm.init_local(["cpu"] * 3, bucket_cap_mb=0.01)
    check_local(comms, case)
    assert comms[0].stats()["calls"] > sum(case.counts) * 4 / (0.01 * MIB) - 1


def reduce_many(rank: int, nranks: int, case: Case) -> list[str]:
    """The list as one call, as an asynchronous one, and tensor by tensor."""
    with dpcomm.Communicator() as comm:
        results = []
        for how in ("list", "async", "loop"):
            xs = [tensor(x) for x in case.inputs(rank)]
            if how == "loop":
                for x in xs:
                    comm.allreduce(x, case.op, **case.options)
            elif how == "list":
                comm.allreduce(xs, case.op, **case.options)
            else:
                comm.allreduce(xs, case.op, **case.options, async_op=True).wait()
            results.append(digest(xs))
    return results


@pytest.mark.parametrize("codec", ["none", "fp16"])
def test_one_call_has_the_bits_of_many_on_every_rank(pool: Pools, codec: str) -> None:
    case = Case(sizes(1500, seed=1), "float32", "mean", codec, "direct")  # what auto takes depends on the size
    wanted = digest(case.expected(2))
    assert pool(2).run(reduce_many, case) == [[wanted] * 3] * 2


def test_a_list_of_all_that_a_codec_serves_has_the_bits_of_single_calls(pair: list[dpcomm.Communicator]) -> None:
    rng = np.random.default_rng(3)
    kinds = ("float32", "bfloat16", "float16", "float32", "bfloat16")
    inputs = [[cases.values(kind, 300 + i, rng) for i, kind in enumerate(kinds)] for _ in pair]
    listed = [[tensor(x) for x in xs] for xs in inputs]
    dpcomm.allreduce_local(pair, listed, "mean", codec="fp16")
    for place in range(len(kinds)):
        alone = [tensor(xs[place]) for xs in inputs]
        dpcomm.allreduce_local(pair, alone, "mean", codec="fp16")
        check_bits([[xs[place]] for xs in listed], [cases.array(alone[0])], kinds[place])


# --- what a list may hold --------------------------------------------------------------------------------------------


def everything(rank: int) -> list[Any]:
    """Kinds of arrays that need a copy, between those that need none."""
    rng = np.random.default_rng([5, rank])
    x = [rng.standard_normal(40) for _ in range(9)]
    f4 = [one.astype(np.float32) for one in x]
    return [
        torch.from_numpy(f4[0]),
        f4[1][::-1],
        x[2].astype(">f8"),
        torch.empty(0, dtype=torch.float64),
        f4[3].reshape(5, 8).T,
        torch.from_numpy(f4[4]).view(8, 5)[:, 1:3],
        torch.from_numpy(f4[5]).view(8, 5)[:, 3:],
        np.empty((0, 3), np.float32),
        torch._neg_view(torch.from_numpy(x[6])),
        f4[7],
        (f4[8] * 100).astype(">i4"),
        np.ones((), np.float32),
    ]


def logical(x: Any) -> cases.Array:
    """The values in the order of their indices, in this machine's byte order."""
    flat = x.resolve_neg().reshape(-1).numpy() if isinstance(x, torch.Tensor) else np.asarray(x).reshape(-1)
    return flat.astype(flat.dtype.newbyteorder("="), copy=True)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_all_kinds_of_arrays_come_back_in_their_places(pool: Pools, asynchronous: bool) -> None:
    inputs = [[logical(x) for x in everything(rank)] for rank in range(2)]
    wanted = digest([reference.allreduce([[a], [b]])[0] for a, b in zip(*inputs, strict=True)])
    assert pool(2).run(reduce_everything, asynchronous) == [wanted] * 2


def reduce_everything(rank: int, nranks: int, asynchronous: bool) -> str:
    xs = everything(rank)
    with dpcomm.Communicator() as comm:
        result = comm.allreduce(xs, async_op=asynchronous)
        if asynchronous:
            result.wait(10.0)
    assert [x.dtype for x in xs if isinstance(x, np.ndarray)] == [
        x.dtype for x in everything(rank) if isinstance(x, np.ndarray)
    ]
    return digest([logical(x) for x in xs])


def test_parameters_are_reduced_under_no_grad(pair: list[dpcomm.Communicator]) -> None:
    """As for averaging models: they require grad, and need no copy."""
    models = [torch.nn.Sequential(*(torch.nn.Linear(7, 7) for _ in range(50))) for _ in pair]
    expected = [(a.detach() + b.detach()) / 2 for a, b in zip(*(m.parameters() for m in models), strict=True)]
    with torch.no_grad():
        dpcomm.allreduce_local(pair, [list(m.parameters()) for m in models], "mean")
    for model in models:
        for got, want in zip(model.parameters(), expected, strict=True):
            assert torch.equal(got, want)
            assert got.requires_grad
    caught = catch(pair[0].allreduce, list(models[0].parameters()))
    check(caught, "ArgumentError", "not differentiable", "(item 0 of the list)")


# --- shared memory ---------------------------------------------------------------------------------------------------


def test_interleaved_columns_of_one_matrix_are_a_list(pair: list[dpcomm.Communicator]) -> None:
    """600 views whose extents all overlap and whose elements do not; what lies between them stays."""
    matrices = [torch.arange(600.0 * 601).view(600, 601).add(rank) for rank in range(2)]
    lists = [[m[:, i] for i in range(600)] for m in matrices]
    last = [m[:, 600].clone() for m in matrices]
    dpcomm.allreduce_local(pair, lists, "max")
    for m, before in zip(matrices, last, strict=True):
        assert torch.equal(m[:, :600], torch.arange(600.0 * 601).view(600, 601)[:, :600] + 1)
        assert torch.equal(m[:, 600], before)


def test_one_overlap_among_thousands_is_named(pair: list[dpcomm.Communicator]) -> None:
    memory = torch.zeros(3000 * 10 + 5)
    xs = [memory[10 * i : 10 * i + 10] for i in range(3000)]  # side by side
    dpcomm.allreduce_local(pair, [xs, [torch.zeros(10) for _ in xs]])
    xs[2000] = memory[3003:3013]
    check(catch(pair[0].allreduce, xs), "ArgumentError", "tensors 300 and 2000 overlap by 28 bytes")


def random_view(rng: np.random.Generator, memory: torch.Tensor) -> torch.Tensor:
    """Up to three dimensions in any order, with gaps, somewhere in the memory; no element twice."""
    shape = rng.integers(1, 5, rng.integers(1, 4))
    strides, reach = [], 1
    for size in shape:
        strides.append(reach + int(rng.integers(0, 3)))
        reach += (int(size) - 1) * strides[-1]
    order = rng.permutation(len(shape))
    offset = int(rng.integers(0, len(memory) - reach))
    return memory.as_strided([int(shape[i]) for i in order], [strides[i] for i in order], offset)


def bytes_of(view: torch.Tensor, memory: torch.Tensor) -> list[int]:
    """Every byte that the view's elements lie in, counted from the memory's first; slow and plain."""
    first = (view.data_ptr() - memory.data_ptr()) // view.element_size()
    places = [
        first + sum(i * s for i, s in zip(index, view.stride(), strict=True))
        for index in product(*(range(n) for n in view.shape))
    ]
    return [4 * place + byte for place in places for byte in range(4)]


def test_overlaps_are_found_exactly_as_byte_by_byte(pair: list[dpcomm.Communicator]) -> None:
    rng = np.random.default_rng(9)
    memory = torch.zeros(400)
    outcomes = set()
    for _ in range(200):
        views = [random_view(rng, memory) for _ in range(int(rng.integers(2, 7)))]
        owned = [bytes_of(view, memory) for view in views]
        assert all(len(set(one)) == len(one) for one in owned)
        shared = {
            f"tensors {i} and {j} overlap by {len(set(owned[i]) & set(owned[j]))} bytes"
            for j in range(len(views))
            for i in range(j)
            if set(owned[i]) & set(owned[j])
        }
        outcomes.add(bool(shared))
        if shared:
            caught = catch(pair[0].allreduce, views)
            check(caught, "ArgumentError")
            assert any(text in caught.text for text in shared), (caught.text, shared)
        else:
            dpcomm.allreduce_local(pair, [views, [torch.zeros(view.shape) for view in views]])
    assert outcomes == {False, True}


# --- memory ----------------------------------------------------------------------------------------------------------


def reduce_many_under_limit(rank: int, nranks: int, count: int, elems: int) -> str:
    """64 MiB in thousands of tensors, with room for 8: a flat copy of a bucket would raise."""
    xs = list(torch.ones(count, elems))
    with dpcomm.Communicator(bucket_cap_mb=25.0) as comm, memory_limit(8 * MIB):
        for codec in ("none", "fp16"):
            comm.allreduce(xs, "mean", codec=codec)
        with suppress(RuntimeError):
            return f"control: torch could allocate {torch.ones(count * elems).numel()} elements"
    return digest(xs)


def test_no_flat_copy_is_made(pool: Pools) -> None:
    ones = digest([torch.ones(4096 * 4096)])
    assert pool(2).run(reduce_many_under_limit, 4096, 4096) == [ones] * 2


def test_a_missing_copy_back_is_noticed() -> None:
    """Control of this file's comparison: one array left as it was shows."""
    xs = [cases.values("float32", 40, np.random.default_rng(r)) for r in range(2)]
    with pytest.raises(AssertionError, match="40 of 40 elements of segment 0 differ"):
        check_bits([[xs[0]]], reference.allreduce([[xs[0]], [xs[1]]]), "planted")


def test_a_list_that_is_emptied_keeps_its_tensors_alive_while_the_call_runs(pair: list[dpcomm.Communicator]) -> None:
    lists = [[torch.full((100,), rank + 1.0), torch.full((7,), rank + 1.0)] for rank in range(2)]
    alive = [weakref.ref(x) for x in lists[0]]
    first = pair[0].allreduce(lists[0], async_op=True)
    lists[0].clear()
    gc.collect()
    assert all(ref() is not None for ref in alive)  # the other rank has not called yet: memory is still to be written
    pair[1].allreduce(lists[1])
    assert first.wait(20.0)
    assert [x.tolist() for x in lists[1]] == [[3.0] * 100, [3.0] * 7]


def test_a_tensor_whose_memory_was_freed_is_refused(pair: list[dpcomm.Communicator]) -> None:
    x = torch.ones(10)
    x.untyped_storage().resize_(0)
    for given in (x, [torch.ones(3), x]):
        with pytest.raises(dpcomm.UnsupportedError, match="its memory has been freed"):
            pair[0].allreduce(given)
    check_local(pair, Case((5,)))


def test_a_number_is_no_operation_even_after_its_reduce_op(pair: list[dpcomm.Communicator]) -> None:
    dpcomm.allreduce_local(pair, [torch.ones(3), torch.ones(3)], torch.distributed.ReduceOp.SUM)
    with pytest.raises(dpcomm.ArgumentError, match="op must be a name"):
        pair[0].allreduce(torch.ones(3), 0)
