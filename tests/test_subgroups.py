"""Several communicators at once: dimensions of a DeviceMesh, any subgroups, orders of making, using and closing.

Four ranks in two rows: "tp" is a row, (0, 1) or (2, 3), "dp" a column, (0, 2) or (1, 3); "world" is all of them.
"""

from __future__ import annotations

import itertools
import random
import re
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import Case, digest, run_case, tensor
from faulty import Caught, catch, check, check_all, check_poisoned, in_threads
from ranks import Pool, fresh
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel as DDP
from training import SMALL_BUCKETS_MB, Net, Recorder, backward, check_gradients

import dpcomm
from dpcomm.default import communicator_of

Pools = Callable[[int], Pool]
NAMES = ("world", "dp", "tp")
MEMBERS = {
    "world": [[0, 1, 2, 3]] * 4,
    "dp": [[0, 2], [1, 3], [0, 2], [1, 3]],
    "tp": [[0, 1], [0, 1], [2, 3], [2, 3]],
}  # of the communicator of each name, by rank
TIMEOUT_S = 1.5  # of calls that cannot end well
GRACE_S = 1.0
ROUNDS = 3
DESCRIPTORS = Path("/proc/self/fd")


def mesh_of(device_type: str = "cpu") -> DeviceMesh:
    return init_device_mesh(device_type, (2, 2), mesh_dim_names=("dp", "tp"))


def make(mesh: DeviceMesh, name: str, **options: Any) -> dpcomm.Communicator:
    group = None if name == "world" else mesh[name]
    return dpcomm.Communicator(group, **{"timeout_s": 20.0, **options})


def case_of(name: str, rank: int, turn: int) -> Case:
    """Large and small, with a codec and without; other values for each group and turn."""
    members = MEMBERS[name][rank]
    count = (70_001, 300, 5)[turn % 3]
    seed = 1000 * turn + sum(1 << m for m in members)
    return Case((count, 9), op="mean", codec=("none", "fp16")[turn % 2], seed=seed)


def expected(rank: int) -> list[str]:
    """Digests of all results of a rank, in turns, by the order of NAMES."""
    todo = itertools.product(range(ROUNDS), NAMES)
    return [digest(case_of(name, rank, turn).expected(len(MEMBERS[name][rank]))) for turn, name in todo]


def test_groups_that_were_mixed_up_would_be_noticed() -> None:
    """Control: no two groups have the same results in any turn."""
    every = [d for rank in (0, 1, 2) for d in expected(rank)]  # ranks 0 and 1 share a row, 0 and 2 a column
    assert len(set(every)) == ROUNDS * len({tuple(m[r]) for m in MEMBERS.values() for r in (0, 1, 2)})


# --- bits ------------------------------------------------------------------------------------------------------------

ORDERS = {
    "world-dp-tp": [("world", "dp", "tp")] * 4,
    "tp-dp-world": [("tp", "dp", "world")] * 4,
    # One order of all five groups that each rank agrees with: (0, 1), (0, 2), (1, 3), (2, 3), all.
    "rows-differ": [("tp", "dp", "world")] * 2 + [("dp", "tp", "world")] * 2,
}


def run_in_turns(rank: int, nranks: int, orders: list[tuple[str, ...]], engine: str) -> list[str]:
    """Communicators made in an order, used in turns, closed in another one by each rank."""
    mesh = mesh_of()
    comms = {name: make(mesh, name, engine=engine) for name in orders[rank]}
    assert all(comm.engine == engine for comm in comms.values())
    results = []
    for turn in range(ROUNDS):
        for name in NAMES:
            comm = comms[name]
            assert comm.rank == MEMBERS[name][rank].index(rank)
            results.append(digest(run_case(comm, comm.rank, case_of(name, rank, turn))))
    for name in random.Random(rank).sample(NAMES, len(NAMES)):
        comms[name].close()
    return results


