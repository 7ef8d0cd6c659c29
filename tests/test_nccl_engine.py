"""Engine nccl where all goes well, through Python, on the stand-ins: bits, lists, asynchronous calls, what it says.

tests/cpp/test_nccl.cpp has streams, graphs, launches and bytes; tests/test_nccl_faults.py has what goes wrong.
"""

from __future__ import annotations

import logging
import re
from typing import Any

import cases
import nccl_threads
import numpy as np
import pytest
import stand_in
from cases import Case, digest
from faulty import catch, check
from heard import heard
from nccl_threads import LONG_S, Member, Process, count, good, nccl_process, ranks, together

import dpcomm
from dpcomm import _native, nccl_library

__all__ = ["nccl_process"]  # the fixture `nccl`
pytestmark = nccl_threads.marks

RANKS = (2, 3, 8)
SMALL = (0, 1, 255, 256, 257, 7001)
LARGE = (1 << 18) + 3  # several slices of several messages
# The stand-in runtime plays these codings.
FLOATS = [(codec, a) for codec in ("none", "fp16") for a in cases.ALGORITHMS if (codec, a) != ("none", "auto")]
CASES = (
    [Case((n,), op=op, codec=c, algorithm=a, special=True) for c, a in FLOATS for op in ("sum", "mean") for n in SMALL]
    + [Case((LARGE,), op=("sum", "mean")[i % 2], codec=c, algorithm=a) for i, (c, a) in enumerate(FLOATS)]
    + [Case((1021,), "int32", op, algorithm=a) for a in cases.ALGORITHMS for op in ("sum", "min", "max")]
    # NaN wins, whichever rank has it; NCCL's own minima and maxima would lose it.
    + [Case((n,), op=op, algorithm=a, special=True) for a in cases.ALGORITHMS for op in ("min", "max") for n in SMALL]
    + [Case((300, 0, 7, 1021), op="mean", codec=c, algorithm=a, special=True) for c, a in FLOATS]
    + [Case((7, 40) * 60, codec=c, algorithm="direct") for c in ("none", "fp16")]
)
SIXTEEN = ("fp16", "bf16")
# The stand-in adds in rank order, as the reference of class native does; NCCL may choose another.
NATIVE = (
    [
        Case((n,), dtype, op, codec, "native", special=True)
        for dtype, codec in (("float32", "fp16"), ("float32", "bf16"), ("float16", "bf16"), ("float16", "fp16"))
        for op in ("sum", "mean")
        for n in SMALL
    ]
    + [Case((LARGE,), op=op, codec=codec, algorithm="native") for op in ("sum", "mean") for codec in SIXTEEN]
    + [Case((300, 0, 7, 1021), op="mean", codec=codec, algorithm="native", special=True) for codec in SIXTEEN]
    + [Case((7, 40) * 60, codec=codec, algorithm="native") for codec in SIXTEEN]
)


def run_on(member: Member, todo: list[Case]) -> list[str]:
    """One digest a case; all are on their way at once."""
    started = []
    for case in todo:
        xs = [member.array(x) for x in case.inputs(member.rank)]
        started.append(
            (xs, member.comm.allreduce(xs if len(xs) > 1 else xs[0], case.op, **case.options, async_op=True))
        )
    assert all(work.wait(LONG_S) for _, work in started)
    return [digest([x.x for x in xs]) for xs, _ in started]


# --- bits ------------------------------------------------------------------------------------------------------------


def slots_of(_: int, __: int) -> list[set[int]]:
    made = []
    for nranks in range(2, nccl_threads.DEVICES + 1):
        with ranks(nranks) as members:
            made.append({m.comm.describe()["slot_bytes"] for m in members})
    return made


def test_slots_are_alike_on_all_ranks(nccl: Process) -> None:
    """Ranks cut a bucket by them; where they differ, calls of several slices hang."""
    for sizes in nccl.run(slots_of):
        assert len(sizes) == 1
        assert min(sizes) >= 4096


def run_cases(_: int, __: int, nranks: int, todo: list[Case]) -> list[list[str]]:
    with ranks(nranks) as members:
        digests = good(together(members, lambda m: run_on(m, todo)))
        together(members, lambda m: m.comm.check())
        return digests


@pytest.mark.parametrize("nranks", RANKS, ids=lambda n: f"{n}ranks")
def test_bits_equal_the_reference(nccl: Process, nranks: int) -> None:
    results = nccl.run(run_cases, nranks, CASES)
    for i, case in enumerate(CASES):
        assert {per_rank[i] for per_rank in results} == {digest(case.expected(nranks))}, case


