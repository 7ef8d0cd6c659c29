"""Engine two_level, several hosts with several ranks on some: the reference's bits, however ranks are spread.

Hosts are network namespaces: six ranks are placed on three in two ways, and subgroups of them make the other shapes.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import cases
import numpy as np
import pytest
import reference
import torch
import torch.distributed as dist
from cases import Array, Case, digest, run_case, tensor
from faulty import Caught, catch, check, check_all
from heard import heard
from networks import Hosts, across, network
from ranks import Pool
from training import SMALL_BUCKETS_MB, Net, backward, check_gradients, hooked, parameters, sgd

import dpcomm

Pools = Callable[[int], Pool]
HostsOfRanks = tuple[tuple[int, ...], ...]
MIB = 1 << 20

# Of the six ranks, on which host each is.
EVEN, MIXED = (0, 0, 1, 1, 2, 2), (2, 2, 1, 2, 1, 0)
# Where, and which of the six make the group. Ranks below are of the group.
SHAPES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "2x2": (EVEN, (0, 1, 2, 3)),  # [0, 1], [2, 3]
    "3x2": (EVEN, (0, 1, 2, 3, 4, 5)),  # [0, 1], [2, 3], [4, 5]
    "1+2": (EVEN, (0, 2, 3)),  # [0], [1, 2]
    "3+1": (MIXED, (0, 1, 3, 5)),  # [0, 1, 2], [3]
    "3+2+1": (MIXED, (0, 1, 2, 3, 4, 5)),  # [0, 1, 3], [2, 4], [5]
    "interleaved": (MIXED, (1, 2, 3, 4)),  # [0, 2], [1, 3]
}
shapes = pytest.mark.parametrize("shape", SHAPES)
intra_codecs = pytest.mark.parametrize("intra_codec", ["none", "fp16"], ids=["plain", "fp16-inside"])

KINDS = [
    (dtype, op, codec)
    for codec, dtypes in [("none", cases.DTYPES), ("fp16", cases.ENCODED)]
    for dtype in dtypes
    for op in cases.operations(dtype, codec)
]
BOTH_LEVELS, FLAT = ("two_level", "auto"), ("direct", "oneshot", "ring")
CASES = (
    [
        Case((1021, 0, 1, 257), dtype, op, codec, algorithm, special=dtype in cases.FLOATS)
        for dtype, op, codec in KINDS
        for algorithm in BOTH_LEVELS
    ]
    + [
        Case((size,), op="mean", codec=codec, algorithm="two_level", special=True)
        for codec in ("none", "fp16")
        for size in (0, 1, 2, 255, 256, 257, 1021, 32_768)
    ]
    + [
        Case((100_003,), dtype, "mean", codec, "two_level", special=True)
        for dtype, codec in [("float32", "fp16"), ("bfloat16", "fp16"), ("float16", "none"), ("float64", "none")]
    ]
    + [
        Case(counts, codec=codec, op="mean", special=True)
        for counts in [(300, 0, 7, 1021), (40_000, 1, 256, 33_000), (3,) * 200]
        for codec in ("none", "fp16")
    ]
)
LARGE = [Case((MIB + 3,), codec=codec) for codec in ("none", "fp16")]  # several slices, each of several messages
FLAT_CASES = [
    Case((1021, 0, 1, 257), dtype, op, codec, algorithm, special=True)
    for dtype, op, codec in KINDS
    if dtype in ("float32", "bfloat16")
    for algorithm in FLAT
] + [Case((100_003,), op="mean", codec=codec, algorithm=a, special=True) for codec in ("none", "fp16") for a in FLAT]
MANY = [Case((n,), codec=c, seed=n) for n in (5, 300_001, 1, 70_000) for c in ("none", "fp16")]


@pytest.fixture(scope="module")
def net() -> Iterator[Hosts]:
    with network(3) as made:
        yield made


def hosts_of(shape: str) -> list[list[int]]:
    """The ranks of each host, as ranks of the group; hosts by their lowest rank."""
    places, members = SHAPES[shape]
    where = [places[member] for member in members]
    return [[rank for rank, host in enumerate(where) if host == one] for one in dict.fromkeys(where)]


def on(net: Hosts, shape: str, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Calls function(comm's rank, members, hosts, *args) on the ranks of the shape; returns their results."""
    places, members = SHAPES[shape]
    results = across(net, *places).run(among, function, members, hosts_of(shape), *args)
    return [results[member] for member in members]


