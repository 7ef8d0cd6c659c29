"""The report behind `make bench`: gloo, Open MPI, PyTorch's fp16 hook and dpcomm, called from Python, in one run.

For each rank count one interleaved run (interleave.py says how), which leaves python-Nranks.json and a picture; then
report.md from all JSON files that are there, rivals.py's included. --render only writes report.md and pictures.
Exit status: 0, 1 where a result was wrong, 2 where it could not run.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from allreduce import ELEM_BYTES, parse_size, why_not_importable
from launch import LaunchError, run_ranks, why_no_openmpi

NAMES = ["gloo", "openmpi", "fp16_compress_hook", "dpcomm"]
SIZES = "256,1K,4K,16K,64K,256K,1M,4M,8M,25M,100M,256M"
RESULTS = Path(__file__).resolve().parent / "results"
CACHES, ROUNDS = ["hot", "cold"], 8
SECONDS_PER_SIZE, SECONDS_CROWDED = 24.0, 14.0  # of two ranks, of more: those take longer to verify
START_S, SLOWEST_SIZE_S = 120.0, 600.0  # what a run may take beyond its budget


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--ranks", default="2,4,8", help="a run for each, with commas (default: 2,4,8)")
    add("--sizes", default=SIZES, help=f"bytes, with commas (default: {SIZES})")
    add(
        "--contestants",
        default=",".join(NAMES),
        help="NAME or NAME:VARIANT, as dpcomm:none/ring (default: %(default)s)",
    )
    add(
        "--seconds-per-size",
        type=float,
        help=f"for all contestants (default: {SECONDS_PER_SIZE:g}, {SECONDS_CROWDED:g} for more than two ranks)",
    )
    add("--threads", type=int, default=1, help="torch's threads in each process (default: 1)")
    add("--out", type=Path, default=RESULTS, metavar="FOLDER", help="for the files (default: benchmarks/results)")
    add("--render", action="store_true", help="measure nothing: write report.md and pictures from the JSON files")
    add("--corrupt", metavar="NAME", help=argparse.SUPPRESS)  # spoils a contestant's results: must be noticed
    arguments = parser.parse_args(argv)
    try:
        arguments.ranks = [int(text) for text in arguments.ranks.split(",")]
        arguments.sizes = [parse_size(text) for text in arguments.sizes.split(",")]
    except (ValueError, argparse.ArgumentTypeError) as error:
        parser.error(str(error))
    if min(arguments.ranks) < 2:
        parser.error("--ranks: at least 2, since one rank has nothing to communicate")
    if any(size % ELEM_BYTES for size in arguments.sizes):
        parser.error(f"--sizes: multiples of {ELEM_BYTES}")
    if arguments.threads < 1 or not 0 <= (arguments.seconds_per_size or 0) < 3600:
        parser.error("--threads must be at least 1, --seconds-per-size between 0 and 3600")
    return arguments


def plan_of(arguments: argparse.Namespace, ranks: int, absent: dict[str, str]) -> dict[str, Any]:
    """What the rank processes are told.

    Raises:
        ValueError: A contestant that does not exist.
    """
    from contestants import select

    default = SECONDS_PER_SIZE if ranks == 2 else SECONDS_CROWDED
    seconds = default if arguments.seconds_per_size is None else arguments.seconds_per_size
    return {
        "ranks": ranks,
        "sizes": sorted(arguments.sizes),
        "contestants": [each for each in select(arguments.contestants.split(",")) if each[0] not in absent],
        "seconds_per_size": seconds,
        "caches": CACHES,
        "rounds": ROUNDS,
        "threads": arguments.threads,
        "corrupt": arguments.corrupt,
        "command": shlex.join(["python", *sys.argv]),
    }


def measure(plan: dict[str, Any], absent: dict[str, str]) -> dict[str, Any]:
    """One run: the document that goes into python-Nranks.json.

    Raises:
        LaunchError: It could not run.
    """
    deadline_s = START_S + SLOWEST_SIZE_S + len(plan["sizes"]) * (plan["seconds_per_size"] * 2 + 10)
    with_mpirun = ["openmpi", ""] in [list(each) for each in plan["contestants"]]
    measured = run_ranks(plan, with_mpirun, deadline_s)
    settings = {key: value for key, value in plan.items() if key not in ("ranks", "command")}
    return {"benchmark": "python", "ranks": plan["ranks"], **measured, "absent": absent, "settings": settings}


def absent_contestants(specifications: list[str]) -> dict[str, str]:
    """Who was asked for and cannot take part, and why."""
    asked = {specification.partition(":")[0] for specification in specifications}
    reason = why_no_openmpi() if "openmpi" in asked else ""
    return {"openmpi": reason} if reason else {}


def wrong_rows(documents: list[dict[str, Any]]) -> list[str]:
    """A line for each row with wrong elements."""
    return [
        f"{document['ranks']} ranks, {row['contender']} {row['variant']}, {row['size_bytes']} bytes, {row['cache']}: "
        f"{row['wrong']} elements were wrong"
        for document in documents
        for row in document["rows"]
        if row["wrong"]
    ]


def main(argv: list[str]) -> int:
    arguments = parse_arguments(argv)
    if problem := why_not_importable("dpcomm"):
        print(f"dpcomm is not built for this Python ({problem}): run `make venv`", file=sys.stderr)
        return 2
    arguments.out.mkdir(parents=True, exist_ok=True)
    documents = []
    try:
        absent = {} if arguments.render else absent_contestants(arguments.contestants.split(","))
        for ranks in [] if arguments.render else arguments.ranks:
            plan = plan_of(arguments, ranks, absent)
            print(f"# {ranks} ranks; absent: {absent or 'nobody'}", flush=True)
            documents.append(measure(plan, absent))
            file = arguments.out / f"python-{ranks}ranks.json"
            file.write_text(json.dumps(documents[-1], indent=1) + "\n")
            print(f"wrote {file}", flush=True)
    except (ValueError, LaunchError) as error:
        print(error, file=sys.stderr)
        return 2
    from render import write_report

    print(f"wrote {write_report(arguments.out)}")
    wrong = wrong_rows(documents)
    print("\n".join(wrong), file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
