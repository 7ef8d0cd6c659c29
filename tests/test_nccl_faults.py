"""Engine nccl when something goes wrong, through Python, on the stand-ins: typed errors on all ranks, none that hangs.

Numbers in the names count the faults that dpcomm promises to answer; those that are missing have a test elsewhere.
Processes that die, and graphs: tests/cpp/test_nccl_faults.cpp.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import nccl_threads
import numpy as np
import pytest
import stand_in
import torch
from faulty import Caught, catch, check, in_threads
from nccl_threads import (
    LONG_S,
    Member,
    Process,
    asked,
    break_rank,
    construct,
    count,
    good,
    hash_store,
    nccl_process,
    ranks,
    together,
    turn,
)
from ranks import fresh
from stores import at, build, with_spy_on_rank_1
from test_p2p_faults import BEFORE, FAULTS, Ask, check_poisoned

import dpcomm
from dpcomm import bootstrap, errors, nccl_library, options, reach
from dpcomm.nccl import NcclBuilder
from dpcomm.records import PREFIX
from dpcomm.rendezvous import Site

__all__ = ["nccl_process"]  # the fixture `nccl`
pytestmark = nccl_threads.marks

TIMEOUT_S = 2.0  # of what has to run out of time
ILLEGAL_ADDRESS = 700  # cudaErrorIllegalAddress
SOON_S = 5.0  # for what takes a second at most
LET_GO_S = 10.0  # how long ncclCommAbort may take before a wait gives up


def alone(function: Callable[..., Any], *args: Any, machine: str = "devices=2", **env: str) -> Any:
    """function(0, 1, *args) in a process of its own."""
    environment = stand_in.nccl_environment(machine, **env)
    (outcome,) = fresh(1, function, *args, env=environment, process_group=False)
    assert outcome.error is None, outcome.error.trace
    assert outcome.exitcode == 0
    return outcome.value


def same_on_all(caught: list[Any], name: str, *fragments: str) -> None:
    """One error, in the same words."""
    for one in caught:
        check(one, name, *fragments)
    assert len({one.text for one in caught}) == 1, [one.text for one in caught]


def finite(x: Any) -> bool:
    """Ask once the communicator is closed: a call that fails on the host is filled with NaNs on the device."""
    return bool(np.isfinite(x.x).any())


# --- what ranks have -------------------------------------------------------------------------------------------------


def share_a_gpu(_: int, __: int) -> tuple[list[Any], int]:
    return construct(3, device=[0, 1, 0]), count("inits")


def test_36_two_ranks_on_one_gpu(nccl: Process) -> None:
    before = nccl.run(inits)
    caught, after = nccl.run(share_a_gpu)
    words = ("ranks 0 and 2 both use GPU-", "NCCL 2.27.3 refuses that", "NCCL_MULTI_RANK_GPU_ENABLE=1", "2.30.3")
    same_on_all(caught, "UnsupportedError", *words)
    assert after == before  # NCCL was not asked


def inits(_: int, __: int) -> int:
    return count("inits")


def share_an_allowed_gpu(_: int, __: int) -> tuple[list[Any], list[float]]:
    """First without the variable, then with it."""
    refused = construct(2, device=0)
    os.environ["NCCL_MULTI_RANK_GPU_ENABLE"] = "1"
    with ranks(2, device=0) as members:
        return refused, good(together(members, lambda m: float(m.reduce(codec="fp16").x[0])))


def test_36_two_ranks_on_one_gpu_where_nccl_allows_it() -> None:
    refused, sums = alone(share_an_allowed_gpu, STAND_IN_NCCL="version=23003")
    same_on_all(refused, "UnsupportedError", "ranks 0 and 1 both use GPU-", "NCCL_MULTI_RANK_GPU_ENABLE=1")
    assert sums == [3.0, 3.0]


def fail_init(_: int, __: int, result: int) -> list[Any]:
    turn("fail_init", result, 1)
    return construct(3)


@pytest.mark.parametrize(
    ("result", "word"), [(1, "unhandled cuda error"), (2, "unhandled system error"), (3, "internal error")]
)
def test_39_nccl_refuses_one_rank(nccl: Process, result: int, word: str) -> None:
    caught = nccl.run(fail_init, result)
    for one in caught:
        check(one, "AbortedError", "stage 'verify-network'", "rank 1 gave up", word)


def miss_the_library_once(_: int, __: int, engine: str) -> list[Any]:
    """Whichever rank asks first does not find NCCL."""
    asks, find = itertools.count(), nccl_library.find

    def first_fails() -> nccl_library.NcclLibrary:
        if next(asks) == 0:
            raise errors.VersionError("NCCL was not found here")
        return find()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nccl_library, "find", first_fails)
        patch.setattr(bootstrap, "_build_p2p", apart)
        return construct(3, engine=engine)


def apart(*_: Any) -> Any:
    raise reach.CannotShareError("ranks share no host")


@pytest.mark.parametrize(("engine", "stage"), [("nccl", "validate"), ("auto", "allocate-network")])
def test_39_one_rank_has_no_nccl(nccl: Process, engine: str, stage: str) -> None:
    caught = nccl.run(miss_the_library_once, engine)
    same_on_all(caught, "VersionError", "NCCL was not found here")
    assert re.search(rf"rank [012], stage '{stage}': ", caught[0].text)


def construct_on(_: int, __: int, nranks: int, wanted: dict[str, Any]) -> list[Any]:
    return construct(nranks, **wanted)


def test_40_no_gpu() -> None:
    same_on_all(alone(construct_on, 2, {}, machine="driver=none"), "ArgumentError", "CUDA not available: ")


@pytest.mark.parametrize(
    ("wanted", "text"),
    [
        ({"device": [0, "cpu"]}, "engine='nccl' moves data between GPUs, but device='cpu'"),
        ({"device": [0, 9]}, "rank 1, stage 'allocate-network': there is no GPU 9: this process sees 8."),
        ({"max_ctas": [None, 0]}, "max_ctas=0: expected None or a whole number"),
    ],
    ids=["cpu", "absent", "ctas"],
)
def test_40_devices_that_cannot_be(nccl: Process, wanted: dict[str, Any], text: str) -> None:
    same_on_all(nccl.run(construct_on, 2, wanted), "ArgumentError", text)


def find_bad_libraries(_: int, __: int) -> list[list[Any]]:
    """The old one that the environment names, one that is no file, and none."""
    found = [construct(2)]
    os.environ["DPCOMM_NCCL_LIBRARY"] = "/nowhere/libnccl.so.2"
    found.append(construct(2))
    del os.environ["DPCOMM_NCCL_LIBRARY"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nccl_library, "wheel_paths", list)
        found.append(construct(2))
    return found


def test_41_nccl_is_old_or_missing(tmp_path: Path) -> None:
    from nccl_copies import named, no_library  # looks for this process's own extension: ranks have another

    old = named(tmp_path / "old", version=21403)
    hidden = str(no_library(tmp_path / "hidden").parent)
    too_old, no_file, none = alone(find_bad_libraries, DPCOMM_NCCL_LIBRARY=str(old), LD_LIBRARY_PATH=hidden)
    same_on_all(too_old, "VersionError", "rank 0, stage 'validate': NCCL 2.14.3", str(old), "2.18")
    same_on_all(no_file, "ArgumentError", "DPCOMM_NCCL_LIBRARY", "/nowhere/libnccl.so.2")
    same_on_all(none, "VersionError", "rank 0, stage 'validate': no NCCL was found", "dpcomm[nccl-cu13]")


def differ_in_version(_: int, __: int) -> tuple[list[Any], int]:
    own = NcclBuilder._own_facts
    before = count("inits")

    def another(builder: NcclBuilder) -> Any:
        facts = own(builder)
        return facts._replace(version="2.26.2", path="/b/libnccl.so.2") if builder._meeting.rank == 2 else facts

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NcclBuilder, "_own_facts", another)
        return construct(3), count("inits") - before


def test_41_nccl_differs_between_ranks(nccl: Process) -> None:
    caught, joined = nccl.run(differ_in_version)
    words = ("NCCL differs between ranks: rank 0 has 2.27.3 (", "rank 2 has 2.26.2 (/b/libnccl.so.2)")
    same_on_all(caught, "VersionError", *words, "DPCOMM_NCCL_LIBRARY")
    assert joined == 0


def differ_in_dpcomm(_: int, __: int) -> list[Any]:
    """Rank 1 publishes itself as another version of dpcomm."""

    def changed(record: bytes) -> bytes:
        fields = list(PREFIX.unpack_from(record))
        fields[-1] = b"9.9.9"
        return PREFIX.pack(*fields) + record[PREFIX.size :]

    return build(with_spy_on_rank_1(3, at("hello", changed)), asked(3))


def test_42_dpcomm_differs_between_ranks(nccl: Process) -> None:
    for caught in nccl.run(differ_in_dpcomm):
        check(caught, "VersionError", "rank 1 runs dpcomm 9.9.9", "Install one version everywhere")


def fail_while_comparing(_: int, __: int) -> list[Any]:
    exchange = NcclBuilder._exchange

    def broken(builder: NcclBuilder, *arguments: Any) -> Any:
        if builder._meeting.rank == 2:
            raise OSError("no route to anywhere")
        return exchange(builder, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NcclBuilder, "_exchange", broken)
        return construct(3)


def test_a_rank_that_fails_while_ranks_compare_their_nccl(nccl: Process) -> None:
    """The others lose it; what they raise is why it failed."""
    caught = nccl.run(fail_while_comparing)
    same_on_all(caught, "InternalError", "rank 2, stage 'bind-network': OSError: no route to anywhere")


# --- who does not come, or comes in another order --------------------------------------------------------------------


def wait_for_rank_2(_: int, __: int) -> list[Any]:
    return build([hash_store()] * 2, asked(2, timeout_s=TIMEOUT_S), nranks=3)


def test_49_a_rank_that_never_comes(nccl: Process) -> None:
    caught = nccl.run(wait_for_rank_2)
    for one in caught:
        check(one, "CommTimeoutError", f"ranks [2] did not reach stage 'hello' in {TIMEOUT_S:g} s")
        assert one.failure.attributes["waiting_for"] == (2,)


def stop_at(_: int, __: int, stage: str) -> list[Any]:
    return build(with_spy_on_rank_1(3, at(stage, lambda _: None)), asked(3, timeout_s=TIMEOUT_S))


@pytest.mark.parametrize("stage", ["bind-network", "verify-network"])
def test_49_a_rank_that_stops_on_the_way(nccl: Process, stage: str) -> None:
    for one in nccl.run(stop_at, stage):
        check(one, "CommTimeoutError", f"ranks [1] did not reach stage '{stage}' in {TIMEOUT_S:g} s")
        assert one.failure.attributes["waiting_for"] == (1,)


def come_late_to_nccl(_: int, __: int) -> list[Any]:
    """Rank 2 joins NCCL's communicator when the others have given up."""
    finish = NcclBuilder.finish

    def late(builder: NcclBuilder, *arguments: Any) -> Any:
        if builder._meeting.rank == 2:
            time.sleep(2 * TIMEOUT_S)
        return finish(builder, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NcclBuilder, "finish", late)
        return construct(3, timeout_s=TIMEOUT_S)


