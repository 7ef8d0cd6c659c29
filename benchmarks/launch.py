"""Starts the report's rank processes: under Open MPI's mpirun if that takes part, else one by one. Knows no contestant.

Whatever happens, no process is left behind: a rank that ends badly, or the deadline, ends all.
"""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RANK = Path(__file__).resolve().parent / "report_rank.py"
COLLECTIVE_TIMEOUT_S = 300
POLL_S = 0.1
CHECK_TIMEOUT_S = 60
HOW_TO_GET_MPI = "apt-get install openmpi-bin; pip install -r requirements/bench.txt"


class LaunchError(Exception):
    """The ranks could not run, and why."""


def mpirun() -> str | None:
    """Open MPI's launcher. A system with several MPIs has it under a name of its own."""
    return shutil.which("mpirun.openmpi") or shutil.which("mpirun")


def mpirun_command(ranks: int) -> list[str]:
    """With more ranks than processors they have to yield while they wait."""
    crowded = ranks > len(os.sched_getaffinity(0))
    options = ["--oversubscribe", "--bind-to", "none", *(["--mca", "mpi_yield_when_idle", "1"] if crowded else [])]
    return [mpirun() or "mpirun", *(["--allow-run-as-root"] if os.geteuid() == 0 else []), *options, "-np", str(ranks)]


def why_no_openmpi() -> str:
    """Empty where mpi4py runs under Open MPI; else what is missing and how to get it."""
    if importlib.util.find_spec("mpi4py") is None:
        return f"mpi4py is not installed: {HOW_TO_GET_MPI}"
    if mpirun() is None:
        return f"no mpirun on PATH: {HOW_TO_GET_MPI}"
    code = "from mpi4py import MPI; print(MPI.Get_library_version())"
    try:
        done = subprocess.run(
            [*mpirun_command(1), sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=CHECK_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"{mpirun()} did not answer within {CHECK_TIMEOUT_S} s"
    if done.returncode != 0:
        return f"mpi4py does not run under {mpirun()}: {' '.join(done.stderr.split())[-300:]}"
    if "Open MPI" not in done.stdout:
        return f"{mpirun()} is not Open MPI's but {done.stdout[:60].strip()!r}: {HOW_TO_GET_MPI}"
    return ""


def run_ranks(plan: dict[str, Any], with_mpirun: bool, deadline_s: float) -> dict[str, Any]:
    """Runs all ranks to their end. Returns what rank 0 wrote.

    Raises:
        LaunchError: A rank failed, or they did not end in time.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rank0.json"
        added = {"port": store.port, "out": str(out), "collective_timeout_s": COLLECTIVE_TIMEOUT_S}
        command = [sys.executable, str(RANK), json.dumps(plan | added)]
        processes = start(command, plan["ranks"], with_mpirun)
        try:
            wait(processes, time.monotonic() + deadline_s)
        finally:
            stop(processes)
        document: dict[str, Any] = json.loads(out.read_text())
    return document


def start(command: list[str], ranks: int, with_mpirun: bool) -> list[subprocess.Popen[bytes]]:
    """The processes to watch: mpirun, or every rank."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    if with_mpirun:
        return [subprocess.Popen([*mpirun_command(ranks), *command], env=env, start_new_session=True)]
    return [
        subprocess.Popen(command, env={**env, "BENCHMARK_RANK": str(rank)}, start_new_session=True)
        for rank in range(ranks)
    ]


def wait(processes: list[subprocess.Popen[bytes]], deadline: float) -> None:
    """Until all have ended well.

    Raises:
        LaunchError: One ended otherwise, or the deadline passed.
    """
    while any(status := [process.poll() for process in processes]) or None in status:
        if bad := [code for code in status if code]:
            raise LaunchError(f"a rank ended with status {bad[0]}; its message is above")
        if time.monotonic() > deadline:
            raise LaunchError("the ranks did not end in time: give a smaller --seconds-per-size or fewer --sizes")
        time.sleep(POLL_S)


def stop(processes: list[subprocess.Popen[bytes]]) -> None:
    """Ends those that still run. mpirun is asked first, since its ranks are in sessions of their own."""
    for process in processes:
        if process.poll() is None:
            process.terminate()
    for process in processes:
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
