"""All-reduce times of dpcomm beside gloo's, with the flags and columns of nccl-tests; how it measures: measure.py.

Starts its own processes on this host; under torchrun it is one of them. Every size is verified before it is timed.
Exit status: 0, 1 where an element was wrong, 2 where it could not run.
"""

import argparse
import dataclasses
import datetime
import importlib
import json
import multiprocessing
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from environment import describe_environment
from plots import draw_allreduce
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.multiprocessing.spawn import ProcessRaisedException, spawn
from tqdm import tqdm
from verification import UNIT_ROUNDOFF

if TYPE_CHECKING:
    from multiprocessing.queues import SimpleQueue

    from measure import Row  # imports dpcomm, which main() must find missing in its own words

ELEM_BYTES = 4  # float32
DEFAULT_SIZES = [4 << 10, 64 << 10, 1 << 20, 25 << 20, 100 << 20]
COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=5)
HEADS = [
    ("size(B)", 11),
    ("count", 10),
    ("type", 8),
    ("codec", 6),
    ("time(us)", 10),
    ("p95(us)", 10),
    ("algbw(GB/s)", 11),
    ("busbw(GB/s)", 11),
    ("wire(B)", 10),
    ("#wrong", 6),
    ("error", 8),
    ("gloo(us)", 10),
    ("ratio", 6),
]


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("-b", dest="begin", type=parse_size, metavar="BYTES", help="smallest size, as in 4K, 1M, 2G")
    add("-e", dest="end", type=parse_size, metavar="BYTES", help="largest size (default: the smallest)")
    add("-f", dest="factor", type=float, default=2.0, help="each size is the one before times this (default: 2)")
    add(
        "-n",
        dest="iterations",
        type=int,
        default=100,
        help="timed calls of each size and codec, at least (default: 100)",
    )
    add("-w", dest="warmup", type=int, default=10, help="untimed calls before them (default: 10)")
    add("--ranks", type=int, default=2, help="processes to start; ignored under torchrun (default: 2)")
    add("--engine", default="auto", help="what carries the bytes (default: auto)")
    add(
        "--virtual-ranks",
        type=int,
        metavar="N",
        help="with --engine p2p: N ranks on one GPU; -n, -w, --vs, --threads have no effect",
    )
    add(
        "--max-ctas",
        type=whole_numbers,
        metavar="N,N",
        help="with --virtual-ranks: CTAs of a rank (default: 1,2,4...64)",
    )
    add("--codec", type=lambda text: text.split(","), default=["none", "fp16"], help="with commas (default: none,fp16)")
    add("--algorithm", default="auto", help="auto, direct, oneshot or ring (default: auto)")
    add("--vs", choices=["gloo", "nothing"], default="gloo", help="whom to compare with (default: gloo)")
    add("--threads", type=int, default=1, help="torch's threads in each process (default: 1)")
    add("--json", type=Path, metavar="FILE", help="write the rows and a description of the machine")
    add("--plot", type=Path, metavar="FILE", help="write a PNG: time and speed-up against size")
    add("--corrupt", choices=["bit", "value"], help=argparse.SUPPRESS)  # spoils results: verification must notice
    arguments = parser.parse_args(argv)
    if min(arguments.iterations, arguments.ranks, arguments.threads) < 1 or arguments.warmup < 0:
        parser.error("-n, --ranks and --threads must be at least 1, -w at least 0")
    if arguments.factor <= 1:
        parser.error("-f must be greater than 1")
    if arguments.virtual_ranks is not None and (arguments.engine != "p2p" or arguments.virtual_ranks < 2):
        parser.error("--virtual-ranks needs --engine p2p and must be at least 2")
    if arguments.virtual_ranks is not None and (arguments.plot or arguments.corrupt):
        parser.error("--plot and --corrupt do not serve --virtual-ranks")
    if arguments.virtual_ranks is None and arguments.max_ctas is not None:
        parser.error("--max-ctas needs --virtual-ranks")
    arguments.sizes = sizes(arguments.begin, arguments.end, arguments.factor)
    if not arguments.sizes:
        parser.error("-b must not be greater than -e")
    unknown = set(arguments.codec) - {"none", *UNIT_ROUNDOFF}
    if unknown:
        parser.error(f"--codec: no bound is known for {', '.join(sorted(unknown))}")
    return arguments


def whole_numbers(text: str) -> list[int]:
    """ "1,16" as [1, 16]."""
    if not all(part.isdecimal() and int(part) > 0 for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r}: expected whole numbers above 0, with commas between them")
    return [int(part) for part in text.split(",")]