def among(
    rank: int,
    nranks: int,
    function: Callable[..., Any],
    members: tuple[int, ...],
    hosts: list[list[int]],
    *args: Any,
) -> Any:
    group = dist.new_group(list(members)) if len(members) < nranks else dist.group.WORLD
    return function(members.index(rank), group, hosts, *args) if rank in members else None


@contextmanager
def two_level(group: Any, hosts: list[list[int]], **options: Any) -> Iterator[dpcomm.Communicator]:
    """Chosen by auto."""
    with dpcomm.Communicator(group, timeout_s=20.0, **options) as comm:
        assert comm.engine == comm.describe()["engine"] == "two_level"
        assert comm.describe()["hosts"] == hosts
        yield comm


@cache
def expected(case: Case, hosts: HostsOfRanks, intra_codec: str) -> str:
    return digest(case.expected_between(hosts, intra_codec))


def check_digests(results: list[list[str]], todo: Sequence[Case], shape: str, intra_codec: str = "none") -> None:
    """One digest a rank and case."""
    hosts = tuple(map(tuple, hosts_of(shape)))
    assert {len(digests) for digests in results} == {len(todo)}
    for i, case in enumerate(todo):
        found = {digests[i] for digests in results}
        assert len(found) == 1, f"replicas differ: {case}"
        assert found == {expected(case, hosts, intra_codec)}, case


# --- bits ------------------------------------------------------------------------------------------------------------


def run_cases(
    rank: int, group: Any, hosts: list[list[int]], todo: list[Case], intra_codec: str, flip: bool = False
) -> list[str]:
    """`flip` plants a wrong bit on rank 0."""
    digests = []
    with two_level(group, hosts, intra_codec=intra_codec) as comm:
        for case in todo:
            xs = run_case(comm, rank, case)
            if flip and rank == 0:
                xs[0].view(torch.uint8)[0] ^= 1
            digests.append(digest(xs))
    return digests


@pytest.mark.timeout(150)  # the first of a placement starts six processes
@intra_codecs
@shapes
def test_bits_of_two_levels_equal_the_reference(net: Hosts, shape: str, intra_codec: str) -> None:
    large = LARGE if shape in ("2x2", "3+2+1") else LARGE[:1] if intra_codec == "fp16" else []
    todo = CASES + large
    check_digests(on(net, shape, run_cases, todo, intra_codec), todo, shape, intra_codec)


def run_with_little_memory(rank: int, group: Any, hosts: list[list[int]], todo: list[Case]) -> list[str]:
    with mock.patch.dict(os.environ, DPCOMM_ARENA_MB="4"):
        return run_cases(rank, group, hosts, todo, "fp16")


SMALL_SLOTS = [Case((100_003, 9), codec=codec, special=True) for codec in ("none", "fp16")]


@pytest.mark.parametrize("shape", ["3+1", "3+2+1"])
def test_small_slots_give_the_same_bits(net: Hosts, shape: str) -> None:
    """Slots of 20 and 32 KiB: each shard in many slices, and these in many messages inside a host."""
    check_digests(on(net, shape, run_with_little_memory, SMALL_SLOTS), SMALL_SLOTS, shape, "fp16")


@pytest.mark.parametrize("shape", ["3+1", "interleaved"])
def test_flat_algorithms_keep_their_classes_on_engine_two_level(net: Hosts, shape: str) -> None:
    check_digests(on(net, shape, run_cases, FLAT_CASES, "fp16"), FLAT_CASES, shape)


