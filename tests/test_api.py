"""The Python face: names, signatures, defaults, handles, what is reported and what is refused. Bits are elsewhere."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
import time
from collections.abc import Callable, Iterator
from typing import Any

import cases
import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import Pool

import dpcomm

Pools = Callable[[int], Pool]

# The public signatures; a change breaks users.
SIGNATURES: dict[str, str] = {
    "allreduce": "(x, op='sum', *, codec=None, algorithm=None, group=None, async_op=False)",
    "Communicator": "(group=None, *, rank=None, nranks=None, store=None, device=None, codec='none', engine='auto', "
    "algorithm='auto', timeout_s=300.0, bucket_cap_mb=25.0, max_ctas=None, intra_codec='none')",
    "Communicator.allreduce": "(self, x, op='sum', *, codec=None, algorithm=None, async_op=False)",
    "Communicator.describe": "(self)",
    "Communicator.stats": "(self, reset=False)",
    "Communicator.check": "(self)",
    "Communicator.close": "(self)",
    "Work.wait": "(self, timeout_s=None)",
    "Work.is_completed": "(self)",
    "Work.exception": "(self)",
    "HookState": "(process_group=None, *, codec='fp16', **communicator_keywords)",
    "HookState.stats": "(self)",
    "HookState.close": "(self)",
    "allreduce_hook": "(state, bucket)",
    "register_ddp_hook": "(ddp, *, process_group=None, **keywords)",
    "recover": "(ddp)",
    "verify": "(x)",
    "info": "()",
}
ERRORS = {
    "ArgumentError": ("ARGUMENT", ValueError),
    "UnsupportedError": ("UNSUPPORTED", NotImplementedError),
    "MismatchError": ("MISMATCH", RuntimeError),
    "PeerLostError": ("PEER_LOST", RuntimeError),
    "CommTimeoutError": ("TIMEOUT", TimeoutError),
    "AbortedError": ("ABORTED", RuntimeError),
    "SystemResourceError": ("RESOURCE", OSError),
    "P2PUnavailableError": ("P2P", RuntimeError),
    "VersionError": ("VERSION", RuntimeError),
    "ForkError": ("FORK", RuntimeError),
    "InternalError": ("INTERNAL", RuntimeError),
}
STATS = {"calls", "input_bytes", "wire_bytes", "put_s", "reduce_s", "get_s", "wait_s", "nonfinite_groups"}


@pytest.fixture
def pair() -> Iterator[list[dpcomm.Communicator]]:
    comms = cases.local(2)
    yield comms
    for comm in comms:
        comm.close()


def bare(signature: inspect.Signature) -> str:
    """Names, kinds and defaults only."""
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=plain, return_annotation=inspect.Signature.empty))


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature_is_the_promised_one(name: str) -> None:
    found: Any = dpcomm
    for part in name.split("."):
        found = getattr(found, part)
    assert bare(inspect.signature(found)) == SIGNATURES[name]


def test_local_functions_take_the_keywords_of_communicators() -> None:
    """Their signatures may spell the keywords out."""
    assert next(iter(inspect.signature(dpcomm.init_local).parameters)) == "devices"
    assert [*inspect.signature(dpcomm.allreduce_local).parameters][:3] == ["comms", "xs", "op"]
    keywords: dict[str, Any] = {"codec": "fp16", "engine": "shm", "algorithm": "direct", "timeout_s": 9.0}
    (comm, _) = dpcomm.init_local(["cpu"] * 2, bucket_cap_mb=1.0, **keywords)
    assert (comm.codec, comm.engine, comm.algorithm, comm.timeout_s) == tuple(keywords.values())
    assert (comm.rank, comm.nranks, comm.closed) == (0, 2, False)


@pytest.mark.parametrize("name", ERRORS)
def test_errors_have_their_place_code_and_message(name: str) -> None:
    kind, (code, base) = getattr(dpcomm, name), ERRORS[name]
    assert issubclass(kind, dpcomm.Error)
    assert issubclass(kind, base)
    error = pickle.loads(pickle.dumps(kind("what happened")))
    assert type(error) is kind
    assert error.code == code
    assert str(error) == f"[dpcomm:{code}] what happened"
    assert issubclass(dpcomm.Error, RuntimeError)
    assert {*ERRORS, "Error", "Work", "HookState", *(n for n in SIGNATURES if "." not in n)} <= set(dpcomm.__all__)


# --- calls and what they return --------------------------------------------------------------------------------------


def test_results_are_in_place_and_are_what_was_passed(pair: list[dpcomm.Communicator]) -> None:
    xs = [torch.ones(5), torch.ones(5)]
    assert dpcomm.allreduce_local(pair, xs) is xs
    assert xs[0].tolist() == [2.0] * 5
    (alone,) = dpcomm.init_local(["cpu"])
    for x in (torch.ones(3), np.ones(3), [torch.ones(2), np.ones(2)]):
        assert alone.allreduce(x) is x
        work = alone.allreduce(x, async_op=True)
        assert isinstance(work, dpcomm.Work)
        assert work.wait() is True


@pytest.mark.parametrize("name", ["SUM", "AVG", "MIN", "MAX"])
def test_torchs_operations_mean_the_same(pair: list[dpcomm.Communicator], name: str) -> None:
    xs = [torch.tensor([3.0]), torch.tensor([5.0])]
    dpcomm.allreduce_local(pair, xs, getattr(dist.ReduceOp, name))
    assert xs[0].item() == xs[1].item() == {"SUM": 8, "AVG": 4, "MIN": 3, "MAX": 5}[name]


@pytest.mark.parametrize(
    ("x", "op", "options", "error", "text"),
    [
        (torch.ones(2), "prod", {}, dpcomm.ArgumentError, "unknown op 'prod'.*sum, mean, min, max"),
        (torch.ones(2), dist.ReduceOp.PRODUCT, {}, dpcomm.UnsupportedError, "PRODUCT"),
        (torch.ones(2), "sum", {"codec": "zip"}, dpcomm.ArgumentError, "unknown codec 'zip'"),
        (torch.ones(2), "sum", {"algorithm": "star"}, dpcomm.ArgumentError, "unknown algorithm 'star'"),
        (torch.ones(2), "max", {"codec": "fp16"}, dpcomm.UnsupportedError, "max.*fp16"),
        (torch.ones(2).long(), "mean", {}, dpcomm.UnsupportedError, "int64 not supported for op=mean; supported: "),
        (torch.ones(2).long(), "sum", {"codec": "fp16"}, dpcomm.UnsupportedError, "int64.*use codec='?none"),
        (torch.ones(2).double(), "sum", {"codec": "fp16"}, dpcomm.UnsupportedError, "float64.*use codec='?none"),
        (torch.ones(2, dtype=torch.complex64), "sum", {"codec": "fp16"}, dpcomm.UnsupportedError, "complex64"),
        (torch.ones(2, dtype=torch.complex64), "max", {}, dpcomm.UnsupportedError, "complex64"),
        (torch.ones(2).bool(), "sum", {}, dpcomm.UnsupportedError, "bool"),
        (torch.ones(2), "sum", {"codec": "bf16"}, dpcomm.UnsupportedError, "bf16.*only algorithm='native'"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("nranks", [1, 2], ids=["1rank", "2ranks"])
def test_refusals_are_local_and_leave_the_communicator_usable(
    nranks: int, x: Any, op: Any, options: Any, error: type[Exception], text: str
) -> None:
    comms = cases.local(nranks)
    with pytest.raises(error, match=text):
        comms[0].allreduce(x, op, **options)
    with pytest.raises(error, match=text):
        dpcomm.allreduce_local(comms, [x.clone() for _ in comms], op, **options)
    after = [torch.ones(2) for _ in comms]
    dpcomm.allreduce_local(comms, after)
    assert after[0].tolist() == [nranks] * 2


def test_native_needs_an_engine_whose_library_adds_up(pair: list[dpcomm.Communicator]) -> None:
    for codec in ("none", "fp16", "bf16"):
        with pytest.raises(dpcomm.UnsupportedError, match="engine='shm', which uses no library"):
            pair[0].allreduce(torch.ones(2), codec=codec, algorithm="native")
    for engine, codec in (("shm", "none"), ("torch", "none"), ("gloo", "fp16")):
        with pytest.raises(dpcomm.UnsupportedError, match=f"algorithm='native' with engine='{engine}'"):
            dpcomm.Communicator(rank=0, nranks=1, engine=engine, codec=codec, algorithm="native")
    with dpcomm.Communicator(rank=0, nranks=1, engine="gloo") as one, pytest.raises(dpcomm.UnsupportedError):
        one.allreduce(torch.ones(2), codec="bf16", algorithm="native")
    with pytest.raises(dpcomm.UnsupportedError, match="algorithm='native' needs engine='gloo', which joins processes"):
        dpcomm.init_local(["cpu"] * 2, algorithm="native")
    (alone,) = dpcomm.init_local(["cpu"])
    x = torch.full((3,), 1 / 3)
    assert alone.allreduce(x.clone(), codec="bf16", algorithm="native").equal(x)  # one rank: the identity


def test_allreduce_without_a_process_group_says_what_to_call() -> None:
    with pytest.raises(dpcomm.ArgumentError, match="init_process_group"):
        dpcomm.allreduce(torch.ones(2))


# --- Work ------------------------------------------------------------------------------------------------------------


def test_work_waits_times_out_and_goes_on(pair: list[dpcomm.Communicator]) -> None:
    xs = [torch.ones(1000), torch.ones(1000)]
    work = pair[0].allreduce(xs[0], async_op=True)
    began = time.monotonic()
    with pytest.raises(dpcomm.CommTimeoutError):
        work.wait(timeout_s=0.05)
    assert 0.04 < time.monotonic() - began < 2
    assert (work.is_completed(), work.exception()) == (False, None)
    assert pair[1].allreduce(xs[1], async_op=True).wait(5) is True
    assert work.wait() is True
    assert (work.is_completed(), work.exception()) == (True, None)
    assert work.wait(0) is True  # again, at once
    assert xs[0].unique().tolist() == [2.0]  # type: ignore[no-untyped-call]


def test_work_of_a_failed_call_raises_its_error_each_time(pair: list[dpcomm.Communicator]) -> None:
    works = [c.allreduce(torch.ones(n), async_op=True) for c, n in zip(pair, (4, 8), strict=True)]
    for work in works:
        for _ in range(2):
            with pytest.raises(dpcomm.MismatchError, match="rank 0 has 4, rank 1 has 8"):
                work.wait(5)
        assert work.is_completed()
        assert isinstance(work.exception(), dpcomm.MismatchError)
    for comm in pair:
        with pytest.raises(dpcomm.AbortedError, match="numel"):
            comm.allreduce(torch.ones(4))
        with pytest.raises(dpcomm.Error):
            comm.check()


def test_arrays_of_unawaited_work_stay_alive(pair: list[dpcomm.Communicator]) -> None:
    works = [[c.allreduce(torch.ones(100_000), async_op=True) for _ in range(20)] for c in pair]
    assert all(work.wait(10) for pair_of in works for work in pair_of)


# --- Communicator ----------------------------------------------------------------------------------------------------


def test_describe_and_stats_say_what_happened(pair: list[dpcomm.Communicator]) -> None:
    said = pair[1].describe()
    assert {"engine", "why", "bit_classes", "versions", "arena_bytes", "rank", "nranks", "codec", "algorithm"} <= set(
        said
    )
    assert (said["engine"], said["rank"], said["nranks"]) == ("shm", 1, 2)
    assert 0 < said["arena_bytes"] <= 4 << 20
    assert {row["bit_class"] for row in said["bit_classes"]} == {"rank_order"}
    json.dumps(said)  # plain values only
    before = pair[0].stats()
    assert set(before) == STATS
    assert not any(before.values())
    xs = [torch.full((1024,), float("inf")), torch.ones(1024)]
    dpcomm.allreduce_local(pair, xs, codec="fp16")
    stats = pair[0].stats(reset=True)
    assert (stats["calls"], stats["input_bytes"]) == (1, 4096)
    assert 0 < stats["wire_bytes"] < 4096
    assert stats["nonfinite_groups"] > 0
    assert stats["reduce_s"] > 0
    assert not any(pair[0].stats().values())


def test_buckets_are_packed_in_order_one_open_for_each_dtype() -> None:
    comms = dpcomm.init_local(["cpu"] * 2, bucket_cap_mb=1.0)
    quarter = 1 << 16  # elements of 4 bytes in a quarter of a MiB
    lists = {
        (1, 1, 1, 1): 1,  # fills a bucket to its edge
        (1, 1, 1, 1, 1): 2,
        (3, 2, 2): 2,
        (5, 1): 2,  # larger than a bucket: one of its own, not split
        (0, 0): 1,
    }
    for sizes, buckets in lists.items():
        dpcomm.allreduce_local(comms, [[torch.ones(n * quarter) for n in sizes] for _ in comms])
        assert comms[0].stats(reset=True)["calls"] == buckets, sizes
    mixed = [[torch.ones(quarter, dtype=d) for d in (torch.float32, torch.int32) * 3] for _ in comms]
    dpcomm.allreduce_local(comms, mixed)
    assert comms[0].stats()["calls"] == 2


def test_close_is_local_idempotent_and_final(pair: list[dpcomm.Communicator]) -> None:
    with pair[0] as comm:
        assert comm is pair[0]
        assert not comm.closed
    comm.close()
    assert comm.closed
    for call in (
        lambda: comm.allreduce(torch.ones(2)),
        lambda: comm.allreduce(torch.ones(2), async_op=True),
        comm.check,
    ):
        with pytest.raises(dpcomm.Error, match="closed"):
            call()
    with pytest.raises(dpcomm.Error):
        pair[1].allreduce(torch.ones(2))


@pytest.mark.parametrize("nranks", [1, 2], ids=["1rank", "2ranks"])
@pytest.mark.parametrize("act", [pickle.dumps, copy.copy, copy.deepcopy])
def test_communicators_are_neither_pickled_nor_copied(nranks: int, act: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match="cannot pickle"):
        act(dpcomm.init_local(["cpu"] * nranks)[0])


def make_in_three_ways(rank: int, nranks: int) -> list[float]:
    """A communicator from WORLD, from a group, and from rank, nranks and store; and two at once."""
    store = dist.PrefixStore("own", dist.distributed_c10d._get_default_store())  # type: ignore[attr-defined]
    with dpcomm.Communicator() as world, dpcomm.Communicator(dist.new_group([0, 1])) as group:
        with dpcomm.Communicator(rank=rank, nranks=nranks, store=store, codec="fp16") as own:
            comms = [world, group, own]
            assert all((c.rank, c.nranks) == (rank, nranks) for c in comms)
            return [float(c.allreduce(torch.tensor([1.0 + rank]))) for c in comms]


def test_communicators_are_made_from_a_group_or_a_store(pool: Pools) -> None:
    assert pool(2).run(make_in_three_ways) == [[3.0] * 3] * 2
    assert float(dpcomm.Communicator(rank=0, nranks=1).allreduce(torch.tensor([7.0]), "mean")) == 7.0