@pytest.mark.parametrize("nranks", RANKS, ids=lambda n: f"{n}ranks")
def test_codes_that_nccl_adds_up(nccl: Process, nranks: int) -> None:
    results = nccl.run(run_cases, nranks, NATIVE)
    for i, case in enumerate(NATIVE):
        assert {per_rank[i] for per_rank in results} == {digest(case.expected(nranks))}, case


def flip_one(_: int, __: int) -> list[str]:
    """A wrong bit on the last rank; the first has the right ones."""
    with ranks(2) as members:
        case = Case((1000,), algorithm="direct")
        xs = good(together(members, lambda m: m.reduce(m.array(case.inputs(m.rank)[0]), algorithm="direct").x))
        xs[1].view(np.uint8)[0] ^= 1
        return [digest([x]) for x in xs]


def test_a_flipped_bit_shows_in_the_hashes(nccl: Process) -> None:
    right, flipped = nccl.run(flip_one)
    assert right == digest(Case((1000,), algorithm="direct").expected(2))
    assert flipped != right


# --- NCCL's own all-reduce -------------------------------------------------------------------------------------------


def add_by_nccl(_: int, __: int, nranks: int) -> list[tuple[int, int]]:
    """Whole numbers, whose sums and halves are exact in any order. How many all-reduces and sends each kind took."""
    totals = sum(range(1, nranks + 1))
    pattern = np.arange(7001) % 17
    taken = []

    def play(member: Member, dtype: str, op: str) -> None:
        x = member.array((pattern * (member.rank + 1)).astype(dtype))
        member.reduce([x, member.array(np.full(3, member.rank + 1, dtype)), member.array(np.empty(0, dtype))], op)
        want = {"sum": totals * pattern, "mean": totals * pattern / nranks, "min": pattern, "max": nranks * pattern}[op]
        np.testing.assert_array_equal(x.x, want.astype(dtype))

    with ranks(nranks) as members:
        for dtype, op in [
            ("float32", "sum"),
            ("float32", "mean"),
            ("int32", "sum"),
            ("int32", "min"),
            ("int32", "max"),
        ]:
            before = count("all_reduces"), count("sends")
            good(together(members, lambda m, dtype=dtype, op=op: play(m, dtype, op)))  # type: ignore[misc]
            taken.append((count("all_reduces") - before[0], count("sends") - before[1]))
    return taken


@pytest.mark.parametrize("nranks", [2, 4], ids=lambda n: f"{n}ranks")
def test_codec_none_is_ncclallreduce(nccl: Process, nranks: int) -> None:
    """Two arrays of each list have elements."""
    assert nccl.run(add_by_nccl, nranks) == [(2 * nranks, 0)] * 5


def count_others(_: int, __: int, case: Case) -> tuple[int, int]:
    with ranks(3) as members:
        before = count("all_reduces"), count("sends")
        good(together(members, lambda m: run_on(m, [case])))
        return count("all_reduces") - before[0], count("sends") - before[1]


@pytest.mark.parametrize(
    "case",
    [Case((900,), codec="fp16"), Case((900,), algorithm="direct"), Case((900,), op="max")],
    ids=["fp16", "direct", "max"],
)
def test_what_needs_our_bits_does_not_go_to_ncclallreduce(nccl: Process, case: Case) -> None:
    all_reduces, sends = nccl.run(count_others, case)
    assert all_reduces == 0
    assert sends >= 6  # each rank to each other, once or twice


# --- lists, asynchronous calls ---------------------------------------------------------------------------------------


def run_list(_: int, __: int, cap_mb: float, case: Case) -> tuple[list[str], list[float]]:
    with ranks(2, bucket_cap_mb=cap_mb) as members:
        digests = good(together(members, lambda m: run_on(m, [case])[0]))
        return digests, [m.comm.stats()["calls"] for m in members]


def test_lists_are_cut_into_buckets(nccl: Process) -> None:
    case = Case((300, 0, 7, 1021, 200, 200), op="mean", codec="fp16", algorithm="direct", special=True)
    want = [digest(case.expected(2))] * 2
    one, several = (nccl.run(run_list, cap_mb, case) for cap_mb in (25.0, 2 / 1024))
    assert one == (want, [1, 1])
    assert several == (want, [3, 3])  # 2 KiB each: 300 + 0 + 7, 1021, 200 + 200


def run_mixed(_: int, __: int) -> list[list[Any]]:
    def play(member: Member) -> list[Any]:
        value = member.rank + 1
        xs = [member.full(value, 5), member.array(np.full(3, value, np.int32)), member.full(10 * value, 300)]
        member.reduce(xs)
        return [sorted(set(x.x.tolist())) for x in xs]

    with ranks(3) as members:
        return good(together(members, play))


