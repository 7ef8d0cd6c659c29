"""Engine gloo between processes of one host: the reference's bits, whatever travels, in whichever order, of any kind.

tests/test_hosts.py has it between hosts, tests/test_faults_network.py what happens when something breaks.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import cases
import pytest
import torch
import torch.distributed as dist
from cases import Case, digest, run_case, tensor
from process_memory import status_kib
from ranks import Pool, fresh
from training import train_through

import dpcomm

Pools = Callable[[int], Pool]
MIB = 1 << 20
RANKS = (2, 3, 4)

KINDS = [
    (dtype, op, codec)
    for codec, dtypes in [("none", cases.DTYPES), ("fp16", cases.ENCODED)]
    for dtype in dtypes
    for op in cases.operations(dtype, codec)
]
# Every kind on tensors whose sizes are odd ones, in one call; and such sizes alone.
CASES = [
    Case((1021, 0, 1, 257), dtype, op, codec, algorithm, special=dtype in cases.FLOATS)
    for dtype, op, codec in KINDS
    for algorithm in cases.ALGORITHMS
] + [
    Case((size,), op="mean", codec=codec, algorithm=algorithm, special=True)
    for codec in ("none", "fp16")
    for algorithm in cases.ALGORITHMS
    for size in (0, 1, 255, 256, 257)
]
LARGE = [
    Case((size,), dtype, "mean", codec, algorithm, special=True)
    for dtype, codec in [("float32", "none"), ("float32", "fp16"), ("bfloat16", "fp16"), ("float64", "none")]
    for algorithm in cases.ALGORITHMS
    for size in (32_768, 100_003)
] + [Case((MIB + 3,), codec=codec, algorithm="direct") for codec in ("none", "fp16")]
LISTS = [
    Case(counts, codec=codec, op="mean", algorithm=algorithm, special=True)
    for counts in [(300, 0, 7, 1021), (40_000, 1, 256, 33_000), (3,) * 200]
    for codec in ("none", "fp16")
    for algorithm in cases.ALGORITHMS
]
MANY = [Case((n,), codec=c, seed=n) for n in (5, 300_001, 1, 70_000) for c in ("none", "fp16")] + LISTS[:4]


def gloo(**options: Any) -> dpcomm.Communicator:
    comm = dpcomm.Communicator(engine="gloo", timeout_s=20.0, **options)
    assert comm.engine == comm.describe()["engine"] == "gloo"
    return comm


# --- bits ------------------------------------------------------------------------------------------------------------


def run_over_gloo(rank: int, nranks: int, todo: list[Case], flip: bool = False) -> list[str]:
    """One digest a case; `flip` plants a wrong bit on the last rank."""
    digests = []
    with gloo() as comm:
        for case in todo:
            xs = run_case(comm, rank, case)
            if flip and rank == nranks - 1:
                xs[0].view(torch.uint8)[0] ^= 1
            digests.append(digest(xs))
    return digests


@pytest.mark.parametrize("todo", [CASES, LARGE, LISTS], ids=["kinds", "large", "lists"])
@pytest.mark.parametrize("nranks", RANKS, ids=lambda n: f"{n}ranks")
def test_bits_over_gloo_equal_the_reference(pool: Pools, nranks: int, todo: list[Case]) -> None:
    results = pool(nranks).run(run_over_gloo, todo)
    for i, case in enumerate(todo):
        found = {per_rank[i] for per_rank in results}
        if case.added_by_gloo(nranks):
            assert len(found) == 1, case
        else:
            assert found == {digest(case.expected(nranks))}, case


def test_a_flipped_bit_over_gloo_shows_in_the_hashes(pool: Pools) -> None:
    case = Case((1000,))
    good, bad = pool(2).run(run_over_gloo, [case], True)
    assert good == [digest(case.expected(2))]
    assert bad != good


def run_without_wait(rank: int, nranks: int, todo: list[Case]) -> list[str]:
    """All asynchronous, the last one synchronous: it runs behind them."""
    xs = [[tensor(x) for x in case.inputs(rank)] for case in todo]
    *before, (last_x, last) = zip(xs, todo, strict=True)
    with gloo() as comm:
        works = [comm.allreduce(x, case.op, **case.options, async_op=True) for x, case in before]
        comm.allreduce(last_x, last.op, **last.options)
        assert all(work.is_completed() for work in works)
        assert all(work.wait() for work in works)
    return [digest(x) for x in xs]


@pytest.mark.parametrize("nranks", [2, 3], ids=lambda n: f"{n}ranks")
def test_async_calls_over_gloo_give_the_same_bits_in_their_order(pool: Pools, nranks: int) -> None:
    results = pool(nranks).run(run_without_wait, MANY)
    assert results == results[:1] * nranks
    for found, case in zip(results[0], MANY, strict=True):
        assert case.added_by_gloo(nranks) or found == digest(case.expected(nranks)), case


# --- gloo's own all-reduce -------------------------------------------------------------------------------------------


def run_aside(rank: int, nranks: int, cases: list[Case]) -> tuple[list[list[torch.Tensor]], list[dict[str, Any]]]:
    with gloo() as comm:
        return [run_case(comm, rank, case) for case in cases], comm.describe()["bit_classes"]


def ask_for_native(rank: int, nranks: int) -> tuple[list[list[float]], list[dict[str, Any]], list[str]]:
    """Sums and a mean that are exact in any order; then what gloo has no all-reduce for."""
    with gloo(algorithm="native") as comm:
        xs = [torch.arange(7.0) + rank, torch.full((300,), rank + 1.0, dtype=torch.float64)]
        comm.allreduce(xs)
        y = comm.allreduce(torch.full((5,), 2.0 * rank), "mean")
        refused = []
        asked: list[tuple[Any, str, dict[str, Any]]] = [
            (torch.ones(3), "min", {}),
            ([torch.ones(3), torch.ones(3, dtype=torch.bfloat16)], "sum", {}),
            (torch.ones(3), "sum", {"codec": "fp16"}),
            (torch.ones(3), "sum", {"codec": "bf16"}),
        ]
        for x, op, options in asked:
            with pytest.raises(dpcomm.UnsupportedError) as caught:
                comm.allreduce(x, op, **options)
            refused.append(str(caught.value))
        mixed = asked[1][0]
        assert mixed[0].tolist() == [1.0] * 3, "a list is refused before any of it is sent"
        assert comm.allreduce(torch.ones(3), codec="fp16", algorithm="auto").tolist() == [nranks] * 3
        return [x.tolist() for x in (*xs, y)], comm.describe()["bit_classes"], refused


@pytest.mark.parametrize("nranks", [2, 3])
def test_gloo_adds_on_request(pool: Pools, nranks: int) -> None:
    total = nranks * (nranks - 1) / 2
    for (first, second, mean), classes, refused in pool(nranks).run(ask_for_native):
        assert first == [nranks * i + total for i in range(7)]
        assert second == [total + nranks] * 300
        assert mean == [nranks - 1.0] * 5
        assert classes == [{"from_elems": 1, "algorithm": "native", "bit_class": "native"}]
        assert "op=min with algorithm='native' of engine='gloo'" in refused[0]
        assert "bfloat16 not supported for op=sum with algorithm='native'; supported: float32" in refused[1]
        assert all("algorithm='native' with engine='gloo' and codec=" in text for text in refused[2:])


def choose_by_algorithm(rank: int, nranks: int) -> tuple[str, str]:
    with dpcomm.Communicator(algorithm="native", timeout_s=20.0) as comm:
        return comm.engine, comm.describe()["why"]


def test_native_is_a_reason_for_engine_gloo(pool: Pools) -> None:
    assert set(pool(2).run(choose_by_algorithm)) == {("gloo", "algorithm native")}


def test_large_tensors_that_no_codec_encodes_are_added_by_gloo(pool: Pools) -> None:
    """Within 2 roundings of the reference for three terms of either order: |x| <= 2**6 each, so 2 * 2**-24 * 3 * 64."""
    todo = [Case((1_100_000, 7), dtype, op) for dtype in ("float32", "float64") for op in ("sum", "mean")]
    results = pool(3).run(run_aside, todo)
    assert results[0][1][-1]["bit_class"] == "native"
    assert all(case.added_by_gloo(3) for case in todo)
    same = []
    for i, case in enumerate(todo):
        per_rank = [digest(xs[i]) for xs, _ in results]
        assert len(set(per_rank)) == 1
        want = [tensor(x) for x in case.expected(3)]
        for found, right in zip(results[0][0][i], want, strict=True):
            assert (found - right).abs().max() <= (2 * 2**-24 * 3 * 64 if case.dtype == "float32" else 1e-12)
        same.append(per_rank[0] == digest(want))
    assert not all(same)  # control: the order of the terms shows


def test_two_ranks_add_everything_themselves(pool: Pools) -> None:
    case = Case((1_100_000, 7))
    results = pool(2).run(run_aside, [case])
    assert {digest(xs[0]) for xs, _ in results} == {digest(case.expected(2))}
    assert {row["bit_class"] for row in results[0][1]} == {"rank_order"}


def test_gloo_adds_what_direct_adds_where_the_order_cannot_show(pool: Pools) -> None:
    """Whole numbers: sums are exact, means are one division."""
    for total, mean in pool(3).run(add_whole_numbers):
        assert total == [6.0, 60.0]
        assert mean == [2.0, 20.0]


def add_whole_numbers(rank: int, nranks: int) -> tuple[list[float], list[float]]:
    with gloo() as comm:
        found = []
        for op in ("sum", "mean"):
            x = torch.full((34_000_000,), rank + 1.0)  # more than one piece
            x[-1] *= 10
            comm.allreduce(x, op)
            assert bool((x[:-1] == x[0]).all())
            found.append([float(x[0]), float(x[-1])])
    return found[0], found[1]


def run_odd_memory(rank: int, nranks: int) -> list[str]:
    """Memory at odd offsets, strided, of NumPy: where the bytes lie changes none."""
    case = Case((1021,), "float16", "mean", "fp16", special=True)
    (x,) = case.inputs(rank)
    shifted = torch.empty(1024, dtype=torch.float16)[3:]
    shifted.copy_(tensor(x))
    spread = torch.empty(1021, 3, dtype=torch.float16)[:, 1]
    spread.copy_(tensor(x))
    own = x.copy()
    with gloo(codec="fp16") as comm:
        return [digest([comm.allreduce(y, "mean")]) for y in (shifted, spread, own)]


def test_memory_of_any_kind_gives_the_same_bits_over_gloo(pool: Pools) -> None:
    want = digest(Case((1021,), "float16", "mean", "fp16", special=True).expected(3))
    assert pool(3).run(run_odd_memory) == [[want] * 3] * 3


# --- several at a time -----------------------------------------------------------------------------------------------


def run_in_groups(rank: int, nranks: int, members: list[int], case: Case) -> list[str]:
    """A communicator of some ranks beside one of all: calls in turns. Reports both results."""
    group = dist.new_group(members)
    with gloo() as every:
        some = gloo(group=group) if rank in members else None
        result = []
        for _ in range(3):
            result = [digest(run_case(every, rank, case))]
            if some is not None:
                result.append(digest(run_case(some, members.index(rank), case)))
        if some is not None:
            some.close()
    return result


def test_a_group_over_gloo_reduces_among_its_members_beside_all(pool: Pools) -> None:
    case = Case((70_000,), op="mean", codec="fp16")
    every, some = digest(case.expected(4)), digest(case.expected(2))
    assert pool(4).run(run_in_groups, [1, 3], case) == [[every], [every, some]] * 2


def run_beside_torch(rank: int, nranks: int, calls: int) -> bool:
    """torch's own collectives on the user's group go on while asynchronous calls are under way."""
    with gloo() as comm:
        works, sums = [], []
        for i in range(calls):
            works.append(comm.allreduce(torch.full((50_000,), float(rank + i)), async_op=True))
            x = torch.tensor([float(rank + i)])
            dist.all_reduce(x)
            sums.append(float(x))
        assert all(work.wait() for work in works)
    return sums == [sum(float(r + i) for r in range(nranks)) for i in range(calls)]


def test_the_users_group_is_undisturbed_by_engine_gloo(pool: Pools) -> None:
    assert pool(3).run(run_beside_torch, 20) == [True] * 3


# --- the hook --------------------------------------------------------------------------------------------------------


def train_over_gloo(rank: int, nranks: int, codec: str, options: dict[str, Any]) -> str:
    return train_through("gloo", rank, nranks, codec, 4, options)


@pytest.mark.parametrize("options", [{}, {"find_unused_parameters": True}], ids=["plain", "find-unused"])
@pytest.mark.parametrize("codec", ["none", "fp16"])
def test_the_hook_over_gloo_gives_the_references_gradients(pool: Pools, codec: str, options: dict[str, Any]) -> None:
    assert pool(2).run(train_over_gloo, codec, options) == ["gloo"] * 2


# --- what it says of itself ------------------------------------------------------------------------------------------


def count(rank: int, nranks: int) -> tuple[dict[str, float], dict[str, float], dict[str, float], dict[str, Any]]:
    """Stats after one call with each codec, and after a reset; what the communicator says it is."""
    x = torch.ones(MIB)
    with gloo() as comm:
        comm.allreduce(x, codec="none", algorithm="direct")
        plain = comm.stats(reset=True)
        comm.allreduce(x, codec="fp16", algorithm="direct")
        half = comm.stats(reset=True)
        return plain, half, comm.stats(), comm.describe()


def test_stats_over_gloo_count_calls_bytes_and_seconds(pool: Pools) -> None:
    for plain, half, nothing, about in pool(3).run(count):
        assert plain["calls"] == half["calls"] == 1
        assert plain["input_bytes"] == half["input_bytes"] == 4 * MIB
        # Of the two thirds that are not its own it sends its values, of its own third the result, twice.
        assert plain["wire_bytes"] == pytest.approx(4 / 3 * 4 * MIB, rel=0.01)
        assert half["wire_bytes"] == pytest.approx(plain["wire_bytes"] / 2, rel=0.01)
        assert all(half[phase] > 0 for phase in ("put_s", "reduce_s", "get_s"))
        assert not any(nothing.values())
        assert about["why"] == "asked for"
        assert about["nranks"] == 3
        assert set(about["bit_classes"][0]) == {"from_elems", "algorithm", "bit_class"}


def non_finite(rank: int, nranks: int) -> float:
    x = torch.ones(1000)
    x[300] = float("inf") if rank == 1 else 1.0
    with gloo(codec="fp16") as comm:
        comm.allreduce(x)
        return comm.stats()["nonfinite_groups"]


def test_groups_that_are_not_finite_are_counted_over_gloo(pool: Pools) -> None:
    assert all(found >= 1 for found in pool(2).run(non_finite))


def grow(rank: int, nranks: int, calls: int) -> tuple[int, int]:
    """KiB that anonymous memory grows by over many calls, warmed up, and over as many that leak."""
    x, leak = torch.ones(1024), []
    with gloo(codec="fp16") as comm:
        for _ in range(calls):
            comm.allreduce(x, "mean")
        gc.collect()
        start = status_kib("VmData")
        for _ in range(calls):
            comm.allreduce(x, "mean")
        flat = status_kib("VmData") - start
        for _ in range(calls):
            leak.append(comm.allreduce(x, "mean").repeat(16))
        return flat, status_kib("VmData") - start


def test_memory_is_flat_over_a_thousand_calls_over_gloo() -> None:
    """In processes of their own: those of a pool have freed memory that a leak would fill first."""
    for outcome in fresh(2, grow, 1000):
        flat, leaking = outcome.value
        assert flat < 256  # KiB: 260 bytes a call
        assert leaking > 30_000  # control: 1000 kept results of 64 KiB


def one_rank(rank: int, nranks: int) -> list[float]:
    with dpcomm.Communicator(rank=0, nranks=1, engine="gloo") as comm:
        return list(comm.allreduce(torch.tensor([float(rank), 5.0]), "mean").tolist())


def test_one_rank_over_gloo_is_the_identity(pool: Pools) -> None:
    assert pool(2).run(one_rank) == [[0.0, 5.0], [1.0, 5.0]]


def test_cases_cover_what_engine_gloo_serves() -> None:
    """A dtype, operation, codec or algorithm that is added later must come here, too."""
    native = dpcomm._native
    assert {case.dtype for case in CASES} == set(native.DTYPES)
    assert {case.op for case in CASES} == set(native.OPS)
    assert {case.codec for case in CASES} == set(native.CODECS) - {"bf16"}  # of engine nccl only
    assert {case.algorithm for case in CASES} == set(native.ALGORITHMS) - {
        "native",
        "two_level",
    }  # below; of another engine