def parse_size(text: str) -> int:
    """Bytes of "512", "4K", "1M" or "2G"; 1K is 1024."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    unit = units.get(text[-1:].upper(), 1)
    number = text if unit == 1 else text[:-1]
    if not number.isdecimal() or int(number) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size: write a number, with K, M or G after it")
    return int(number) * unit


def sizes(begin: int | None, end: int | None, factor: float) -> list[int]:
    """Sizes in bytes, each rounded up to whole elements. Neither end given: the README's sizes."""
    if begin is None and end is None:
        return DEFAULT_SIZES
    size: float = begin if begin is not None else min(DEFAULT_SIZES[0], end or DEFAULT_SIZES[0])
    last = end if end is not None else size
    found = []
    while size <= last:
        found.append(-(-int(size) // ELEM_BYTES) * ELEM_BYTES)
        size *= factor
    return found


def header(comm_facts: dict[str, object], environment: dict[str, object], nranks: int) -> str:
    """What was measured where, and the names of the columns."""
    facts = f"{nranks} ranks, engine {comm_facts['engine']}, instructions {comm_facts.get('simd', '-')}"
    machine = f"{environment['cpu']}, {environment['cores']} cores, torch {environment['torch']}"
    return "\n".join(
        [
            f"# {facts}; {machine}",
            "# times: of the slowest rank; error: relative L2 against fp64; wire: sent by the busiest rank in a call",
            "  ".join(name.rjust(width) for name, width in HEADS),
        ]
    )


def line(row: "Row") -> str:
    """One row of the table."""
    gloo = "-" if row.gloo_median_us is None else f"{row.gloo_median_us:.1f}"
    ratio = "-" if row.ratio is None else f"{row.ratio:.2f}"
    cells = [
        str(row.size_bytes),
        str(row.count),
        row.type,
        row.codec,
        f"{row.median_us:.1f}",
        f"{row.p95_us:.1f}",
        f"{row.algbw_gb_s:.2f}",
        f"{row.busbw_gb_s:.2f}",
        str(row.wire_bytes),
        str(row.wrong),
        f"{row.error:.1e}",
        gloo,
        ratio,
    ]
    return "  ".join(cell.rjust(width) for cell, (_, width) in zip(cells, HEADS, strict=True))


def measure_all(arguments: argparse.Namespace) -> int:
    """One rank's whole benchmark; rank 0 prints and writes. Returns how many elements were wrong. Collective."""
    from measure import Subject, measure_size, planned_calls

    import dpcomm

    first = dist.get_rank() == 0
    environment = describe_environment() | {"dpcomm": dpcomm.info()}
    rows: list[Row] = []
    with dpcomm.Communicator(engine=arguments.engine, algorithm=arguments.algorithm) as comm:
        subjects = [Subject(comm, codec) for codec in arguments.codec]
        facts = comm.describe()
        if first:
            print(header(facts, environment, dist.get_world_size()), flush=True)
        contestants = len(subjects) + (arguments.vs == "gloo")
        planned = [
            planned_calls(size // ELEM_BYTES, arguments.iterations, arguments.warmup) for size in arguments.sizes
        ]
        calls = contestants * sum(planned)
        with tqdm(total=calls, unit="call", leave=False, disable=None if first else True) as bar:
            for size in arguments.sizes:
                bar.set_description(f"{size} bytes")
                new = measure_size(
                    subjects,
                    arguments.vs == "gloo",
                    size // ELEM_BYTES,
                    arguments.iterations,
                    arguments.warmup,
                    arguments.corrupt,
                    bar.update,
                )
                rows += new
                for row in new if first else []:
                    bar.write(line(row), file=sys.stdout)
                    sys.stdout.flush()
    if first:
        write(arguments, environment | {"communicator": facts}, [dataclasses.asdict(row) for row in rows])
    return sum(row.wrong for row in rows)


def write(arguments: argparse.Namespace, environment: dict[str, object], rows: list[dict[str, object]]) -> None:
    """The files that --json and --plot ask for."""
    nranks = dist.get_world_size()
    if arguments.json is not None:
        document = {"benchmark": "allreduce", "ranks": nranks, "environment": environment, "rows": rows}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(document, indent=2, default=str) + "\n")
        print(f"wrote {arguments.json}")
    if arguments.plot is not None:
        arguments.plot.parent.mkdir(parents=True, exist_ok=True)
        draw_allreduce(rows, f"All-reduce, {nranks} ranks, float32", arguments.plot)
        print(f"wrote {arguments.plot}")


def run_rank(rank: int, port: int, arguments: argparse.Namespace, wrong: "SimpleQueue[int]") -> None:
    """One of the processes that `start_ranks` starts."""
    store = TCPStore("127.0.0.1", port, is_master=False, timeout=COLLECTIVE_TIMEOUT)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=arguments.ranks, timeout=COLLECTIVE_TIMEOUT)
    count = measure_in_group(arguments)
    if rank == 0:
        wrong.put(count)


def measure_in_group(arguments: argparse.Namespace) -> int:
    torch.set_num_threads(arguments.threads)
    count = measure_all(arguments)
    dist.destroy_process_group()
    return count


def start_ranks(arguments: argparse.Namespace) -> int:
    """Runs the benchmark in processes of its own. Returns how many elements were wrong."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=COLLECTIVE_TIMEOUT)
    wrong: SimpleQueue[int] = multiprocessing.get_context("spawn").SimpleQueue()
    spawn(run_rank, (store.port, arguments, wrong), nprocs=arguments.ranks)  # type: ignore[no-untyped-call]
    return wrong.get()


def main(argv: list[str]) -> int:
    arguments = parse_arguments(argv)
    if problem := why_not_importable("dpcomm"):
        print(
            f"dpcomm is not built for this Python ({problem}): run `make venv`, then .venv/bin/python", file=sys.stderr
        )
        return 2
    if arguments.virtual_ranks is not None:
        import loopback  # imports dpcomm

        return loopback.main(arguments, argv)
    if "RANK" in os.environ:
        dist.init_process_group("gloo", timeout=COLLECTIVE_TIMEOUT)
        wrong = measure_in_group(arguments)
    else:
        try:
            wrong = start_ranks(arguments)
        except ProcessRaisedException as failure:
            print(failure, file=sys.stderr)
            return 2
    if wrong:
        print(f"{wrong} elements were wrong", file=sys.stderr)
    return 1 if wrong else 0


def why_not_importable(module: str) -> str:
    """Empty where the module can be imported, else the reason."""
    try:
        importlib.import_module(module)
    except ImportError as problem:
        return str(problem)
    return ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