def test_49_a_rank_that_does_not_join_nccl(nccl: Process) -> None:
    """NCCL's own wait for its members would have no end."""
    first, second, late = nccl.run(come_late_to_nccl)
    for one in (first, second):
        assert one.failure.name in ("CommTimeoutError", "AbortedError"), one.failure.trace
        assert "rank 2 (pid " in one.text
    assert "CommTimeoutError" in (first.failure.name, second.failure.name)
    assert late.failure.name in ("CommTimeoutError", "AbortedError"), late.failure.trace


def make_crosswise(_: int, __: int) -> list[Any]:
    """Two groups of the same ranks, which rank 1 takes in another order."""
    store = hash_store()
    resolved = [options.resolve("none", "nccl", "auto", LONG_S, 25.0, rank) for rank in range(2)]
    sites = [[Site(store, rank, 2, "ranks [0, 1]", label) for label in "ab"[:: -1 if rank else 1]] for rank in range(2)]
    caught = []
    for order in range(2):
        calls = [partial(bootstrap.build, sites[rank][order], resolved[rank]) for rank in range(2)]
        caught.append(in_threads(calls))
    return caught


def test_51_communicators_made_in_another_order(nccl: Process) -> None:
    for number, caught in enumerate(nccl.run(make_crosswise), 1):
        labels = "'a', rank 1 has 'b'" if number == 1 else "'b', rank 1 has 'a'"
        same_on_all(caught, "MismatchError", f"communicator #{number}: group: rank 0 has {labels}", "same order")


