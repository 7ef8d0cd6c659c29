"""`make bench-network`: dpcomm between hosts beside gloo, at several rates of the links; and training across two hosts.

Hosts are network namespaces (hosts.py) with a rank or several in each. Writes network.json, .md and .png (with --dtype
bfloat16: network-bfloat16), train-network.json and .md. Exit status: 0, 1 where a result was wrong or replicas
differed, 2 where it could not run. How fast anything was does not change it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import network_picture as picture
import network_plan as plans
import network_report as report
import network_train_report as train_report
from allreduce import ELEM_BYTES, parse_size, why_not_importable
from environment import describe_environment
from hosts import Hosts, HostsError, hosts, why_no_hosts
from launch import COLLECTIVE_TIMEOUT_S, LaunchError, stop, wait
from train import words

FOLDER = Path(__file__).resolve().parent
PARTS = ["allreduce", "train"]
METHODS = ["stock", "fp16-hook", "none", "fp16", "forgetful"]
TRAINED = ["stock", "none", "fp16"]
TRAINING = "train-network"  # the other part's document
INTERFACE = "eth0"  # of every host
# torch warns of every connection whose name no server knows, which here is all.
QUIET = {"TORCH_CPP_LOG_LEVEL": "ERROR"}
START_S, SIZE_S = 120.0, 30.0  # what may be added to the planned time: by a run, and by checking a size


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--parts", type=words(PARTS), default=PARTS, help="with commas (default: allreduce,train)")
    add("--shapes", type=plans.parse_shapes, help="hosts x ranks on each, with commas (default: 2x1,3x1,2x2,3x2)")
    add("--rates", type=plans.parse_rates, help="Gb/s of each link, with commas (default: 0.1,1,5,unshaped)")
    add("--sizes", help="bytes, with commas (default: 64K,256K,1M,4M,25M,100M, fewer with several ranks)")
    of_all = plans.contestants_of(plans.FLOAT32)
    contestants = f"of all-reduce; flat: with several ranks a host (default: {of_all}; of bfloat16 without codecs)"
    add("--contestants", help=contestants)
    dtypes = [plans.FLOAT32, plans.BFLOAT16]
    add("--dtype", choices=dtypes, default=plans.FLOAT32, help="of all-reduce (%(default)s); others: network-DTYPE.*")
    add("--trained", type=words(METHODS), default=TRAINED, help="contestants of training (default: stock,none,fp16)")
    add("--seconds-per-size", type=float, help=f"for all contestants (default: {plans.SECONDS_PER_SIZE:g})")
    add("--quick", action="store_true", help="2x1, 2x2, 1 Gb/s, small sizes, a small model: in seconds; proves nothing")
    add("--out", type=Path, default=FOLDER / "results", metavar="FOLDER", help="(default: benchmarks/results)")
    add(
        "--add", action="store_true", help="keep what the file has of other shapes; their environment stays beside them"
    )
    add("--render", action="store_true", help="measure nothing: write pages and picture from the JSON files")
    add("--corrupt", metavar="NAME", help=argparse.SUPPRESS)  # spoils a contestant's results: must be noticed
    arguments = parser.parse_args(argv)
    default_s = plans.QUICK_SECONDS if arguments.quick else plans.SECONDS_PER_SIZE
    arguments.shapes = arguments.shapes or list(plans.QUICK_SHAPES if arguments.quick else plans.SHAPES)
    arguments.rates = arguments.rates or list(plans.QUICK_RATES if arguments.quick else plans.RATES)
    if arguments.seconds_per_size is None:
        arguments.seconds_per_size = default_s
    try:
        given = [parse_size(text) for text in arguments.sizes.split(",")] if arguments.sizes else []
    except argparse.ArgumentTypeError as error:
        parser.error(str(error))
    arguments.sizes = given or list(plans.QUICK_SIZES if arguments.quick else [])  # none: what each shape has
    if any(size % ELEM_BYTES for size in arguments.sizes):
        parser.error(f"--sizes: multiples of {ELEM_BYTES}")
    if not 0 <= arguments.seconds_per_size < 3600:
        parser.error("--seconds-per-size: 0 to 3600")
    return arguments


def measure_allreduce(arguments: argparse.Namespace, codecs: list[str]) -> dict[str, Any]:
    """All shapes and rates: the document that goes into network.json, or network-DTYPE.json.

    Raises:
        HostsError, LaunchError, ValueError: It could not run.
    """
    dtype = arguments.dtype
    selected = plans.parse_contestants(arguments.contestants or plans.contestants_of(dtype), codecs)
    planned = plans.runs(arguments.shapes, arguments.rates, arguments.sizes)
    skipped = plans.skipped_rows(planned)
    name = "network" if dtype == plans.FLOAT32 else f"network-{dtype}"
    document: dict[str, Any] = {"benchmark": name, "dtype": dtype, "environment": describe_environment()}
    document |= {"communicator": {}, "two_levels": {}}  # what they say of themselves, in the last run of each
    document["settings"] = {"contestants": selected, "seconds_per_size": arguments.seconds_per_size}
    document |= {"skipped": skipped, "rows": []}
    print(report.LEGEND, *(f"# {report.skipped_text(each)}" for each in skipped), report.header(), sep="\n", flush=True)
    for shape in arguments.shapes:
        with hosts(shape[0]) as net:
            for run in [run for run in planned if run[:2] == shape and run.sizes]:
                net.shape(run.gbit)
                plan = rank_plan(run, selected, arguments)
                found = run_ranks(net, "network_rank.py", plan, deadline_s(run, arguments.seconds_per_size))
                document["communicator" if run.ranks_per_host == 1 else "two_levels"] = found["communicator"]
                document["rows"] += found["rows"]
    return document


def rank_plan(run: plans.Run, selected: list[tuple[str, str]], arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "hosts": run.hosts,
        "ranks_per_host": run.ranks_per_host,
        "gbit": run.gbit,
        "sizes": run.sizes,
        # With one rank a host dpcomm is flat.
        "contestants": [each for each in selected if each[0] != plans.FLAT or run.ranks_per_host > 1],
        "seconds_per_size": arguments.seconds_per_size,
        "dtype": arguments.dtype,
        "corrupt": arguments.corrupt,
    }


def deadline_s(run: plans.Run, seconds_per_size: float) -> float:
    """Three times what the run is planned to take, and more for the start."""
    contestants, rounds = 8, plans.LEAST_ROUNDS + 1  # more than there are; the least, and the call that is checked
    line_s = sum(plans.line_s(plans.longest(size, run.hosts, run.ranks_per_host), run.gbit) for size in run.sizes)
    return START_S + len(run.sizes) * (3 * seconds_per_size + SIZE_S) + 3 * contestants * rounds * line_s


def measure_training(arguments: argparse.Namespace, codecs: list[str]) -> dict[str, Any]:
    """The document that goes into train-network.json.

    Raises:
        HostsError, LaunchError: It could not run.
    """
    how = plans.QUICK_TRAIN if arguments.quick else plans.TrainPlan()
    document = {"benchmark": TRAINING, "ranks": 2, "environment": describe_environment()}
    plan = {"hosts": 2, "ranks_per_host": 1, "train": how._asdict(), "methods": arguments.trained, "codecs": codecs}
    print(train_report.LEGEND, train_report.header(), sep="\n", flush=True)
    with hosts(2, how.gbit) as net:
        found = run_ranks(net, "network_train.py", plan, START_S + 3 * plans.train_s(how))
    return document | {"settings": how._asdict(), "rows": found["rows"]}


def run_ranks(net: Hosts, script: str, plan: dict[str, Any], deadline_s: float) -> dict[str, Any]:
    """Runs the plan's ranks on each host to their end. Returns what rank 0 wrote.

    Raises:
        LaunchError: A rank failed, or they did not end in time.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    store = net.inside(lambda: TCPStore(net.store_host, 0, is_master=True, wait_for_workers=False))
    added = {"store_host": net.store_host, "port": store.port, "collective_timeout_s": COLLECTIVE_TIMEOUT_S}
    processes: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rank0.json"
        command = [sys.executable, str(FOLDER / script), json.dumps(plan | added | {"out": str(out)})]
        try:
            for rank in range(net.count * plan["ranks_per_host"]):
                own = {"BENCHMARK_RANK": str(rank), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": INTERFACE}
                env = {**os.environ, **own, **QUIET}
                host = net.command(rank // plan["ranks_per_host"])
                processes.append(subprocess.Popen([*host, *command], env=env, start_new_session=True))
            wait(processes, time.monotonic() + deadline_s)
        finally:
            stop(processes)
        document: dict[str, Any] = json.loads(out.read_text())
    return document


def with_others(document: dict[str, Any], file: Path) -> dict[str, Any]:
    """Adds the rows that the file has of shapes which were not measured now, and what they were measured with."""
    before = json.loads(file.read_text())
    own = {plans.shape_of(row) for row in document["rows"]}
    kept = {key: [row for row in before[key] if plans.shape_of(row) not in own] for key in ("rows", "skipped")}
    if not kept["rows"]:
        return document
    shapes = [plans.shape_text(*shape) for shape in dict.fromkeys(map(plans.shape_of, kept["rows"]))]
    run = {"shapes": shapes, "environment": before["environment"], "settings": before["settings"]}
    merged = {key: kept[key] + document[key] for key in kept}
    communicators = {key: document[key] or before.get(key, {}) for key in ("communicator", "two_levels")}
    return document | merged | communicators | {"other_runs": [run]}


def write(document: dict[str, Any], folder: Path, add: bool = False) -> list[str]:
    """The files of one part; `add`: see `with_others`. Returns the goals as text."""
    folder.mkdir(parents=True, exist_ok=True)
    training = document["benchmark"] == TRAINING
    file = folder / f"{document['benchmark']}.json"
    if add and not training and file.is_file():
        document = with_others(document, file)
    found = train_report.outcomes(document["rows"]) if training else report.outcomes_of(document)
    document["goals"] = [vars(outcome) for outcome in found]
    file.write_text(json.dumps(document, indent=1, default=str) + "\n")
    file.with_suffix(".md").write_text((train_report if training else report).markdown(document))
    if not training:
        picture.draw(document["rows"], file.with_suffix(".png"), report.dtype_of(document))
    print(f"wrote {file}, {'.md' if training else '.md and .png'} beside it", flush=True)
    return [f"goal: {outcome}" for outcome in found]


def documents_of(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Those that are in the folder already."""
    names = ("network", f"network-{plans.BFLOAT16}", TRAINING)
    files = [arguments.out / f"{name}.json" for name in names]
    return [json.loads(file.read_text()) for file in files if file.is_file()]


def main(argv: list[str]) -> int:
    arguments = parse_arguments(argv)
    if problem := why_not_importable("dpcomm"):
        print(f"dpcomm is not built for this Python ({problem}): run `make venv`", file=sys.stderr)
        return 2
    if not arguments.render and (problem := why_no_hosts()):
        print(problem, file=sys.stderr)
        return 2
    from dpcomm import _native

    codecs = [name for name in _native.CODECS if name != "bf16"]  # which is of engine nccl
    parts = {"allreduce": measure_allreduce, "train": measure_training}
    goals, rows = [], []
    try:
        makers = [parts[name] for name in PARTS if name in arguments.parts and not arguments.render]
        # Each part is written before the next one begins.
        for document in documents_of(arguments) if arguments.render else (make(arguments, codecs) for make in makers):
            goals += write(document, arguments.out, arguments.add)
            rows += document["rows"]
    except (ValueError, HostsError, LaunchError) as error:
        print(error, file=sys.stderr)
        return 2
    print("\n".join(goals))
    reduced = [row for row in rows if "wrong" in row]
    for text in report.doubtful_rows(reduced):
        print(f"doubtful: {text}", file=sys.stderr)
    wrong = report.wrong_rows(reduced)
    wrong += train_report.differing([row for row in rows if "seed" in row])
    for text in wrong:
        print(text, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
