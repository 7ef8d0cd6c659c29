"""One rank of the report's measurement: verifies and times every size, and writes the rows if it is rank 0.

report.py starts it, by mpirun or by itself, with a plan in JSON as its only argument.
"""

import dataclasses
import datetime
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from contestants import Contestant, make, mpi
from environment import describe_environment
from interleave import ELEM_BYTES, Buffers, Cell, Plan, flush_bytes, time_in_turns
from measure import percentile
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from tqdm import tqdm
from verification import Verdict, verify

import dpcomm


@dataclasses.dataclass
class Row:
    """One contestant at one size; the fields of rivals.py, as far as they are measured here."""

    contender: str
    variant: str
    size_bytes: int
    cache: str
    calls: int
    median_us: float  # of the slowest rank, as p95_us
    p95_us: float
    algbw_gb_s: float
    wrong: int
    error: float  # relative L2 against fp64
    floor_us: float | None = None
    floor_fraction: float | None = None  # of the floor's speed that was reached


def main(plan: dict[str, Any]) -> None:
    environment = describe_environment() | {"command": plan["command"]}  # before MPI starts, which dislikes forks
    rank = int(os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ["BENCHMARK_RANK"])
    timeout = datetime.timedelta(seconds=plan["collective_timeout_s"])
    store = TCPStore("127.0.0.1", plan["port"], is_master=False, timeout=timeout)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=plan["ranks"], timeout=timeout)
    torch.set_num_threads(plan["threads"])
    selected = [(name, variant) for name, variant in plan["contestants"]]
    buffers = Buffers(max(plan["sizes"]) // ELEM_BYTES)
    with dpcomm.Communicator() as comm:
        facts = {
            "communicator": comm.describe(),
            "dpcomm": dpcomm.info(),
            "mpi": mpi().Get_library_version().split(", package")[0] if ("openmpi", "") in selected else "",
            "torch_threads": torch.get_num_threads(),
            "flush_bytes": flush_bytes(),
        }
        rows = measure(make(selected, comm, buffers.source), plan, buffers)
    if rank == 0:
        document = {"environment": environment | facts, "rows": [dataclasses.asdict(row) for row in rows]}
        Path(plan["out"]).write_text(json.dumps(document, default=str))
    dist.destroy_process_group()


def measure(contestants: list[Contestant], plan: dict[str, Any], buffers: Buffers) -> list[Row]:
    """The rows of all sizes; rank 0 shows how far it is. Collective."""
    first = dist.get_rank() == 0
    how = Plan(plan["seconds_per_size"], tuple(plan["caches"]), plan["rounds"])
    turns = len(contestants) * len(how.caches) * how.rounds * len(plan["sizes"])
    rows: list[Row] = []
    with tqdm(total=turns, unit="turn", leave=False, disable=None if first else True) as bar:
        for size in plan["sizes"]:
            bar.set_description(f"{size} bytes")
            new = measure_size(contestants, size, how, buffers, plan["corrupt"], bar.update)
            rows += new
            for row in new if first else []:
                wrong = f"  {row.wrong} ELEMENTS WRONG" if row.wrong else ""
                name = f"{row.contender} {row.variant}".strip()
                bar.write(
                    f"{row.size_bytes:10d}  {row.cache:4}  {name:18}  {row.median_us:11.1f} us  "
                    f"p95 {row.p95_us:11.1f}  {row.calls:6d} calls{wrong}",
                    file=sys.stdout,
                )
            sys.stdout.flush()
    return rows


def measure_size(
    contestants: list[Contestant], size: int, how: Plan, buffers: Buffers, corrupt: str | None, advance: Any
) -> list[Row]:
    """Verifies everybody, then times everybody. Collective.

    Args:
        corrupt: a check of the check: the name of a contestant whose results are spoiled.
    """
    elems = size // ELEM_BYTES
    present = [each for each in contestants if each.most_bytes is None or size <= each.most_bytes]
    verdicts = {
        (each.name, each.variant): verify(each.as_sum, elems, each.precision, "bit" if each.name == corrupt else None)
        for each in present
        if each.sums
    }
    cells = time_in_turns(present, elems, how, buffers, advance)
    floors = {cell.cache: statistics.median(times) for cell, times in cells if not cell.contestant.sums}
    return [
        row_of(cell, times, size, verdicts.get((cell.contestant.name, cell.contestant.variant)), floors[cell.cache])
        for cell, times in cells
    ]


def row_of(cell: Cell, times: list[float], size: int, verdict: Verdict | None, floor_us: float) -> Row:
    median = statistics.median(times)
    return Row(
        contender=cell.contestant.name,
        variant=cell.contestant.variant,
        size_bytes=size,
        cache=cell.cache,
        calls=len(times),
        median_us=median,
        p95_us=percentile(times, 95),
        algbw_gb_s=size / median / 1e3,
        wrong=verdict.wrong if verdict else 0,
        error=verdict.error if verdict else 0.0,
        floor_us=floor_us,
        floor_fraction=floor_us / median,
    )


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