def disagree(_: int, __: int, asks: list[Ask]) -> tuple[list[Any], bool]:
    with ranks(2) as members:
        xs = [[m.array(np.ones(n, asks[m.rank].dtype)) for n in asks[m.rank].counts] for m in members]

        def play(member: Member) -> Caught:
            ask, own = asks[member.rank], xs[member.rank]
            for _ in range(BEFORE):
                member.reduce()
            x = own if len(own) > 1 else own[0]
            caught = catch(member.reduce, x, ask.op, codec=ask.codec, algorithm=ask.algorithm)
            check_poisoned(member.comm, "communicator aborted at seq", "because: [MISMATCH]")
            return caught

        caught = together(members, play)
    return caught, any(finite(x) for own in xs for x in own if x.x.dtype == np.float32)


FP16, BF16 = (Ask(codec=codec, algorithm="native") for codec in ("fp16", "bf16"))
NATIVE = {
    "codec-of-native": (FP16, BF16, "codec: rank 0 has fp16, rank 1 has bf16"),
    "native-or-not": (FP16, Ask(codec="fp16", algorithm="direct"), "algorithm: rank 0 has native, rank 1 has direct"),
}


@pytest.mark.parametrize("fault", FAULTS | NATIVE)
def test_calls_that_differ_are_named_on_all_ranks(nccl: Process, fault: str) -> None:
    first, second, text = (FAULTS | NATIVE)[fault]
    caught, filled = nccl.run(disagree, [first, second])
    assert not filled, "what was not reduced could be taken for a result"
    for one in caught:
        check(one, "MismatchError", text, f"seq {BEFORE + 1})")