@pytest.mark.parametrize("engine", ["shm", "gloo"])
@pytest.mark.parametrize("order", ORDERS)
def test_dimensions_and_world_live_at_once(pool: Pools, order: str, engine: str) -> None:
    results = pool(4).run(run_in_turns, ORDERS[order], engine)
    assert results == [expected(rank) for rank in range(4)]


def run_in_any_order(rank: int, nranks: int, engine: str) -> list[str]:
    """Asynchronous calls: each rank begins with another communicator, and waits in an order of its own."""
    mesh = mesh_of()
    with ExitStack() as stack:
        comms = {name: stack.enter_context(make(mesh, name, engine=engine)) for name in NAMES}
        xs: dict[tuple[int, str], list[torch.Tensor]] = {}
        works = []
        dice = random.Random(rank)
        for name in dice.sample(NAMES, len(NAMES)):
            for turn in range(ROUNDS):
                case, comm = case_of(name, rank, turn), comms[name]
                xs[turn, name] = [tensor(x) for x in case.inputs(comm.rank)]
                works.append(comm.allreduce(xs[turn, name], case.op, **case.options, async_op=True))
        for work in dice.sample(works, len(works)):
            assert work.wait(20.0)
    return [digest(xs[turn, name]) for turn in range(ROUNDS) for name in NAMES]


@pytest.mark.parametrize("engine", ["shm", "gloo", "torch"])
def test_asynchronous_calls_on_different_communicators_may_come_in_any_order(pool: Pools, engine: str) -> None:
    assert pool(4).run(run_in_any_order, engine) == [expected(rank) for rank in range(4)]


def run_in_threads(rank: int, nranks: int, calls: int) -> list[list[str]]:
    """A thread for each communicator, calls that wait; threads of one rank are ahead of each other by chance."""
    with dpcomm.Communicator(timeout_s=20.0) as a, dpcomm.Communicator(timeout_s=20.0) as b:

        def work(comm: dpcomm.Communicator, seed: int) -> list[str]:
            dice, digests = random.Random(f"{rank} {seed}"), []
            for i in range(calls):
                time.sleep(dice.random() * 0.002)
                digests.append(digest(run_case(comm, rank, Case((1000,), seed=seed + i))))
            return digests

        return in_threads([lambda: work(a, 0), lambda: work(b, 1000)])


def test_a_communicator_for_each_thread_needs_no_common_order(pool: Pools) -> None:
    expected = [[digest(Case((1000,), seed=seed + i).expected(2)) for i in range(50)] for seed in (0, 1000)]
    assert pool(2).run(run_in_threads, 50) == [expected] * 2


# --- many ------------------------------------------------------------------------------------------------------------


def add_up(comms: list[tuple[dpcomm.Communicator, list[int]]], rank: int) -> None:
    for comm, members in comms:
        x = comm.allreduce(torch.full((1000,), float(1 << rank)))
        assert torch.equal(x, torch.full((1000,), float(sum(1 << m for m in members))))


def run_on_many(rank: int, nranks: int) -> tuple[int, int, int]:
    """Every set of ranks has two communicators, the whole four. Returns how many, descriptors before and after."""
    subsets = [list(some) for size in (2, 3) for some in itertools.combinations(range(nranks), size)] * 2
    groups = [dist.new_group(some) for some in subsets]
    before = len(list(DESCRIPTORS.iterdir()))
    todo = [(g, some) for g, some in zip(groups, subsets, strict=True) if rank in some]
    every: list[tuple[dist.ProcessGroup | None, list[int]]] = [*todo, *[(None, list(range(nranks)))] * 4]
    comms = [(dpcomm.Communicator(g, timeout_s=20.0), some) for g, some in every]
    add_up(comms, rank)
    dice, first = random.Random(rank), len(todo) // 2  # the first communicator of each smaller set goes
    for comm, _ in dice.sample(comms[:first], first):
        comm.close()
    left = comms[first:]
    add_up(left, rank)
    for comm, _ in dice.sample(left, len(left)):
        comm.close()
    return len(comms), before, len(list(DESCRIPTORS.iterdir()))