def test_a_flipped_bit_of_two_levels_shows_in_the_hashes(net: Hosts) -> None:
    case = Case((1000,))
    bad, *good = on(net, "2x2", run_cases, [case], "none", True)
    check_digests(good, [case], "2x2")
    assert bad != good[0]


def test_classes_of_these_shapes_are_different_bits() -> None:
    """Control: a comparison with the wrong class, or the wrong hosts, would fail."""
    case = Case((1000,), codec="fp16")
    hosts = {tuple(map(tuple, hosts_of(shape))) for shape in SHAPES}
    assert len(hosts) == len(SHAPES)
    for intra_codec in ("none", "fp16"):
        of_four = [expected(case, h, intra_codec) for h in hosts if sum(map(len, h)) == 4]
        assert len({*of_four, digest(case.expected(4))}) == 4
    two_by_two = ((0, 1), (2, 3))
    for algorithm in BOTH_LEVELS:  # auto takes two levels with bfloat16, too
        short = Case((1000,), "bfloat16", algorithm=algorithm)
        assert expected(short, two_by_two, "none") != digest(short.expected(4))
    assert expected(case, two_by_two, "none") != expected(case, two_by_two, "fp16")


def run_mixed(rank: int, group: Any, hosts: list[list[int]], codec: str, dtypes: Sequence[str]) -> list[str]:
    """One list with tensors of all dtypes, three sizes of each, in turns; one digest a dtype."""
    made = {dtype: [tensor(x) for x in mixed_case(dtype, codec).inputs(rank)] for dtype in dtypes}
    with two_level(group, hosts, codec=codec) as comm:
        comm.allreduce([x for same in zip(*made.values(), strict=True) for x in same], "sum")
    return [digest(made[dtype]) for dtype in dtypes]


def mixed_case(dtype: str, codec: str) -> Case:
    return Case((1021, 1, 70_001), dtype, codec=codec, special=dtype in cases.FLOATS)


@pytest.mark.parametrize(("codec", "dtypes"), [("none", cases.DTYPES), ("fp16", cases.ENCODED)], ids=["none", "fp16"])
def test_lists_of_several_dtypes_over_two_levels(net: Hosts, codec: str, dtypes: Sequence[str]) -> None:
    results = on(net, "3+2+1", run_mixed, codec, dtypes)
    check_digests(results, [mixed_case(dtype, codec) for dtype in dtypes], "3+2+1")


def run_complex(rank: int, group: Any, hosts: list[list[int]], algorithm: str) -> list[str]:
    """Complex tensors, one of them lazily conjugated, as pairs of real numbers."""
    with two_level(group, hosts, algorithm=algorithm) as comm:
        x = torch.view_as_complex(tensor(COMPLEX.inputs(rank)[0]).view(-1, 2))
        y = x.clone()
        y.imag.neg_()
        comm.allreduce([x, y.conj()], "mean")
        return [digest([torch.view_as_real(z).flatten()]) for z in (x, y.conj().resolve_conj())]


COMPLEX = Case((70_002,), op="mean", algorithm="two_level")


def test_complex_numbers_go_by_parts_over_two_levels(net: Hosts) -> None:
    for algorithm in BOTH_LEVELS:
        check_digests(on(net, "3+1", run_complex, algorithm), [COMPLEX] * 2, "3+1")


def run_without_wait(rank: int, group: Any, hosts: list[list[int]], todo: list[Case]) -> list[str]:
    """All asynchronous, the last one synchronous: it runs behind them."""
    xs = [[tensor(x) for x in case.inputs(rank)] for case in todo]
    *before, (last_x, last) = zip(xs, todo, strict=True)
    with two_level(group, hosts) as comm:
        works = [comm.allreduce(x, case.op, **case.options, async_op=True) for x, case in before]
        comm.allreduce(last_x, last.op, **last.options)
        assert all(work.is_completed() for work in works)
        assert all(work.wait() for work in works)
    return [digest(x) for x in xs]