# --- arrays and streams that cannot be -------------------------------------------------------------------------------


def give_wrong_arrays(_: int, __: int) -> tuple[list[Any], list[float]]:
    """Nothing is sent: the peer knows nothing of it, and both go on."""
    with ranks(2) as members:
        first, elsewhere = members[0], members[1].full(1.0)
        wrong = [torch.ones(3), np.ones(3, np.float32), [first.full(1.0), torch.ones(3)], elsewhere, "x"]
        caught = [catch(first.comm.allreduce, x, async_op=a) for x in wrong for a in (False, True)]
        return caught, good(together(members, lambda m: float(m.reduce().x[0])))


def test_arrays_on_cpu_or_another_gpu_are_refused(nccl: Process) -> None:
    caught, sums = nccl.run(give_wrong_arrays)
    on_cpu = "allreduce: tensor on cpu but communicator bound to cuda:0"
    texts = [on_cpu, on_cpu, on_cpu, "allreduce: tensor on cuda:1 but communicator bound to cuda:0", "got str"]
    for one, text in zip(caught, [text for text in texts for _ in range(2)], strict=True):
        check(one, "ArgumentError", text)
    assert sums == [3.0, 3.0]


NO_STREAM = 12345


def give_a_wrong_stream(_: int, __: int) -> tuple[list[Any], list[float], list[float]]:
    with ranks(2, codec="fp16") as members:
        x = members[0].array(np.ones(3, np.float32), stream=NO_STREAM)
        caught = [catch(members[0].comm.allreduce, x, async_op=a) for a in (False, True)]
        sums = good(together(members, lambda m: float(m.reduce().x[0])))
        return caught, sums, [m.comm.stats()["calls"] for m in members]