def test_many_live_at_once_and_close_in_any_order(pool: Pools) -> None:
    for many, before, after in pool(4).run(run_on_many):
        assert many == 16
        assert after <= before + 2  # what the process keeps: its watchdog


# --- any process group -----------------------------------------------------------------------------------------------


def run_on_local_groups(rank: int, nranks: int, engine: str) -> list[float]:
    """Groups that only their members make, before and after communicators of others."""

    def local(*members: int) -> Any:
        return dist.new_group(members, use_local_synchronization=True, timeout=timedelta(seconds=10))

    row = local(*MEMBERS["tp"][rank])
    with dpcomm.Communicator(row, engine=engine) as tp:
        column = local(*MEMBERS["dp"][rank])
        with dpcomm.Communicator(column, engine=engine) as dp, dpcomm.Communicator(engine=engine) as world:
            return [float(comm.allreduce(torch.tensor([float(1 << rank)]))) for comm in (world, dp, tp)]


@pytest.mark.parametrize("engine", ["shm", "gloo"])
def test_groups_that_only_their_members_make(engine: str) -> None:
    """In processes of their own: torch names such groups by how many each rank is in."""
    outcomes = fresh(4, run_on_local_groups, engine)
    for rank, outcome in enumerate(outcomes):
        assert outcome.error is None, outcome.error.trace
        assert outcome.value == [float(sum(1 << m for m in MEMBERS[name][rank])) for name in NAMES]


def make_groups_beside_engine_torch(rank: int, nranks: int) -> float:
    """Ranks 0 and 1 have a communicator of engine torch, with a group of its own, when ranks 1 and 2 make a group."""
    options: dict[str, Any] = {"use_local_synchronization": True, "timeout": timedelta(seconds=10)}
    group = dist.new_group([0, 1] if rank < 2 else [2], **options)
    with ExitStack() as stack:
        if rank < 2:
            pair = stack.enter_context(dpcomm.Communicator(group, engine="torch", timeout_s=20.0))
            assert pair.engine == "torch"
            assert float(pair.allreduce(torch.ones(1))) == 2.0
        if rank == 0:
            return 0.0
        other = dist.new_group([1, 2], **options)
        return float(dpcomm.allreduce(torch.tensor([float(1 << rank)]), group=other))


def test_engine_torch_does_not_change_the_names_of_other_groups() -> None:
    outcomes = fresh(3, make_groups_beside_engine_torch)
    for outcome in outcomes:
        assert outcome.error is None, outcome.error.trace
    assert [outcome.value for outcome in outcomes] == [0.0, 6.0, 6.0]


def call_with_meshes(rank: int, nranks: int) -> list[float]:
    """`dpcomm.allreduce` knows a dimension again, whatever object stands for it."""
    mesh = mesh_of()
    for name in ("dp", "tp"):
        comm = communicator_of(mesh[name])
        assert comm is communicator_of(mesh[name])
        assert comm is communicator_of(mesh.get_group(name))
    assert communicator_of(mesh["dp"]) is not communicator_of(mesh["tp"])
    assert dpcomm.allreduce([], group=mesh["dp"]) == []
    every = mesh._flatten("all")
    return [float(dpcomm.allreduce(torch.tensor([float(1 << rank)]), group=g)) for g in (every, mesh["dp"], mesh["tp"])]


def test_allreduce_takes_dimensions_of_a_mesh(pool: Pools) -> None:
    for rank, result in enumerate(pool(4).run(call_with_meshes)):
        assert result == [float(sum(1 << m for m in MEMBERS[name][rank])) for name in NAMES]


