"""Engine torch: any backend of torch.distributed carries the messages. Here gloo, through the interface that all have,
and one that is none of torch's (foreign.py).
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import cases
import foreign
import pytest
import torch
import torch.distributed as dist
from cases import Case, digest, run_case
from faulty import Caught, catch, check, check_all, check_poisoned
from ranks import Pool, fresh
from stores import build
from test_faults_construction import hash_store
from training import train_through

import dpcomm
from dpcomm import carriers

Pools = Callable[[int], Pool]

CASES = [
    Case(counts, dtype, "mean", codec, algorithm, special=True)
    for dtype, codec in [("float32", "none"), ("float64", "none"), ("float32", "fp16"), ("bfloat16", "fp16")]
    for algorithm in cases.ALGORITHMS
    for counts in [(0,), (257,), (1021, 0, 1, 70_001)]
] + [Case((1 << 20,), codec=codec, algorithm="direct") for codec in ("none", "fp16")]


def through_torch(**options: Any) -> dpcomm.Communicator:
    comm = dpcomm.Communicator(**{"engine": "torch", "timeout_s": 20.0, **options})
    assert comm.engine == comm.describe()["engine"] == "torch"
    return comm


def reduce_all(rank: int, nranks: int, flip: bool = False) -> list[str]:
    digests = []
    with through_torch() as comm:
        for case in CASES:
            xs = run_case(comm, rank, case)
            if flip and rank == 1 and xs[-1].numel():
                xs[-1].view(torch.uint8)[0] ^= 1
            digests.append(digest(xs))
    return digests


@pytest.mark.parametrize("nranks", [2, 3], ids=lambda n: f"{n}ranks")
def test_bits_through_torch_equal_the_reference(pool: Pools, nranks: int) -> None:
    want = [digest(case.expected(nranks)) for case in CASES]
    assert pool(nranks).run(reduce_all) == [want] * nranks


def test_a_flipped_bit_through_torch_shows(pool: Pools) -> None:
    good, bad = pool(2).run(reduce_all, True)
    assert good != bad


def train_through_torch(rank: int, nranks: int) -> str:
    return train_through("torch", rank, nranks, "fp16", 3)


def test_the_hook_through_torch_gives_the_references_gradients(pool: Pools) -> None:
    assert pool(2).run(train_through_torch) == ["torch"] * 2


def test_engine_torch_without_a_group_is_refused_on_all() -> None:
    caught = build([hash_store()] * 2, [{"engine": "torch"}] * 2)
    check_all(caught, "ArgumentError", "needs a process group", within_s=5.0)


def disagree_through_torch(rank: int, nranks: int) -> tuple[Caught, bool]:
    x = torch.ones(1000 + rank)
    with through_torch(timeout_s=5.0) as comm:
        caught = catch(comm.allreduce, x)
        check_poisoned(comm, "[MISMATCH]")
        return caught, bool((x == 1).all())


def test_a_mismatch_through_torch_is_noticed_before_anything_moves(pool: Pools) -> None:
    results = pool(2).run(disagree_through_torch)
    check_all(
        [caught for caught, _ in results], "MismatchError", "numel: rank 0 has 1000, rank 1 has 1001", within_s=2.0
    )
    assert all(untouched for _, untouched in results)


def die_through_torch(rank: int, nranks: int) -> Caught:
    comm = through_torch()
    comm.allreduce(torch.ones(10))
    if rank == 1:
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
    x = torch.ones(1 << 20)
    caught = catch(lambda: [comm.allreduce(x) for _ in range(100_000)])
    comm.close()
    return caught


def test_24_a_rank_killed_through_torch_is_lost_on_all() -> None:
    outcomes = fresh(3, die_through_torch)
    died = outcomes[1].ended
    for rank in (0, 2):
        caught = outcomes[rank].value
        check(caught, "PeerLostError", "rank 1", "disappeared")
        assert caught.ended < died + 2.0


def test_50_a_destroyed_group_ends_engine_torch_typed_or_not_at_all() -> None:
    """destroy_process_group() forgets groups; one that a communicator holds lives on with it, or its calls abort."""
    outcomes = fresh(2, use_after_destroy)
    assert [outcome.value for outcome in outcomes] == ["works"] * 2


def use_after_destroy(rank: int, nranks: int) -> str:
    comm = through_torch(timeout_s=5.0)
    dist.destroy_process_group()
    x = comm.allreduce(torch.ones(1 << 18))
    assert bool((x == 2).all())
    comm.close()
    return "works"


def test_an_aborted_exchange_never_writes_to_its_memory() -> None:
    """What arrives after an abort stays in the carrier's own tensors."""

    class Never:
        def is_completed(self) -> bool:
            return False

    class Group:
        def size(self) -> int:
            return 2

        def alltoall_base(self, into: torch.Tensor, *_: Any) -> Never:
            into.fill_(7)
            return Never()

    carrier = carriers.TorchCarrier(torch.device("cpu"))
    carrier.connect(Group())
    mine, theirs = torch.zeros(8, dtype=torch.uint8), torch.zeros(8, dtype=torch.uint8)
    carrier.exchange(0, [(1, mine.data_ptr(), 8)], [(1, theirs.data_ptr(), 8)])
    kind, _, _ = carrier.wait(0, 0.05)
    assert kind == dpcomm._native.ARRIVALS["late"]
    carrier.abort()
    assert carrier.wait(0, 5.0) == carriers.ABORTED
    assert not theirs.any()


