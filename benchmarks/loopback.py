"""dpcomm's engine p2p between virtual ranks that share one GPU: benchmarks/allreduce.py --engine p2p --virtual-ranks N.

Times are of the device (CUDA events). The device is kept busy while the host enqueues a timing's calls, so that what
the host needs for them, which is reported beside, is not in them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import loopback_nccl
import torch
from gpu_clock import Times, time_on_device
from gpu_environment import describe_gpu_environment, nccl_version, why_no_gpu
from loopback_plan import (
    ELEM_BYTES,
    ROUNDS,
    Cell,
    Row,
    Yardsticks,
    cells_of,
    header,
    line,
    measure,
    outcome_of,
    rows_of,
    sweep_of,
)
from torch import Tensor
from tqdm import tqdm

import dpcomm
from dpcomm import _native

ARENA = "DPCOMM_P2P_ARENA"
MIB = 1 << 20
CHECKED_BYTES = 4 * MIB  # of a rank: the CPU engine computes them, too
COPY_BYTES, COPIES = 256 * MIB, 10
CHILD_DEADLINE_S = 600
PINNED_CTAS = 16  # a bus is slower than so many CTAs


class Bench:
    """Virtual ranks with one number of CTAs each, and their tensors."""

    def __init__(self, nranks: int, ctas: int, largest: int) -> None:
        self.comms = dpcomm.init_local([0] * nranks, engine="p2p", max_ctas=ctas)
        facts = self.comms[0].describe()
        self.arena, self.ctas = str(facts["arena"]), int(facts["max_ctas"])
        self.xs = [numbers(rank, largest // ELEM_BYTES).cuda() for rank in range(nranks)]
        self.host_s = 1e-3  # of one call, as far as known

    def close(self) -> None:
        for comm in self.comms:
            comm.close()

    def time(self, cell: Cell, calls: int) -> Times:
        """Of `calls` calls back to back, means in place: values stay finite."""
        xs = [x[: cell.size_bytes // ELEM_BYTES] for x in self.xs]
        self._call(xs, cell)
        times = time_on_device(lambda _: self._call(xs, cell), calls, 2 * calls * self.host_s)
        self.host_s = times.host_us / 1e6
        return times

    def wrong(self, cell: Cell) -> int:
        """Elements of all ranks whose bits are not those of the CPU engine, for at most CHECKED_BYTES."""
        elems = min(cell.size_bytes, CHECKED_BYTES) // ELEM_BYTES
        expected = [numbers(rank, elems) for rank in range(len(self.comms))]
        xs = [x.cuda() for x in expected]
        self._call(xs, cell)
        on_cpu = dpcomm.init_local(["cpu"] * len(self.comms))
        dpcomm.allreduce_local(on_cpu, expected, "mean", codec=cell.codec, algorithm=cell.algorithm)
        for comm in on_cpu:
            comm.close()
        return sum(differing(x.cpu(), y) for x, y in zip(xs, expected, strict=True))

    def _call(self, xs: list[Tensor], cell: Cell) -> None:
        dpcomm.allreduce_local(self.comms, xs, "mean", codec=cell.codec, algorithm=cell.algorithm)


def numbers(rank: int, elems: int) -> Tensor:
    """What a rank contributes, on the CPU."""
    return torch.randn(elems, generator=torch.Generator().manual_seed(rank))


def differing(a: Tensor, b: Tensor) -> int:
    """Elements with other bits."""
    return int((a.view(torch.int32) != b.view(torch.int32)).sum())


def copy_gb_s(ctas: int) -> float:
    """Of a copy kernel with so many CTAs: bytes read and written."""
    source, target = (torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda") for _ in range(2))
    call = _native.CudaPass()
    call.kind, call.counts = _native.PASSES["copy"], [COPY_BYTES // ELEM_BYTES]
    call.tensors, call.messages = [[source.data_ptr()]], [[target.data_ptr()]]
    call.message_bytes, call.ctas, call.repeats = COPY_BYTES, ctas, COPIES
    call.stream = torch.cuda.current_stream().cuda_stream
    return 2 * COPY_BYTES / _native.run_pass(call) / 1e3


def link_gb_s() -> float:
    """The slower of copies to and from pinned host memory."""
    host = torch.empty(COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    speeds = []
    for target, source in ((device, host), (host, device)):
        target.copy_(source, non_blocking=True)
        us = time_on_device(lambda _, to=target, of=source: to.copy_(of, non_blocking=True), COPIES).gpu_us  # type: ignore[misc]
        speeds.append(COPY_BYTES / us / 1e3)
    return min(speeds)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one run measures."""

    nranks: int
    cells: tuple[Cell, ...]
    ctas: tuple[int, ...]  # of one rank
    rounds: int = ROUNDS