def train_over_a_dimension(rank: int, nranks: int, codec: str) -> None:
    """DDP of a column, given to DDP or to the hook, with calls of the row between forward and backward."""
    mesh = mesh_of()
    for given in ("ddp", "hook"):
        of_ddp: dict[str, Any] = (
            {"device_mesh": mesh["dp"]} if given == "ddp" else {"process_group": mesh.get_group("dp")}
        )
        ddp = DDP(Net(), bucket_cap_mb=SMALL_BUCKETS_MB, **of_ddp)
        of_hook = mesh["dp"] if given == "hook" else None
        state = dpcomm.register_ddp_hook(ddp, process_group=of_hook, codec=codec, timeout_s=20.0)
        recorder = Recorder(ddp, state)
        for step in range(3):
            ddp.zero_grad()
            assert float(dpcomm.allreduce(torch.ones(1), group=mesh["tp"])) == 2.0
            backward(ddp, step, rank)
            check_gradients(ddp, recorder, [step], MEMBERS["dp"][rank], codec)
        state.close()


@pytest.mark.parametrize("codec", ["none", "fp16"])
def test_ddp_averages_over_a_dimension(pool: Pools, codec: str) -> None:
    pool(4).run(train_over_a_dimension, codec)


# --- orders that cannot work -----------------------------------------------------------------------------------------


def make_crosswise(rank: int, nranks: int) -> tuple[list[Caught], list[float]]:
    """Rank 1 makes the pair's communicator first, the others that of all; then all in one order."""
    pair = dist.new_group([0, 1])
    order = [None, pair][:: -1 if rank == 1 else 1] if rank < 2 else [None]
    caught = []
    for step in range(2):
        if step < len(order):
            caught.append(catch(dpcomm.Communicator, order[step], timeout_s=TIMEOUT_S))
        dist.barrier()  # else whose time is up first meets one who still waits
    sums = []
    for group in (None, pair) if rank < 2 else (None,):
        with dpcomm.Communicator(group, timeout_s=10.0) as comm:
            sums.append(float(comm.allreduce(torch.ones(1))))
    return caught, sums


def test_overlapping_groups_made_in_another_order_time_out(pool: Pools) -> None:
    """Of equal groups see test_faults_construction.py: there the names differ, and nobody waits."""
    results = pool(3).run(make_crosswise)
    first = [caught[0] for caught, _ in results]
    for rank, missing in enumerate(([1], [0], [1])):
        check(first[rank], "CommTimeoutError", f"ranks {missing} did not reach stage 'hello'", "in the same order?")
    check_all(first, "CommTimeoutError", within_s=TIMEOUT_S + GRACE_S)
    assert [sums for _, sums in results] == [[3.0, 2.0], [3.0, 2.0], [3.0]]


def use_crosswise(rank: int, nranks: int, engine: str) -> list[Caught]:
    """Two communicators of the same ranks: the first call of rank 0 is on one, that of rank 1 on the other."""
    options: dict[str, Any] = {"engine": engine, "timeout_s": TIMEOUT_S}
    with dpcomm.Communicator(**options) as a, dpcomm.Communicator(**options) as b:
        # Control: asynchronous calls in opposite order end well.
        works = [comm.allreduce(torch.ones(1000), async_op=True) for comm in ((a, b) if rank == 0 else (b, a))]
        assert all(work.wait(10.0) for work in works)
        caught = [catch((a if rank == 0 else b).allreduce, torch.ones(1000))]
        dist.barrier()
        for comm in (a, b):
            check_poisoned(comm, "[TIMEOUT]")
        return caught


@pytest.mark.parametrize("engine", ["shm", "gloo"])
def test_two_communicators_used_in_opposite_order_time_out(pool: Pools, engine: str) -> None:
    caught = [one for (one,) in pool(2).run(use_crosswise, engine)]
    check_all(caught, "CommTimeoutError", within_s=TIMEOUT_S + GRACE_S)
    waited_in, begun = [], []  # the names of communicators
    for rank, one in enumerate(caught):
        assert one.failure.attributes["waiting_for"] == (1 - rank,)
        named = re.search(
            r"comm=(\w+) .*it has begun call 2 of communicator (\w+), which this rank has not made", one.text
        )
        assert named, one.text
        waited_in.append(named[1])
        begun.append(named[2])
    assert waited_in == begun[::-1]
    assert waited_in[0] != waited_in[1]