def test_a_list_may_mix_dtypes(nccl: Process) -> None:
    assert nccl.run(run_mixed) == [[[6.0], [6], [60.0]]] * 3


def wait_for_a_late_rank(_: int, __: int, codec: str) -> dict[str, Any]:
    """Both ranks are called from this thread: nothing may block it."""
    with ranks(2, codec=codec) as (first, second):
        x, y = first.full(1.0), second.full(2.0)
        early = first.comm.allreduce(x, async_op=True)
        seen: dict[str, Any] = {"early": (early.is_completed(), early.exception())}
        caught = catch(early.wait, 0.05)
        seen["caught"] = caught
        seen["waited"] = caught.seconds
        late = second.comm.allreduce(y, async_op=True)
        seen["joined"] = early.wait()  # does not block the host
        seen["ended"] = [work.wait(LONG_S) for work in (early, late)]
        seen["late"] = [(work.is_completed(), work.exception()) for work in (early, late)]
        seen["values"] = [set(a.x.tolist()) for a in (x, y)]
        return seen


@pytest.mark.parametrize("codec", ["none", "fp16"])
def test_asynchronous_calls_can_be_asked_and_waited_for(nccl: Process, codec: str) -> None:
    seen = nccl.run(wait_for_a_late_rank, codec)
    assert seen["early"] == (False, None)
    check(seen["caught"], "CommTimeoutError", "wait: the call has not ended in 0.05 s. It goes on; wait again.")
    assert seen["waited"] >= 0.05
    assert seen["joined"]
    assert seen["ended"] == [True, True]
    assert seen["late"] == [(True, None)] * 2
    assert seen["values"] == [{3.0}] * 2


def run_in_order(_: int, __: int) -> list[float]:
    """Synchronous calls behind asynchronous ones, over one array: each sees what the one before it left."""

    def play(member: Member) -> float:
        x = member.full(1.0)
        for codec in ("none", "fp16"):
            member.comm.allreduce(x, codec=codec)
            work = member.comm.allreduce(x, codec=codec, async_op=True)
            member.comm.allreduce(x, "mean", codec=codec)
            assert work.wait()
        member.reduce(x)
        return float(x.x[999])

    with ranks(3) as members:
        return good(together(members, play))


def test_calls_of_one_array_are_in_order(nccl: Process) -> None:
    assert nccl.run(run_in_order) == [3.0**5] * 3


# --- what it says of itself ------------------------------------------------------------------------------------------


def describe(_: int, __: int, options: dict[str, Any]) -> list[dict[str, Any]]:
    with ranks(2, **options) as members:
        for _ in range(2):
            good(together(members, Member.reduce))
        return [m.comm.describe() for m in members]


@pytest.mark.parametrize(
    ("options", "algorithm", "bit_class"),
    [
        ({}, "native", "native"),
        ({"codec": "bf16", "algorithm": "native"}, "native", "native"),
        ({"codec": "fp16", "algorithm": "native"}, "native", "native"),
        ({"codec": "fp16"}, "direct", "rank_order"),
        ({"algorithm": "direct"}, "direct", "rank_order"),
        ({"codec": "fp16", "algorithm": "ring", "max_ctas": 2}, "ring", "ring"),
    ],
)
def test_describe(nccl: Process, options: dict[str, Any], algorithm: str, bit_class: str) -> None:
    for rank, facts in enumerate(nccl.run(describe, options)):
        assert (facts["engine"], facts["why"]) == ("nccl", "asked for")
        assert facts["carrier"] == f"NCCL 2.27.3 ({stand_in.nccl_library()})"
        assert facts["bit_classes"][-1]["algorithm"] == algorithm
        assert {row["bit_class"] for row in facts["bit_classes"]} == {bit_class}
        assert (facts["rank"], facts["nranks"], facts["device"]) == (rank, 2, rank)
        assert (facts["arena"], facts["sequence"]) == ("device", 2)
        assert 0 < facts["arena_bytes"] <= 4 << 20
        assert facts["max_ctas"] == options.get("max_ctas", 16)


def read_stats(_: int, __: int) -> list[list[dict[str, float]]]:
    size = 1 << 16

    def play(member: Member) -> list[dict[str, float]]:
        stats = [member.comm.stats(reset=True)]
        for codec in ("none", "fp16"):
            x = member.full(1.0, size)
            x.x[300] = np.inf if member.rank == 1 else 1.0
            member.reduce(x, codec=codec, algorithm="direct")
            stats.append(member.comm.stats(reset=True))
        return [*stats, member.comm.stats()]

    with ranks(2) as members:
        return good(together(members, play))


