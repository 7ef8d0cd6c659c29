"""Wrong arguments, exhausted resources and broken contexts on a GPU: typed errors, and never a hang.

What may take the CUDA context down runs in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import numpy as np
import pytest
import torch
from cases import Case
from gpu.support import (
    DEVICE,
    check_case,
    check_sums,
    close,
    environment,
    first_error,
    fresh,
    group,
    make,
    on_gpu,
    to_the_end,
    torch_works,
)

import dpcomm

pytestmark = on_gpu

Record = Callable[[str, object], None]
ROOT = Path(__file__).resolve().parent.parent.parent
START_S = 40.0  # importing torch and making a context, in another process


# --- arguments -------------------------------------------------------------------------------------------------------


def test_memory_of_the_wrong_kind_is_refused() -> None:
    comms, good = group(2), torch.ones(10, device=DEVICE)
    for bad in (torch.ones(10), np.ones(10, np.float32)):
        with pytest.raises(dpcomm.ArgumentError, match=r"(?i)cpu|host"):
            dpcomm.allreduce_local(comms, [good, bad])
        with pytest.raises(dpcomm.ArgumentError, match=r"(?i)cpu|host"):
            comms[0].allreduce(bad, async_op=True)
    check_sums(comms)


def test_gpu_memory_is_refused_by_ranks_on_the_cpu(pair: list[dpcomm.Communicator]) -> None:
    xs = [torch.ones(10, device=DEVICE) for _ in range(2)]
    with pytest.raises((dpcomm.ArgumentError, dpcomm.UnsupportedError), match=r"(?i)cuda|gpu"):
        dpcomm.allreduce_local(pair, xs)
    cases.check_local(pair, Case((1000,)))


def test_another_device_is_refused() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs a second GPU")
    xs = [torch.ones(10, device="cuda:1") for _ in range(2)]
    with pytest.raises(dpcomm.ArgumentError, match="cuda:1"):
        dpcomm.allreduce_local(group(2), xs)
    check_sums(group(2))


@pytest.mark.parametrize("device", ["cuda:99", 99, -3, "gpu"])
def test_a_device_that_does_not_exist_is_refused(device: Any) -> None:
    with pytest.raises(dpcomm.ArgumentError):
        dpcomm.init_local([device] * 2)


@pytest.mark.parametrize("max_ctas", [-1, 100_000, 1.5, "2", True])
def test_a_number_of_ctas_that_cannot_be_is_refused(max_ctas: Any) -> None:
    with pytest.raises(dpcomm.ArgumentError, match="max_ctas"):
        make(2, max_ctas=max_ctas)


def test_an_unknown_kind_of_arena_is_refused() -> None:
    with pytest.raises(dpcomm.ArgumentError, match="DPCOMM_P2P_ARENA"):
        make(2, {"DPCOMM_P2P_ARENA": "elsewhere"})


def test_engine_shm_does_not_serve_gpus() -> None:
    with pytest.raises((dpcomm.ArgumentError, dpcomm.UnsupportedError), match="shm"):
        make(2, engine="shm")


def test_engine_and_device_are_described() -> None:
    with fresh(2, engine="p2p") as comms:
        for comm in comms:
            facts = comm.describe()
            assert (comm.engine, facts["engine"], facts["device"], facts["arena"]) == ("p2p", "p2p", 0, "device")
            assert facts["device_name"] == torch.cuda.get_device_name(0)
            assert facts["max_ctas"] >= 1
    assert dpcomm.info()["engines"]["p2p"]["usable"]


def test_use_after_close_is_refused() -> None:
    comms = make(2)
    close(comms)
    xs = [torch.ones(10, device=DEVICE) for _ in range(2)]
    with pytest.raises(dpcomm.ArgumentError, match="closed"):
        dpcomm.allreduce_local(comms, xs)
    with pytest.raises(dpcomm.ArgumentError, match="closed"):
        comms[0].allreduce(xs[0])
    close(comms)
    assert torch_works() == ""


# --- failures --------------------------------------------------------------------------------------------------------


def test_a_rank_of_this_process_that_never_calls_is_a_time_out() -> None:
    """One launch plays all ranks of a device, so here the host waits for the missing one."""
    with fresh(2, timeout_s=1.0) as comms:
        check_sums(comms)
        caught = first_error(comms[0], lambda: to_the_end(comms[0], torch.ones(1000, device=DEVICE)), 10.0)
        assert caught.failure.name == "CommTimeoutError", caught.failure.trace
        assert 0.8 < caught.seconds < 3.0
        with pytest.raises(dpcomm.Error):
            check_sums(comms)
    assert torch_works() == ""
    with fresh(2) as comms:
        check_sums(comms)


def test_ranks_of_this_process_that_disagree_are_told() -> None:
    with fresh(2) as comms:
        check_sums(comms)
        xs = [torch.ones(1000 + r, device=DEVICE) for r in range(2)]
        caught = first_error(comms[0], lambda: dpcomm.allreduce_local(comms, xs), 5.0)
        assert "MISMATCH" in caught.text, caught.failure.trace
        torch.cuda.synchronize()
    assert torch_works() == ""


def make_until_refused(groups: list[list[dpcomm.Communicator]], most: int) -> None:
    while len(groups) < most:
        groups.append(make(8, {"DPCOMM_ARENA_MB": "8"}))


@pytest.mark.timeout(120)
def test_communicators_are_refused_before_their_kernels_no_longer_fit() -> None:
    groups: list[list[dpcomm.Communicator]] = []
    try:
        with pytest.raises(dpcomm.SystemResourceError, match=r"(?i)cta|block|multiprocessor|resident"):
            make_until_refused(groups, 400)
        assert groups, "the first communicator was refused already"
        for comms in groups:
            check_sums(comms)
    finally:
        for comms in groups:
            close(comms)
    with fresh(8) as comms:
        check_sums(comms)


# --- contexts that break ---------------------------------------------------------------------------------------------


def python(code: str, deadline_s: float = START_S, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a new process. One that hangs fails the test."""
    with environment({**env, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}):
        return subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=deadline_s, check=False
        )