def come_late(rank: int, nranks: int) -> Caught | None:
    """As above, but rank 1 makes no call at all."""
    with dpcomm.Communicator(timeout_s=TIMEOUT_S) as a, dpcomm.Communicator(timeout_s=TIMEOUT_S) as b:
        for comm in (a, b):
            comm.allreduce(torch.ones(3))
        caught = catch(a.allreduce, torch.ones(1000)) if rank == 0 else None
        dist.barrier()
        return caught


def test_a_rank_that_is_late_is_not_said_to_be_elsewhere(pool: Pools) -> None:
    """Control of the last test."""
    caught = pool(2).run(come_late)[0]
    assert caught is not None
    check(caught, "CommTimeoutError", "waiting for rank 1")
    assert "has begun" not in caught.text


CIRCLE = {0: ("tp", "dp"), 1: ("dp", "tp"), 3: ("tp", "dp"), 2: ("dp", "tp")}  # 0 waits for 1 for 3 for 2 for 0


def use_in_a_circle(rank: int, nranks: int) -> tuple[list[float], Caught]:
    """No two ranks share two communicators, and yet all wait for each other."""
    mesh = mesh_of()
    with make(mesh, "dp", timeout_s=TIMEOUT_S) as dp, make(mesh, "tp", timeout_s=TIMEOUT_S) as tp:
        comms = {"dp": dp, "tp": tp}
        works = [comms[name].allreduce(torch.ones(1), async_op=True) for name in CIRCLE[rank]]  # control
        assert all(work.wait(10.0) for work in works)
        sums = [float(comms[name].allreduce(torch.ones(1))) for name in ("tp", "dp")]  # control
        caught = catch(comms[CIRCLE[rank][0]].allreduce, torch.ones(1))
        dist.barrier()
        return sums, caught


def test_a_circle_of_calls_times_out_on_all_ranks(pool: Pools) -> None:
    results = pool(4).run(use_in_a_circle)
    assert [sums for sums, _ in results] == [[2.0, 2.0]] * 4
    check_all([caught for _, caught in results], "CommTimeoutError", within_s=TIMEOUT_S + GRACE_S)
    for rank, (_, caught) in enumerate(results):  # the other one of this pair, which is in its other pair
        assert caught.failure.attributes["waiting_for"] == (1 - MEMBERS[CIRCLE[rank][0]][rank].index(rank),)


# --- meshes that cannot work -----------------------------------------------------------------------------------------