def test_stats(nccl: Process) -> None:
    for before, plain, half, after in nccl.run(read_stats):
        assert not any(before.values())  # the calls of construction are not counted
        assert not any(after.values())
        assert plain["calls"] == half["calls"] == 1
        assert plain["input_bytes"] == half["input_bytes"] == 4 << 16
        # One half of the elements to the peer, and the sum of the other half: all bytes once.
        assert plain["wire_bytes"] == pytest.approx(4 << 16, rel=0.01)
        assert half["wire_bytes"] == pytest.approx(plain["wire_bytes"] / 2, rel=0.01)
        assert half["nonfinite_groups"] >= 1


def what_info_says(_: int, __: int) -> dict[str, Any]:
    return dpcomm.info()


def test_info(nccl: Process) -> None:
    said = nccl.run(what_info_says)
    assert said["engines"]["nccl"] == {"usable": True, "reason": "CUDA tensors of up to 64 ranks of any hosts"}
    path = stand_in.nccl_library()
    assert said["nccl"] == {
        "version": "2.27.3",
        "path": path,
        "how": "DPCOMM_NCCL_LIBRARY",
        "least_version": _native.NCCL_LEAST_VERSION,
    }


def close_and_make_again(_: int, __: int) -> list[Any]:
    """Twice in one process; what is left of a communicator that was closed."""
    seen: list[Any] = []
    for _ in range(2):
        with ranks(3, codec="fp16") as members:
            good(together(members, Member.reduce))
            for member in members:
                member.comm.check()
            seen.append(count("comms"))
        seen.append(count("comms"))
        members[0].comm.close()  # a second time
        seen.append(catch(members[0].comm.check))
        seen.append(catch(members[0].comm.allreduce, members[0].full(1.0)))
    return seen


def test_close_gives_everything_back(nccl: Process) -> None:
    seen = nccl.run(close_and_make_again)
    for made, left, *caught in (seen[:4], seen[4:]):
        assert (made, left) == (3, 0)
        for one in caught:
            check(one, "ArgumentError", "the communicator has been closed")


# --- which engine, and on what ---------------------------------------------------------------------------------------


def choose(_: int, __: int) -> tuple[list[tuple[str, str]], list[str], list[float], list[Any]]:
    """GPUs that see no memory of each other's, as on two hosts: the native half of p2p says so."""
    with pytest.MonkeyPatch.context() as patch, heard(logging.INFO) as lines:
        patch.setattr(_native.P2pBuilder, "probe", lambda _, endpoints: [True] + [False] * (len(endpoints) - 1))
        with ranks(3, engine="auto", codec="fp16") as members:
            xs = good(together(members, lambda m: float(m.reduce().x[0])))
            facts = [(m.comm.engine, m.comm.describe()["why"]) for m in members]
        refused = nccl_threads.construct(2, engine="p2p")
    return facts, lines, xs, refused


def test_auto_takes_nccl_where_ranks_share_no_host(nccl: Process) -> None:
    facts, lines, xs, refused = nccl.run(choose)
    assert xs == [6.0] * 3
    for engine, why in facts:
        assert engine == "nccl"
        assert why.startswith("no shared memory: ranks [0, 1, 2] on ")
    assert len(lines) == 1  # of rank 0, not of all
    assert re.match(r"communicator #\d+ of 3 ranks: engine nccl on .*: no shared memory between rank 0 on ", lines[0])
    assert lines[0].endswith("; p2p needs one host; shm, gloo, two_level and torch are for data on CPU")
    for caught in refused:  # who asks for p2p is told what else there is
        check(caught, "UnsupportedError", "engine p2p joins processes of one host", "engine='auto' or 'nccl'")


def join_locally(_: int, __: int) -> list[Any]:
    refused = catch(dpcomm.init_local, [0, 1], engine="nccl")
    (alone,) = dpcomm.init_local([0], engine="nccl")
    with alone:
        x = Member(alone).reduce(op="mean")
        return [refused, alone.engine, x.x.tolist() == [1.0] * 1000]


def test_init_local_has_no_nccl(nccl: Process) -> None:
    refused, engine, kept = nccl.run(join_locally)
    check(refused, "UnsupportedError", "init_local: engine='nccl' joins processes. Use engine='p2p', or 'auto'.")
    assert (engine, kept) == ("none", True)  # of one rank


def test_the_oldest_nccl_is_said() -> None:
    """Of this process, whichever NCCL it has, or none."""
    said = dpcomm.info()["nccl"]
    assert said == {"reason": nccl_library.reason()} or said["least_version"] == _native.NCCL_LEAST_VERSION