def test_55_a_stream_that_does_not_exist(nccl: Process) -> None:
    caught, sums, calls = nccl.run(give_a_wrong_stream)
    for one in caught:
        assert one.failure.name == "Error", one.failure.trace
        assert one.failure.attributes["code"] == "CUDA"
        assert one.text.startswith("[dpcomm:CUDA] ")
        assert f"stream {NO_STREAM:#x}. Does it exist, on this device?" in one.text
        assert "invalid resource handle" in one.text
    assert sums == [3.0, 3.0]
    assert calls == [1, 1]


# --- calls that break ------------------------------------------------------------------------------------------------


def lose_messages(_: int, __: int, codec: str, algorithm: str) -> tuple[list[Any], list[bool], list[float]]:
    with ranks(2, timeout_s=TIMEOUT_S, codec=codec, algorithm=algorithm) as members:
        for _ in range(BEFORE):
            good(together(members, Member.reduce))
        turn("lose_messages", -1, 1)
        xs = [member.full(1.0, 5000) for member in members]
        caught = together(members, lambda m: catch(m.reduce, xs[m.rank]))
        for member in members:
            check_poisoned(member.comm, "because: [TIMEOUT]")
    turn("lose_messages", 0, 1)
    with ranks(2) as members:
        return caught, [finite(x) for x in xs], good(together(members, lambda m: float(m.reduce().x[0])))


@pytest.mark.parametrize(
    ("codec", "algorithm"), [("none", "auto"), ("fp16", "direct"), ("fp16", "ring"), ("bf16", "native")]
)
def test_57_lost_messages(nccl: Process, codec: str, algorithm: str) -> None:
    """Each waits for the other. Whose time is up first tells both."""
    caught, finite, after = nccl.run(lose_messages, codec, algorithm)
    waited, told = sorted(caught, key=lambda one: one.failure.name, reverse=True)
    blamed = waited.failure.attributes["waiting_for"]
    assert blamed in ((0,), (1,))
    check(waited, "CommTimeoutError", f"waiting for rank {blamed[0]} (pid ", f"for {TIMEOUT_S:g} s at seq")
    check(told, "AbortedError", "communicator aborted at seq", "because: [TIMEOUT]")
    assert finite == [False, False]
    assert after == [3.0, 3.0]  # of new communicators


def never_call(_: int, __: int) -> tuple[list[Any], bool]:
    """Two ranks call, the third does not."""
    with ranks(3, timeout_s=TIMEOUT_S) as members:
        good(together(members, Member.reduce))
        x = members[0].full(1.0)
        caught = together(members[:2], lambda m: catch(m.reduce, x if m.rank == 0 else None))
        caught.append(catch(members[2].reduce))
        for member in members:
            check_poisoned(member.comm, "because: [TIMEOUT]")
    return caught, finite(x)


def test_57_a_rank_that_never_calls(nccl: Process) -> None:
    caught, filled = nccl.run(never_call)
    assert not filled
    waited = [one for one in caught if one.failure.name == "CommTimeoutError"]
    assert waited
    for one in waited:
        check(one, "CommTimeoutError", "rank 2 (pid ", "last seq 1", f"for {TIMEOUT_S:g} s at seq 2")
        assert one.failure.attributes["waiting_for"] == (2,)
        assert one.seconds > TIMEOUT_S / 2
    check(caught[2], "AbortedError", "communicator aborted at seq 2", "[TIMEOUT]")