@pytest.mark.parametrize("shape", ["2x2", "3+2+1"])
def test_async_calls_over_two_levels_give_the_same_bits_in_their_order(net: Hosts, shape: str) -> None:
    check_digests(on(net, shape, run_without_wait, MANY), MANY, shape)


def run_means_of_large_halves(rank: int, group: Any, hosts: list[list[int]]) -> list[float]:
    """60000 on every rank, with the algorithms of BOTH_LEVELS; and the maximum, as auto takes it."""
    with two_level(group, hosts) as comm:
        x = torch.full((300,), 60_000.0, dtype=torch.float16)
        means = [float(comm.allreduce(x.clone(), "mean", algorithm=each)[299]) for each in BOTH_LEVELS]
        comm.stats(reset=True)
        comm.allreduce(torch.ones(1 << 16, dtype=torch.float16), "max")
        return [*means, comm.stats()["wire_bytes"]]


def test_means_of_float16_do_not_overflow_inside_hosts(net: Hosts) -> None:
    """Unless two levels are asked for. Maxima have nothing to overflow and go over two: half a tensor of 128 KiB is
    this rank's, half of that goes to the other host, and as much of the result."""
    assert on(net, "2x2", run_means_of_large_halves) == [[math.inf, 60_000.0, 1 << 16]] * 4


def run_native(rank: int, group: Any, hosts: list[list[int]]) -> list[float]:
    with two_level(group, hosts) as comm:
        x = comm.allreduce(torch.full((300,), rank + 1.0), algorithm="native")
        caught = catch(comm.allreduce, torch.ones(3), codec="fp16", algorithm="native")
        check(caught, "UnsupportedError", "algorithm='native'", "'two_level'", "fp16")
        return [
            *x[[0, -1]].tolist(),
            *comm.allreduce(torch.full((3,), 2.0 * rank), "mean", algorithm="native").tolist(),
        ]


def test_gloo_adds_on_request_on_engine_two_level(net: Hosts) -> None:
    assert on(net, "3+1", run_native) == [[10.0, 10.0, 3.0, 3.0, 3.0]] * 4


# --- what is not finite ----------------------------------------------------------------------------------------------


def run_non_finite(rank: int, group: Any, hosts: list[list[int]], nranks: int) -> list[tuple[str, float]]:
    """Rank r has one NaN and one infinity, in groups of its own; what each call leaves of them, and groups counted."""
    found = []
    with two_level(group, hosts) as comm:
        for op, codec in (("sum", "none"), ("mean", "none"), ("max", "none"), ("sum", "fp16"), ("mean", "fp16")):
            x = torch.ones(nranks, 512)
            comm.stats(reset=True)
            comm.allreduce(x, op, codec=codec)
            assert comm.stats()["nonfinite_groups"] == 0
            x = torch.ones(nranks, 512)
            x[rank, 7], x[rank, 300] = float("nan"), float("inf")
            comm.allreduce(x, op, codec=codec)
            assert bool(torch.isnan(x[:, 7]).all())
            assert bool(torch.isposinf(x[:, 300]).all())
            x[:, 7] = x[:, 300] = x[0, 0]
            assert bool((x == x[0, 0]).all()), (op, codec)
            assert torch.isfinite(x[0, 0])
            found.append((codec, comm.stats()["nonfinite_groups"]))
    return found


@pytest.mark.parametrize("shape", ["2x2", "3+2+1"])
def test_what_is_not_finite_on_one_rank_arrives_on_all(net: Hosts, shape: str) -> None:
    """Counted where it is encoded: each group by the host that has it, and as a result, so twice at least."""
    nranks = len(SHAPES[shape][1])
    for per_rank in zip(*on(net, shape, run_non_finite, nranks), strict=True):
        codec, counted = per_rank[0][0], sum(count for _, count in per_rank)
        assert counted == 0 if codec == "none" else counted >= 2 * 2 * nranks