def plan_of(arguments: argparse.Namespace, multiprocessors: int) -> Plan:
    """The plan that the arguments ask for.

    Raises:
        SystemExit: not even one CTA a rank fits, or fewer than were asked for.
    """
    ctas = sweep_of(arguments.max_ctas, arguments.virtual_ranks, multiprocessors)
    if not ctas:
        raise SystemExit(
            f"loopback: {arguments.virtual_ranks} virtual ranks on {multiprocessors} multiprocessors have at most "
            f"{multiprocessors // arguments.virtual_ranks} CTAs each. Lower --max-ctas or --virtual-ranks."
        )
    cells = cells_of(arguments.sizes, arguments.codec, arguments.algorithm)
    return Plan(arguments.virtual_ranks, tuple(cells), tuple(ctas))


def measure_here(
    plan: Plan, environment: dict[str, Any], link: float, done: Callable[[list[Row]], object]
) -> list[Row]:
    """Rows of this process's kind of arena; a table for each number of CTAs, after which done() is told all rows."""
    rows: list[Row] = []
    largest = max(cell.size_bytes for cell in plan.cells)
    with tqdm(total=len(plan.ctas) * len(plan.cells) * plan.rounds, unit="timing", leave=False, disable=None) as bar:
        for ctas in plan.ctas:
            sticks = Yardsticks(copy_gb_s(ctas * plan.nranks), link)
            bench = Bench(plan.nranks, ctas, largest)
            try:
                times, wrong = measure(plan.cells, plan.rounds, bench.time, bench.wrong, bar.update)
            finally:
                bench.close()
            new = rows_of(plan.nranks, bench.arena, bench.ctas, times, wrong, sticks)
            rows += new
            bar.write("\n".join([header(plan.nranks, environment, sticks), *map(line, new), ""]), file=sys.stdout)
            done(rows)
    return rows


def pinned_rows(plan: Plan, argv: Sequence[str]) -> tuple[list[Row], str]:
    """The same with messages in pinned host memory, in a child, since the variable is read once; or why not."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pinned.json"
        script = Path(__file__).resolve().parent / "allreduce.py"
        ctas = max((each for each in plan.ctas if each <= PINNED_CTAS), default=min(plan.ctas))
        command = [sys.executable, str(script), *argv, "--max-ctas", str(ctas), "--json", str(file)]
        try:
            done = subprocess.run(
                command,
                env={**os.environ, ARENA: "pinned"},
                capture_output=True,
                text=True,
                timeout=CHILD_DEADLINE_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return [], f"did not finish within {CHILD_DEADLINE_S} s"
        if not file.exists():
            return [], (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        print("\n".join(each for each in done.stdout.splitlines() if not each.startswith("wrote")))
        return [Row(**row) for row in json.loads(file.read_text())["rows"]], ""


def document(
    plan: Plan,
    environment: dict[str, Any],
    link: float,
    rows: Sequence[Row],
    nccl: dict[int, float],
    remarks: list[str],
) -> dict[str, Any]:
    """What --json writes."""
    return {
        "benchmark": "allreduce-loopback",
        "note": f"{plan.nranks} virtual ranks on one GPU; not a network figure",
        "ranks": plan.nranks,
        "environment": environment,
        "link_gb_s": link,
        "rows": [dataclasses.asdict(row) for row in rows],
        "nccl_us": {str(size): us for size, us in nccl.items()},
        "remarks": remarks,
        "goals": [dataclasses.asdict(outcome_of(plan.nranks, rows))],
    }


def main(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    """Runs the benchmark. argv: what `arguments` were parsed from, for the child with pinned arenas.

    Returns:
        0; 1 where an element was wrong; 2 where there is no GPU.
    """
    if reason := why_no_gpu():
        print(f"allreduce: there is no GPU for virtual ranks here ({reason}).", file=sys.stderr)
        return 2
    environment = describe_gpu_environment()
    plan = plan_of(arguments, environment["multiprocessors"])
    link = link_gb_s()
    nccl: dict[int, float] = {}
    remarks: list[str] = []

    def write(rows: list[Row]) -> None:  # after each step: little is lost where time runs out
        if arguments.json is not None:
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps(document(plan, environment, link, rows, nccl, remarks), indent=2, default=str)
            arguments.json.write_text(text + "\n")

    rows = measure_here(plan, environment, link, write)
    if ARENA not in os.environ:
        pinned, problem = pinned_rows(plan, argv)
        rows += pinned
        if problem:
            remarks.append(f"pinned arenas were not measured: {problem}")
        nccl, problem = loopback_nccl.measure(plan.nranks, arguments.sizes, nccl_version())
        remarks += [f"NCCL was not measured: {problem}"] if problem else []
        for size, us in nccl.items():
            print(f"# NCCL, {plan.nranks} ranks on one GPU, float32, {size} bytes: {us:.1f} us")
        write(rows)
        print(f"# {outcome_of(plan.nranks, rows)}")
    for remark in remarks:
        print(f"# {remark}")
    if arguments.json is not None:
        print(f"wrote {arguments.json}")
    wrong = sum(row.wrong for row in rows)
    if wrong:
        print(f"{wrong} elements were wrong", file=sys.stderr)
    return 1 if wrong else 0