def close_early(_: int, __: int, codec: str, when: str) -> tuple[list[Any], list[float]]:
    """Calls that begin before or behind the goodbye; what becomes of rank 0's ones."""
    with ranks(3, codec=codec) as members:
        good(together(members, Member.reduce))
        x, others = members[0].full(1.0), [members[0], members[2]]
        if when == "behind":
            members[1].comm.close()
            caught = together(others, lambda m: catch(m.reduce, x if m.rank == 0 else None))
        else:
            works = [m.comm.allreduce(x if m.rank == 0 else m.full(3.0), async_op=True) for m in others]
            members[1].comm.close()
            caught = [catch(work.wait, LONG_S) for work in works]
        for member in others:
            check_poisoned(member.comm, "[PEER_LOST]")
    return caught, [float(value) for value in np.unique(x.x)]


@pytest.mark.parametrize("when", ["before", "behind"])
@pytest.mark.parametrize("codec", ["none", "fp16"])
def test_a_rank_that_closes_early_is_named(nccl: Process, codec: str, when: str) -> None:
    caught, values = nccl.run(close_early, codec, when)
    # What rank 2 has made known before rank 0 calls refuses the call, which then leaves its array alone.
    assert np.isnan(values).all() or (when == "behind" and values == [1.0])
    for one in caught:
        check(one, "PeerLostError", "rank 1 closed its connection (clean shutdown) at seq 1")
        assert one.failure.attributes["rank"] == 1


def break_nccl(_: int, __: int, codec: str) -> tuple[list[Any], bool]:
    """An error of NCCL's own threads, on rank 1, while rank 0 waits for it."""
    with ranks(2, codec=codec) as members:
        x = members[0].full(1.0)
        work = members[0].comm.allreduce(x, async_op=True)
        break_rank(1, 2, "the cable has come off")
        caught = [catch(work.wait, LONG_S), catch(members[1].reduce)]
        error = work.exception()
        assert str(error) == caught[0].text, error
        assert work.is_completed()
        for member in members:
            caught.append(catch(member.comm.check))
            check_poisoned(member.comm, "rank 1 gave up", "the cable has come off")
    return caught, finite(x)


@pytest.mark.parametrize("codec", ["none", "fp16"])
def test_an_error_of_nccl_reaches_all_ranks(nccl: Process, codec: str) -> None:
    caught, filled = nccl.run(break_nccl, codec)
    assert not filled
    for one in caught:
        check(one, "AbortedError", "rank 1 gave up", "unhandled system error", "the cable has come off")


def call_behind_a_broken_kernel(_: int, __: int, codec: str) -> tuple[list[Any], list[float], list[float]]:
    """A kernel of the user's has lost the context before rank 0 calls; rank 1 is in the same process, and does not."""
    with ranks(2, codec=codec) as members:
        good(together(members, Member.reduce))
        x = members[0].full(5.0)
        stand_in.break_context(ILLEGAL_ADDRESS)
        try:
            caught = [catch(members[0].reduce, x)]
            caught += together(members, lambda m: catch(wait_for_failure, m.comm))
            for member in members:
                check_poisoned(member.comm, "rank 0 gave up", "cudaErrorIllegalAddress")
            return caught, [float(value) for value in np.unique(x.x)], good(together(members, close))
        finally:
            stand_in.break_context(0)


def wait_for_failure(comm: dpcomm.Communicator) -> None:
    """Raises what `check` comes to raise; returns where nothing comes."""
    until = time.monotonic() + LONG_S
    while time.monotonic() < until:
        comm.check()
        time.sleep(0.001)


@pytest.mark.parametrize("codec", ["none", "fp16"])
def test_56_an_earlier_kernel_has_lost_the_context(codec: str) -> None:
    (first, *told), values, closed = alone(call_behind_a_broken_kernel, codec)
    assert first.failure.name == "Error", first.failure.trace
    assert first.failure.attributes["code"] == "CUDA"
    assert first.text.startswith("[dpcomm:CUDA] rank 0/2 "), first.text
    for words in (
        "earlier asynchronous CUDA error: ",
        "cudaErrorIllegalAddress",
        "A kernel before this call has caused it, and the process can no longer use the GPU",
        "CUDA_LAUNCH_BLOCKING=1",
    ):
        assert words in first.text, first.text
    assert first.seconds < SOON_S
    for one in told:
        check(one, "AbortedError", "rank 0 gave up", "cudaErrorIllegalAddress", within_s=SOON_S)
    assert values == [5.0]  # a GPU that is lost cannot fill it
    assert max(closed) < LONG_S