# --- the hook --------------------------------------------------------------------------------------------------------


def train(rank: int, group: Any, hosts: list[list[int]], codec: str) -> tuple[str, str]:
    """Each step's gradients are the reference's; says which engine it was, and what the parameters are."""
    ddp, recorder = hooked(Net(), codec, bucket_cap_mb=SMALL_BUCKETS_MB, process_group=group)
    optimizer = sgd(ddp)
    taken = partial(reference.allreduce, bit_class="two_level", hosts=hosts)
    with mock.patch.object(reference, "allreduce", taken):
        for step in range(4):
            optimizer.zero_grad()
            backward(ddp, step, rank)
            check_gradients(ddp, recorder, [step], range(dist.get_world_size(group)), codec)
            optimizer.step()
    assert recorder.state.comm is not None
    return recorder.state.comm.engine, digest(parameters(ddp))


@pytest.mark.parametrize("codec", ["none", "fp16"])
def test_the_hook_over_two_levels_gives_the_references_gradients(net: Hosts, codec: str) -> None:
    results = on(net, "2x2", train, codec)
    assert {engine for engine, _ in results} == {"two_level"}
    assert len({parameters for _, parameters in results}) == 1


# --- which engine ----------------------------------------------------------------------------------------------------


def describe(
    rank: int, group: Any, hosts: list[list[int]], options: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """What a communicator says of itself, and what it logs while it is made."""
    with heard(logging.INFO) as said, two_level(group, hosts, **options) as comm:
        return comm.describe(), said


def test_auto_takes_two_levels_and_says_why(net: Hosts) -> None:
    results = on(net, "2x2", describe, {})
    for about, _ in results:
        assert about["intra_codec"] == "none"
        assert about["bit_classes"] == [
            {"from_elems": 1, "algorithm": "two_level", "bit_class": "two_level([[0, 1], [2, 3]])"}
        ]
        for words in ("no shared memory", "ranks [0, 1] on ", "ranks [2, 3] on "):
            assert words in about["why"]
    (line,) = [line for _, said in results for line in said]  # one rank speaks for all
    places = r"\(.*: ranks 0 1; .*: ranks 2 3\)"
    assert re.match(rf"communicator #\d+ of 4 ranks: engine two_level between 2 hosts {places}: no shared memory", line)
    assert "gloo is for hosts with one rank each" in line


@pytest.mark.parametrize(
    ("options", "bit_class"),
    [
        ({"engine": "two_level", "intra_codec": "fp16", "codec": "fp16"}, "two_level([[0, 2], [1, 3]])"),
        ({"algorithm": "two_level"}, "two_level([[0, 2], [1, 3]])"),
        ({"engine": "two_level", "algorithm": "direct"}, "rank_order"),
        ({"engine": "two_level", "algorithm": "ring"}, "ring"),
        ({"engine": "two_level", "algorithm": "native"}, "native"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_engine_two_level_says_what_it_was_asked_for(net: Hosts, options: dict[str, Any], bit_class: str) -> None:
    for about, _ in on(net, "interleaved", describe, options):
        assert about["intra_codec"] == options.get("intra_codec", "none")
        assert {row["bit_class"] for row in about["bit_classes"]} == {bit_class}
        assert about["why"] == ("asked for" if "engine" in options else "algorithm two_level")


def engine_of(rank: int, nranks: int, members: list[int]) -> str | None:
    group = dist.new_group(members)
    if rank not in members:
        return None
    with dpcomm.Communicator(group, timeout_s=20.0) as comm:
        return comm.engine


def test_auto_takes_two_levels_only_where_there_are_two(net: Hosts) -> None:
    run = across(net, *EVEN).run
    assert run(engine_of, [2, 3]) == [None, None, "shm", "shm", None, None]
    assert run(engine_of, [0, 2, 4]) == ["gloo", None] * 3
    assert run(engine_of, [0, 4, 5]) == ["two_level", None, None, None, "two_level", "two_level"]


def refuse(rank: int, nranks: int, members: list[int], options: list[dict[str, Any]]) -> list[Caught]:
    group = dist.new_group(members)
    if rank not in members:
        return []
    return [catch(dpcomm.Communicator, group, timeout_s=10.0, **one) for one in options]


ASKED = [{"engine": "two_level"}, {"algorithm": "two_level"}]


def check_refused(results: list[list[Caught]], *words: str) -> None:
    for caught in zip(*filter(None, results), strict=True):
        check_all(caught, "UnsupportedError", "two levels", *words, within_s=5.0)


def test_engine_two_level_is_refused_where_all_ranks_share_a_host(pool: Pools) -> None:
    check_refused(pool(2).run(refuse, [0, 1], ASKED), "all ranks share one", "engine='auto'")


def test_engine_two_level_is_refused_where_no_ranks_share_a_host(net: Hosts) -> None:
    results = across(net, *EVEN).run(refuse, [0, 2, 4], ASKED)
    check_refused(results, "3 ranks", "a host each", "network namespace", "engine='auto'")


def refuse_calls(rank: int, nranks: int, engine: str) -> list[float]:
    """A refused call sends nothing: the next one is served."""
    with dpcomm.Communicator(engine=engine, timeout_s=20.0) as comm:
        assert comm.engine == engine
        caught = catch(comm.allreduce, torch.ones(3), algorithm="two_level")
        check(caught, "UnsupportedError", "algorithm='two_level'", f"engine={engine!r}", within_s=5.0)
        return list(comm.allreduce(torch.ones(2)).tolist())


@pytest.mark.parametrize("engine", ["shm", "gloo", "torch"])
def test_other_engines_refuse_algorithm_two_level(pool: Pools, engine: str) -> None:
    assert pool(2).run(refuse_calls, engine) == [[2.0, 2.0]] * 2
    wanted = {"engine": engine, "algorithm": "two_level"}
    check_refused(pool(2).run(refuse, [0, 1], [wanted]), f"engine={engine!r}")


def refuse_intra_codecs(rank: int, nranks: int) -> list[Caught]:
    wanted = [
        {"intra_codec": "bf16"},
        {"intra_codec": "fp16", "engine": "gloo"},
        {"intra_codec": ("none", "fp16")[rank]},
    ]
    return [catch(dpcomm.Communicator, timeout_s=10.0, **one) for one in wanted]


def test_codecs_inside_hosts_that_cannot_be_are_refused(pool: Pools) -> None:
    unknown, elsewhere, different = zip(*pool(2).run(refuse_intra_codecs), strict=True)
    check_all(unknown, "ArgumentError", "intra_codec 'bf16'", "none, fp16", within_s=5.0)
    check_all(elsewhere, "ArgumentError", "intra_codec='fp16'", "'gloo'", "'two_level'", within_s=5.0)
    check_all(different, "MismatchError", "intra_codec", "'none'", "'fp16'", within_s=5.0)


def one_rank(rank: int, nranks: int) -> list[float]:
    with dpcomm.Communicator(rank=0, nranks=1, engine="two_level", intra_codec="fp16") as comm:
        return list(comm.allreduce(torch.tensor([1e-3, 5.0]), "mean", codec="fp16").tolist())


def test_one_rank_of_engine_two_level_is_the_identity(pool: Pools) -> None:
    assert pool(2).run(one_rank) == [torch.tensor([1e-3, 5.0]).tolist()] * 2


# --- what leaves the host --------------------------------------------------------------------------------------------


def sent(interface: str) -> int:
    """Bytes that this host has sent there."""
    for line in Path("/proc/thread-self/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == interface:
            return int(numbers.split()[8])
    raise AssertionError(f"no interface {interface}")


def count(rank: int, group: Any, hosts: list[list[int]], calls: list[tuple[str, str]]) -> list[tuple[float, int, int]]:
    """Of each call wire_bytes, and what the host sent to others and to itself."""
    counted = []
    with two_level(group, hosts) as comm:
        for codec, algorithm in calls:
            x = torch.ones(4 * MIB)
            comm.stats(reset=True)
            dist.barrier(group)
            before = [sent(interface) for interface in ("eth0", "lo")]
            dist.barrier(group)
            comm.allreduce(x, codec=codec, algorithm=algorithm)
            dist.barrier(group)
            out, inside = (sent(name) - b for name, b in zip(("eth0", "lo"), before, strict=True))
            counted.append((comm.stats()["wire_bytes"], out, inside))
    return counted


@pytest.mark.parametrize("shape", ["2x2", "3+2+1"])
def test_wire_bytes_are_those_that_go_to_other_hosts(net: Hosts, shape: str) -> None:
    """16 MiB. Of H hosts each sends what it has of the others' chunks, and the result of its own to H - 1 others:
    2 (H - 1) / H of the bucket. Headers of packets are 5 % at most."""
    hosts = hosts_of(shape)
    plain, half, flat = zip(
        *on(net, shape, count, [("none", "auto"), ("fp16", "auto"), ("none", "direct")]), strict=True
    )
    of_a_host = 16 * MIB * 2 * (len(hosts) - 1) / len(hosts)
    for figures, bytes_of_a_host in ((plain, of_a_host), (half, of_a_host * 513 / 1024)):
        for ranks in hosts:
            wire = sum(figures[rank][0] for rank in ranks)
            assert wire == pytest.approx(bytes_of_a_host, rel=0.001)
            for rank in ranks:
                assert wire < figures[rank][1] < 1.1 * wire
                assert figures[rank][2] < 0.05 * wire  # what a host's ranks tell each other goes through memory
    several = max(hosts, key=len)
    assert flat[several[0]][2] > MIB  # control: flat algorithms send inside the host, too
    assert flat[several[0]][1] > 1.3 * plain[several[0]][1]


def test_each_ranks_part_is_a_share_of_what_the_largest_host_has_ranks(net: Hosts) -> None:
    """Three shards: one for each rank of the large host, all of them for the rank of the small one."""
    results = on(net, "3+1", count, [("none", "auto")])
    assert [wire / (16 * MIB) for [(wire, _, _)] in results] == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1], rel=0.001)


def run_odd_memory(rank: int, group: Any, hosts: list[list[int]]) -> list[str]:
    """Memory at odd offsets, strided, of NumPy: where the bytes lie changes none."""
    (x,) = ODD.inputs(rank)
    shifted = torch.empty(ODD.counts[0] + 3)[3:]
    shifted.copy_(tensor(x))
    spread = torch.empty(ODD.counts[0], 3)[:, 1]
    spread.copy_(tensor(x))
    own: Array = np.array(x)
    with two_level(group, hosts, codec="fp16") as comm:
        return [digest([comm.allreduce(y, "mean")]) for y in (shifted, spread, own)]


ODD = Case((70_001,), op="mean", codec="fp16", special=True)


def test_memory_of_any_kind_gives_the_same_bits_over_two_levels(net: Hosts) -> None:
    check_digests(on(net, "1+2", run_odd_memory), [ODD] * 3, "1+2")


def test_cases_cover_what_engine_two_level_serves() -> None:
    """A dtype, operation, codec or algorithm that is added later must come here, too."""
    native = dpcomm._native
    assert {case.dtype for case in CASES} == set(native.DTYPES)
    assert {case.op for case in CASES} == set(native.OPS)
    assert {case.codec for case in CASES} == set(native.CODECS) - {"bf16"}  # of engine nccl only
    assert {case.algorithm for case in CASES + FLAT_CASES} == set(native.ALGORITHMS) - {"native"}  # run_native
