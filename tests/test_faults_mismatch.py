"""Ranks that ask for different things: the same MismatchError on all within a second, and no byte of theirs changed.

Numbers in the names count the faults that dpcomm promises to answer; those that are missing have a test elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cases
import pytest
import torch
import torch.distributed as dist
from faulty import Caught, catch, check, check_all, check_poisoned, check_usable, in_threads
from ranks import Pool

import dpcomm

Pools = Callable[[int], Pool]
WITHIN_S = 1.0
MIB = 1 << 20
BEFORE = 3  # calls that go well, so that the sequence number in the message means something


@dataclass(frozen=True)
class Ask:
    """What one rank asks for. Several counts make a list of tensors."""

    counts: tuple[int, ...] = (1000,)
    dtype: torch.dtype = torch.float32
    op: str = "sum"
    codec: str = "none"
    algorithm: str = "auto"

    def tensors(self) -> list[torch.Tensor]:
        return [(torch.arange(n) % 251 + 1).to(self.dtype) for n in self.counts]

    def call(self, comm: dpcomm.Communicator, xs: list[torch.Tensor], async_op: bool) -> Any:
        options: dict[str, Any] = {"codec": self.codec, "algorithm": self.algorithm, "async_op": async_op}
        result = comm.allreduce(xs if len(xs) > 1 else xs[0], self.op, **options)
        return result.wait() if async_op else result


F64, I32, F16, BF16 = torch.float64, torch.int32, torch.float16, torch.bfloat16
FAULTS: dict[str, tuple[Ask, Ask, str]] = {
    "09-empty-meets-full": (Ask((0,)), Ask((8,)), "numel: rank 0 has 0, rank 1 has 8"),
    "09-empty-meets-large": (Ask((0,)), Ask((MIB,)), "numel: rank 0 has 0, rank 1 has 1048576"),
    "18-numel": (Ask((4,)), Ask((8,)), "numel: rank 0 has 4, rank 1 has 8"),
    "18-numel-by-one": (Ask((MIB,)), Ask((MIB + 1,)), "numel: rank 0 has 1048576, rank 1 has 1048577"),
    "18-numel-of-many-slots": (Ask((8 * MIB,)), Ask((5,)), "numel: rank 0 has 8388608, rank 1 has 5"),
    "18-number-of-tensors": (Ask((8,)), Ask((4, 4)), "number of tensors: rank 0 has 1, rank 1 has 2"),
    "18-sizes-of-tensors": (Ask((300, 500)), Ask((500, 300)), "rank 0 and rank 1 have as many elements, but in tens"),
    "19-dtype-of-equal-size": (Ask(), Ask(dtype=I32), "dtype: rank 0 has float32, rank 1 has int32"),
    "19-dtype-of-equal-bytes": (Ask((8,)), Ask((4,), F64), "rank 0 has"),
    "19-half-types": (Ask(dtype=F16), Ask(dtype=BF16), "dtype: rank 0 has float16, rank 1 has bfloat16"),
    "20-op": (Ask(), Ask(op="max"), "op: rank 0 has sum, rank 1 has max"),
    "20-mean": (Ask(op="mean"), Ask(op="sum"), "op: rank 0 has mean, rank 1 has sum"),
    "20-codec": (Ask(), Ask(codec="fp16"), "codec: rank 0 has none, rank 1 has fp16"),
    "20-algorithm": (Ask(algorithm="direct"), Ask(algorithm="oneshot"), "algorithm: rank 0 has direct, rank 1 has on"),
}  # fmt: skip


def disagree(rank: int, nranks: int, asks: list[Ask], asynchronous: bool) -> Caught:
    ask = asks[rank]
    with dpcomm.Communicator(timeout_s=5.0) as comm:
        for _ in range(BEFORE):
            comm.allreduce(torch.ones(1000))
        xs = ask.tensors()
        dist.barrier()
        caught = catch(ask.call, comm, xs, asynchronous)
        for x, before in zip(xs, ask.tensors(), strict=True):
            assert torch.equal(x, before), "the call wrote to its tensor"
        check_poisoned(comm, "communicator aborted at seq", "because: [MISMATCH]")
    return caught


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("fault", FAULTS)
def test_disagreement_is_named_on_all_ranks(pool: Pools, fault: str, asynchronous: bool) -> None:
    first, second, text = FAULTS[fault]
    caught = pool(2).run(disagree, [first, second], asynchronous)
    check_all(caught, "MismatchError", text, f"seq {BEFORE + 1})", within_s=WITHIN_S)


@pytest.mark.parametrize("odd", [0, 2, 3])
def test_18_the_odd_one_of_four_is_named(pool: Pools, odd: int) -> None:
    asks = [Ask((12,)) if rank == odd else Ask((40_000,)) for rank in range(4)]
    caught = pool(4).run(disagree, asks, False)
    check_all(caught, "MismatchError", f"rank {odd} has 12", "has 40000", within_s=WITHIN_S)


def swap_two_calls(rank: int, nranks: int) -> Caught:
    """Rank 1 makes the calls of rank 0 in another order, in DDP's words: it is in another bucket."""
    with dpcomm.Communicator(timeout_s=5.0) as comm:
        request = comm._request("mean", None, None)
        x = torch.ones(500)
        dist.barrier()
        jobs = [comm._submit_bucket(x, request, bucket) for bucket in ((0, 1), (1, 0))[rank]]
        assert None not in jobs
        caught, second = (catch(job.wait, 5.0) for job in jobs if job is not None)
        check(second, "AbortedError", "rank 0 is in bucket 0, rank 1 in bucket 1")
        assert torch.equal(x, torch.ones(500))
    return caught