def give_odd_meshes(rank: int, nranks: int) -> dict[str, Caught]:
    cpu, cuda = mesh_of(), mesh_of("cuda")
    rows = [DeviceMesh("cpu", row) for row in ([0, 1], [2, 3])]
    ddp = DDP(Net(), device_mesh=cpu["dp"])
    make = dpcomm.Communicator
    return {
        "named": catch(make, cpu),
        "unnamed": catch(make, DeviceMesh("cpu", [[0, 1], [2, 3]])),
        "of others": catch(make, rows[1 - rank // 2]),
        "without groups": catch(make, DeviceMesh("cpu", list(range(nranks)), _init_backend=False, _rank=rank)),
        "cpu": catch(make, cpu["dp"], device="cuda:0"),
        "cpu, an ordinal": catch(make, cpu["dp"], device=0),
        "cuda": catch(make, cuda["dp"], device=torch.device("cpu")),
        "cuda, an engine of CPUs": catch(make, cuda["dp"], engine="shm"),
        "xpu": catch(make, mesh_of("xpu")["tp"]),
        "no device": catch(make, cpu["dp"], device="banana"),
        "a mesh and a rank": catch(make, cpu["dp"], rank=0),
        "cpu tensor": catch(dpcomm.allreduce, torch.ones(3), group=cuda["dp"]),
        "call on two dimensions": catch(dpcomm.allreduce, torch.ones(3), group=cpu),
        "hook": catch(dpcomm.HookState, cuda["dp"], device="cpu"),
        "model": catch(dpcomm.register_ddp_hook, ddp, process_group=cuda["dp"]),
    }


ODD_MESHES = {
    "named": ("ArgumentError", "a DeviceMesh of 2 dimensions ('dp', 'tp')", "such as mesh['dp']"),
    "unnamed": ("ArgumentError", "a DeviceMesh of 2 dimensions stands", "such as mesh.get_group(0)"),
    "of others": ("ArgumentError", "this rank is not in DeviceMesh("),
    "without groups": ("ArgumentError", "has no process group"),
    "cpu": ("ArgumentError", "device='cuda:0'", "of device type 'cpu'"),
    "cpu, an ordinal": ("ArgumentError", "device=0", "of device type 'cpu'"),
    "cuda": ("ArgumentError", "device='cpu'", "of device type 'cuda'"),
    "cuda, an engine of CPUs": ("ArgumentError", "engine='shm'", "device='cuda'"),
    "xpu": ("UnsupportedError", "device='xpu'", "CPUs and CUDA devices"),
    "no device": ("ArgumentError", "device='banana' is not a device"),
    "a mesh and a rank": ("ArgumentError", "either a process group, or rank"),
    "cpu tensor": ("ArgumentError", "device='cpu'", "of device type 'cuda'"),
    "call on two dimensions": ("ArgumentError", "a DeviceMesh of 2 dimensions"),
    "hook": ("ArgumentError", "device='cpu'", "of device type 'cuda'"),
    "model": ("ArgumentError", "device='cpu'", "of device type 'cuda'"),
}


def test_a_mesh_that_cannot_work_is_refused_in_words(pool: Pools) -> None:
    for caught in pool(4).run(give_odd_meshes):
        assert caught.keys() == ODD_MESHES.keys()
        for what, (name, *fragments) in ODD_MESHES.items():
            check(caught[what], name, *fragments, within_s=GRACE_S)


def give_one_wrong_device(rank: int, nranks: int) -> Caught | float:
    column = mesh_of()["dp"]
    options: dict[str, Any] = {"device": "cuda" if rank == 1 else "cpu", "timeout_s": 10.0}
    if rank in (1, 3):
        return catch(dpcomm.Communicator, column, **options)
    with dpcomm.Communicator(column, **options) as comm:
        return float(comm.allreduce(torch.ones(1)))


def test_a_mesh_of_the_wrong_device_type_is_refused_on_all_ranks(pool: Pools) -> None:
    """Rank 1 names another device than the mesh's; rank 3, in its column, hears of it. The other column is at work."""
    a, b, c, d = pool(4).run(give_one_wrong_device)
    check_all([b, d], "ArgumentError", "device='cuda'", "of device type 'cpu'", within_s=GRACE_S)
    assert (a, c) == (2.0, 2.0)


def take_the_meshs_device(rank: int, nranks: int) -> tuple[str, str]:
    """Which device a communicator is for when only the mesh says it; where there is no GPU, why it cannot be."""

    def device_of(kind: str) -> str:
        try:
            with make(mesh_of(kind), "dp") as comm:
                return comm.device.type
        except dpcomm.ArgumentError as error:
            return str(error)

    return device_of("cpu"), device_of("cuda")


def test_a_mesh_says_the_device(pool: Pools) -> None:
    reason = dpcomm._native.cuda_reason()
    for cpu, cuda in pool(4).run(take_the_meshs_device):
        assert cpu == "cpu"
        assert f"device='cuda': CUDA not available: {reason}" in cuda if reason else cuda == "cuda"