# --- a backend of somebody else's ------------------------------------------------------------------------------------


def through_foreign(timeout_s: float) -> tuple[dpcomm.Communicator, foreign.Foreign]:
    """A communicator on a group of that backend, and the group of the same kind that it has made for itself."""
    foreign.register()
    group = dist.new_group(backend=foreign.NAME)
    comm = through_torch(group=group, timeout_s=timeout_s)
    users, own = foreign.Foreign.made[-2:]
    assert users is group
    assert users.begun == 0
    return comm, own


def reduce_through_foreign(rank: int, nranks: int) -> tuple[list[str], list[tuple[float, int]]]:
    """Digests, and what each call sent: as dpcomm counts it, and as the backend does."""
    comm, own = through_foreign(20.0)
    digests, sent = [], []
    with comm:
        for case in FOREIGN_CASES:
            before = own.sent
            comm.stats(reset=True)
            xs = run_case(comm, rank, case)
            digests.append(digest(xs))
            sent.append((comm.stats()["wire_bytes"], own.sent - before))
    return digests, sent


FOREIGN_CASES = [
    Case(counts, codec=codec, op="mean", algorithm=algorithm, special=True)
    for codec in ("none", "fp16")
    for algorithm in ("direct", "oneshot", "ring")
    for counts in [(0,), (257,), (1021, 0, 1, 70_001), (300_003,)]
]


@pytest.mark.parametrize("nranks", [2, 3], ids=lambda n: f"{n}ranks")
def test_a_foreign_backend_carries_all_bytes_and_gives_the_references_bits(nranks: int) -> None:
    for outcome in fresh(nranks, reduce_through_foreign):
        assert outcome.error is None, outcome.error.trace
        digests, sent = outcome.value
        assert digests == [digest(case.expected(nranks)) for case in FOREIGN_CASES]
        assert [carried for _, carried in sent] == [counted for counted, _ in sent]
        assert [carried > 0 for _, carried in sent] == [sum(case.counts) > 0 for case in FOREIGN_CASES]


def fail_in_a_call(rank: int, nranks: int, fails: str) -> tuple[Caught, int]:
    """The third exchange of a call fails on rank 1. How many the call began."""
    comm, own = through_foreign(1.5)
    x = torch.ones(1 << 20)
    comm.allreduce(x, algorithm="ring")
    dist.barrier()
    before = own.begun
    if rank == 1:
        own.fails, own.fails_at = fails, before + 2
    caught = catch(comm.allreduce, x, algorithm="ring")
    check_poisoned(comm, "[TIMEOUT]" if fails == "never-ends" else f"foreign wire cut at exchange {before + 2}")
    comm.close()
    dist.barrier()  # a rank that left would be another cause
    return caught, own.begun - before


@pytest.mark.parametrize("fails", ["started", "under-way", "never-ends"])
def test_a_foreign_backend_that_fails_in_a_call_is_a_typed_error_on_all(fails: str) -> None:
    for outcome in fresh(3, fail_in_a_call, fails):
        assert outcome.error is None, outcome.error.trace
        caught, exchanges = outcome.value
        if fails == "never-ends":
            check(caught, "CommTimeoutError", "for 1.5 s", within_s=1.5 + 2.0)
        else:
            check(caught, "AbortedError", "torch: ", "foreign wire cut", within_s=3.0)
        assert exchanges > 2, "it failed before its middle"