def hold_on_to_gpu_0(_: int, __: int) -> tuple[list[Any], list[bool], list[float], int]:
    """Rank 0 waits on the GPU for rank 1, where NCCL's threads meet an error; NCCL never lets go of GPU 0."""
    with ranks(2, codec="fp16") as members:
        turn("abort_hangs_s", -1, 0)
        x = members[0].full(1.0)
        work = members[0].comm.allreduce(x, async_op=True)
        break_rank(1, 2, "the cable has come off")
        caught = together(members, lambda m: catch(work.wait, LONG_S) if m.rank == 0 else catch(m.reduce))
        left_alone = [work.is_completed(), finite(x)]
        for member in members:
            check_poisoned(member.comm, "rank 1 gave up", "the cable has come off")
        closed = good(together(members, close))
        # Rank 1 would be another process. Freeing its memory here would wait for all GPUs of this one, without an end.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(members[1].comm))
    return caught, left_alone, closed, count("comms", 0)


def close(member: Member) -> float:
    """How many seconds it took."""
    began = time.monotonic()
    member.comm.close()
    return time.monotonic() - began


def test_nccl_does_not_let_go_of_a_gpu() -> None:
    """The array may still be written to, so it is not filled; the process ends all the same."""
    (held, other), left_alone, closed, comms = alone(hold_on_to_gpu_0)
    check(held, "CommTimeoutError", "rank 0/2", "NCCL has not let go of the GPU after ncclCommAbort", within_s=LONG_S)
    check(held, "CommTimeoutError", "Restart the process: nothing else ends this.")
    check(other, "AbortedError", "rank 1 gave up", "unhandled system error", "the cable has come off", within_s=SOON_S)
    assert held.seconds > LET_GO_S / 2, "it has to wait for NCCL first"
    assert left_alone == [False, True]
    assert max(closed) < LONG_S
    assert comms == 1  # of rank 0, for ever


# --- Ctrl-C ----------------------------------------------------------------------------------------------------------


def interrupt_construction(_: int, __: int) -> list[Any]:
    """Once while rank 1 is missing, once while it has met the others and does not join NCCL. This is rank 0."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    make = dpcomm.Communicator
    stuck, go_on = threading.Event(), threading.Event()
    finish = NcclBuilder.finish

    def hold(builder: NcclBuilder, *arguments: Any) -> Any:
        if builder._meeting.rank == 1:
            stuck.set()
            go_on.wait(LONG_S)
        return finish(builder, *arguments)

    def interrupt(ready: Callable[[], Any]) -> None:
        ready()
        time.sleep(0.5)
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    sent: list[float] = []
    threading.Thread(target=interrupt, args=(lambda: None,), daemon=True).start()
    seen: list[Any] = [catch(make, rank=0, nranks=2, store=hash_store(), **asked(2, timeout_s=30.0)[0])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NcclBuilder, "finish", hold)
        store, both = hash_store(), asked(2, timeout_s=30.0)
        other: list[Any] = []
        thread = threading.Thread(
            target=lambda: other.append(catch(make, rank=1, nranks=2, store=store, **both[1])), daemon=True
        )
        thread.start()
        threading.Thread(target=interrupt, args=(partial(stuck.wait, LONG_S),), daemon=True).start()
        seen.append(catch(make, rank=0, nranks=2, store=store, **both[0]))
        go_on.set()
        thread.join(LONG_S)
        assert not thread.is_alive()
    return [*seen, other[0], sent]


def test_ctrl_c_ends_a_construction() -> None:
    missing, joining, other, sent = alone(interrupt_construction)
    for caught, at_s in zip((missing, joining), sent, strict=True):
        assert caught.failure.name == "KeyboardInterrupt", caught.failure.trace
        assert caught.ended - at_s < 5.0  # soon, and long before the time is up
    assert other.failure.name in ("AbortedError", "PeerLostError"), other.failure.trace
