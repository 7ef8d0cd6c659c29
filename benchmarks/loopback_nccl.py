"""NCCL's all-reduce between ranks of one GPU, where NCCL can: a process each. loopback.py runs it beside itself.

Usage: python benchmarks/loopback_nccl.py RANKS BYTES [BYTES ...]   Prints {bytes: microseconds} as its last line.
"""

from __future__ import annotations

import datetime
import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from gpu_clock import time_on_device
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.multiprocessing.spawn import spawn

FIRST_VERSION = (2, 30, 3)  # that lets several ranks share a GPU
VARIABLE = "NCCL_MULTI_RANK_GPU_ENABLE"
DEADLINE_S = 120
TIMEOUT = datetime.timedelta(seconds=60)
ROUNDS, CALLS = 5, 20
HOLD_S = 0.005  # longer than the host needs to enqueue CALLS calls


def why_not(version: tuple[int, ...]) -> str:
    """Empty where NCCL of that version may serve several ranks on one GPU."""
    if not version:
        return "this torch has no NCCL"
    if version < FIRST_VERSION:
        return f"NCCL {'.'.join(map(str, version))} refuses several ranks on one GPU; it needs {dotted(FIRST_VERSION)}"
    return ""


def dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def measure(nranks: int, sizes: Sequence[int], version: tuple[int, ...]) -> tuple[dict[int, float], str]:
    """Microseconds of one call for each size in bytes; or none, and why."""
    if reason := why_not(version):
        return {}, reason
    command = [sys.executable, str(Path(__file__).resolve()), str(nranks), *map(str, sizes)]
    process = subprocess.Popen(
        command,
        env={**os.environ, VARIABLE: "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, complaint = process.communicate(timeout=DEADLINE_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its ranks, too
        process.communicate()
        return {}, f"NCCL {dotted(version)} with {VARIABLE}=1 did not finish within {DEADLINE_S} s"
    if process.returncode != 0:
        last = complaint.strip().splitlines()[-1:] or [f"exit status {process.returncode}"]
        return {}, f"NCCL {dotted(version)} with {VARIABLE}=1: {last[0]}"
    return {int(size): us for size, us in json.loads(output.splitlines()[-1]).items()}, ""


def run_rank(rank: int, port: int, nranks: int, sizes: Sequence[int]) -> None:
    """One rank, on the first GPU. Rank 0 prints the slowest rank's medians."""
    torch.cuda.set_device(0)
    store = TCPStore("127.0.0.1", port, is_master=False, timeout=TIMEOUT)
    dist.init_process_group("nccl", store=store, rank=rank, world_size=nranks, timeout=TIMEOUT)
    medians = torch.tensor([time_size(size) for size in sizes], device="cuda", dtype=torch.float64)
    dist.all_reduce(medians, dist.ReduceOp.MAX)
    if rank == 0:
        print(json.dumps(dict(zip(sizes, medians.tolist(), strict=True))), flush=True)
    dist.destroy_process_group()


def time_size(size_bytes: int) -> float:
    """Microseconds of one call, of CALLS back to back; the median of ROUNDS."""
    x = torch.ones(size_bytes // 4, device="cuda")
    rounds = []
    for _ in range(ROUNDS + 1):
        dist.all_reduce(x, dist.ReduceOp.AVG)
        rounds.append(time_on_device(lambda _: dist.all_reduce(x, dist.ReduceOp.AVG), CALLS, HOLD_S).gpu_us)
    return statistics.median(rounds[1:])


def main(argv: Sequence[str]) -> int:
    nranks, *sizes = map(int, argv)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
    spawn(run_rank, (store.port, nranks, sizes), nprocs=nranks)  # type: ignore[no-untyped-call]
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