TWO_RANKS = """
import torch, dpcomm
comms = dpcomm.init_local(["cuda:0"] * 2, timeout_s=10)
xs = [torch.full((1000,), r + 1.0, device="cuda:0") for r in range(2)]
dpcomm.allreduce_local(comms, xs)
torch.cuda.synchronize()
assert all((x == 3).all() for x in xs)
"""
STICKY = """
bad = torch.zeros(4, device="cuda:0")[torch.tensor([10], device="cuda:0")]  # a device-side assertion
try:
    for _ in range(1000):
        dpcomm.allreduce_local(comms, xs)
    torch.cuda.synchronize()
    for _ in range(1000):
        comms[0].check()
except dpcomm.Error as error:
    print("caught", error.code, error)
except RuntimeError as error:
    print("torch", error)
for comm in comms:
    comm.close()
print("closed")
"""
BAD_STREAM = """
class Exposed:
    def __init__(self, x, stream):
        self.kept, self.__cuda_array_interface__ = x, {**x.__cuda_array_interface__, "version": 3, "stream": stream}
try:
    dpcomm.allreduce_local(comms, [Exposed(x, 0xdeadbeef0) for x in xs])
    torch.cuda.synchronize()
    print("no error")
except (dpcomm.Error, RuntimeError) as error:
    print("caught", error)
"""


@pytest.mark.timeout(120)
def test_a_users_broken_kernel_is_an_error_with_code_cuda() -> None:
    done = python(TWO_RANKS + STICKY)
    assert "caught CUDA [dpcomm:CUDA]" in done.stdout, done.stdout + done.stderr[-3000:]
    assert "closed" in done.stdout, "close() did not come back"


@pytest.mark.timeout(120)
def test_a_stream_that_is_none_is_not_taken(record_property: Record) -> None:
    """The driver may answer with an error or crash: it is recorded. A call that seems to work would be wrong."""
    done = python(TWO_RANKS + BAD_STREAM)
    record_property("bad_stream", f"status {done.returncode}: {done.stdout.strip()[:300]}")
    assert done.returncode < 0 or "caught" in done.stdout, done.stdout + done.stderr[-3000:]


@pytest.mark.timeout(120)
def test_blocking_launches_work_where_one_launch_plays_all_ranks() -> None:
    done = python(TWO_RANKS + "print('good')", CUDA_LAUNCH_BLOCKING="1")
    assert done.stdout == "good\n", done.stdout + done.stderr[-3000:]
    assert done.returncode == 0


@pytest.mark.timeout(120)
@pytest.mark.parametrize("ending", ["", "comms[0].allreduce(xs[0], async_op=True)\n"], ids=["idle", "in-a-call"])
def test_a_process_ends_without_closing(ending: str) -> None:
    """In the second case one rank has called and the other never will."""
    done = python(TWO_RANKS + ending + "print('end')")
    assert done.stdout == "end\n", done.stderr[-3000:]
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.timeout(120)
def test_many_communicators_come_and_go() -> None:
    free = []
    for i in range(12):
        with fresh(2) as comms:
            check_case(comms, Case((3000,), codec="fp16", seed=i))
        torch.cuda.synchronize()
        free.append(torch.cuda.mem_get_info()[0])
    assert free[-1] >= free[2] - (2 << 20), f"free bytes after each: {free}"