def test_21_another_order_of_buckets_is_named(pool: Pools) -> None:
    caught = pool(2).run(swap_two_calls)
    check_all(caught, "MismatchError", "rank 0 is in bucket 0, rank 1 in bucket 1 (seq 1)", within_s=WITHIN_S)


def test_21_another_order_of_unlike_calls_is_a_mismatch() -> None:
    comms = cases.local(2)
    orders = ((4, 8), (8, 4))
    works = [[c.allreduce(torch.ones(n), async_op=True) for n in order] for c, order in zip(comms, orders, strict=True)]
    for first, second in works:
        check(catch(first.wait, 5.0), "MismatchError", "numel: rank 0 has 4, rank 1 has 8", within_s=WITHIN_S)
        check(catch(second.wait, 5.0), "AbortedError", "because: [MISMATCH] numel: rank 0 has 4, rank 1 has 8")


def test_a_new_communicator_works_after_a_mismatch(pool: Pools) -> None:
    """In the same processes, beside the poisoned one: nothing is global."""
    assert pool(2).run(mismatch_then_again) == [3.0] * 2


def mismatch_then_again(rank: int, nranks: int) -> float:
    with dpcomm.Communicator(timeout_s=5.0) as broken, dpcomm.Communicator(timeout_s=5.0) as other:
        check(catch(broken.allreduce, torch.ones(4 + rank)), "MismatchError", "numel")
        other.allreduce(torch.ones(4))
        with dpcomm.Communicator(timeout_s=5.0) as new:
            return float(new.allreduce(torch.tensor([1.0 + rank])))


def test_52_threads_take_turns() -> None:
    """Alike calls of two threads on each rank: whatever the order of the turns, each is a sum over all ranks."""
    comms = cases.local(2)

    def many(comm: dpcomm.Communicator) -> bool:
        x = torch.empty(300)
        return all(torch.equal(comm.allreduce(x.fill_(comm.rank + 1.0)), torch.full((300,), 3.0)) for _ in range(300))

    assert in_threads([lambda c=c: many(c) for c in comms * 2]) == [True] * 4  # type: ignore[misc]
    check_usable(comms)


def test_52_threads_in_another_order_are_a_mismatch() -> None:
    comms = cases.local(2)

    def sizes(comm: dpcomm.Communicator) -> None:
        for n in (3, 5) if comm.rank == 0 else (5, 3):
            comm.allreduce(torch.ones(n))

    for caught in in_threads([lambda c=c: sizes(c) for c in comms]):  # type: ignore[misc]
        check(caught, "MismatchError", "numel: rank 0 has 3, rank 1 has 5", within_s=5.0)
