"""Step times of data-parallel training: stock DDP over gloo, PyTorch's fp16 hook, dpcomm; how it measures:
train_measure.py.

Starts its own processes on this host, for each number of ranks anew. Exit status: 0, 1 where replicas differed, 2 where
it could not run.
"""

import argparse
import dataclasses
import datetime
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import train_report as report
from allreduce import why_not_importable
from environment import describe_environment
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, spawn
from tqdm import tqdm

if TYPE_CHECKING:
    from train_models import Contestant, Task  # imports dpcomm, which main() must find missing in its own words

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))  # the GPT is that of examples/lm
MODELS = ["mlp", "gpt"]
CONTESTANTS = ["stock", "fp16-hook", "none", "fp16"]
COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=5)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    add = parser.add_argument
    add("--ranks", type=numbers(int), default=[2, 4], help="processes on this host, with commas (default: 2,4)")
    add("--models", type=words(MODELS), default=MODELS, help="with commas (default: mlp,gpt)")
    add("--buckets", type=numbers(float), default=[1, 4, 25, 100], help="bucket_cap_mb (default: 1,4,25,100)")
    add(
        "--contestants",
        type=words([*CONTESTANTS, "forgetful"]),
        default=CONTESTANTS,
        help=f"with commas (default: {','.join(CONTESTANTS)})",
    )
    add("--budget", type=float, default=20.0, help="seconds for each model, ranks and bucket size (default: 20)")
    add("--batch", type=int, default=32, help="samples a rank of the MLP takes in one step (default: 32)")
    add("--gpt-batch", type=int, default=2, help="windows a rank of the GPT takes in one step (default: 2)")
    add("--layers", type=int, default=8, help="of the MLP (default: 8)")
    add("--width", type=int, default=1024, help="of the MLP (default: 1024)")
    add("--seed", type=int, default=0, help="of weights and data (default: 0)")
    add("--threads", type=int, default=1, help="torch's threads in each process (default: 1)")
    add("--out", type=Path, metavar="FOLDER", help="write train-Nranks.json and train-Nranks.png")
    add("--trace", type=Path, metavar="FOLDER", help="write a chrome trace of rank 0 for each contestant")
    add("--markdown", action="store_true", help="print the table once more, for a Markdown page")
    arguments = parser.parse_args(argv)
    counts = [arguments.batch, arguments.gpt_batch, arguments.layers, arguments.width, arguments.threads]
    if min(counts) < 1:
        parser.error("--batch, --gpt-batch, --layers, --width and --threads must be at least 1")
    if min(arguments.ranks) < 2:
        parser.error("--ranks: one rank has nothing to communicate; at least 2")
    if not arguments.budget >= 0:
        parser.error("--budget must be 0 or more seconds")
    return arguments


def numbers(kind: type) -> Any:
    """A parser of positive numbers with commas between them."""

    def parse(text: str) -> list[Any]:
        try:
            values = [kind(part) for part in text.split(",")]
        except ValueError:
            values = []
        if not values or not all(0 < value < float("inf") for value in values):
            raise argparse.ArgumentTypeError(f"{text!r}: expected positive numbers with commas between them")
        return values

    return parse


def words(known: list[str]) -> Any:
    """A parser of some of the known words with commas between them."""

    def parse(text: str) -> list[str]:
        chosen = list(dict.fromkeys(text.split(",")))
        if unknown := [word for word in chosen if word not in known]:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: expected some of {','.join(known)}")
        return chosen

    return parse


def tasks(arguments: argparse.Namespace) -> "list[Task]":
    from train_models import gpt_task, mlp_task

    made = {
        "mlp": lambda: mlp_task(arguments.layers, arguments.width, arguments.batch, arguments.seed),
        "gpt": lambda: gpt_task(arguments.gpt_batch, arguments.seed),
    }
    return [made[name]() for name in arguments.models]


def measure_all(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One rank's part of all configurations; rank 0 prints. Collective."""
    from train_measure import measure
    from train_models import METHODS

    first = dist.get_rank() == 0
    methods = [METHODS[name] for name in arguments.contestants]
    configurations = [(task, cap) for task in tasks(arguments) for cap in arguments.buckets]
    rows: list[dict[str, Any]] = []
    with tqdm(total=len(configurations), leave=False, disable=None if first else True) as bar:
        for task, cap in configurations:
            bar.set_description(f"{dist.get_world_size()} ranks, {task.name}, {cap:g} MB")
            new, contestants = measure(
                task, methods, cap, arguments.budget, lambda turns, s: bar.set_postfix_str(f"turn {turns}, {s:.0f} s")
            )
            rows += [dataclasses.asdict(row) for row in new]
            said = [report.line(dataclasses.asdict(row)) for row in new]
            if arguments.trace is not None:
                said += trace_all(contestants, arguments.trace, f"{task.name}-{dist.get_world_size()}ranks-{cap:g}MB")
            for contestant in contestants:
                contestant.close()
            for text in said if first else []:
                bar.write(text, file=sys.stdout)
            sys.stdout.flush()
            bar.update()
    return rows


def trace_all(contestants: "list[Contestant]", folder: Path, prefix: str) -> list[str]:
    """A trace of each contestant, as files of rank 0. Collective; returns what to tell."""
    from train_trace import trace

    said = []
    for contestant in contestants:
        name = contestant.method.name.replace(",", "").replace(" ", "-")
        file = folder / f"{prefix}-{name}.json"
        said.append(f"wrote {file}: {trace(contestant, file)}")
    return said


def run_rank(rank: int, nranks: int, port: int, arguments: argparse.Namespace, file: Path) -> None:
    """One of the processes that `start_ranks` starts; rank 0 leaves its rows in the file."""
    torch.set_num_threads(arguments.threads)
    store = TCPStore("127.0.0.1", port, is_master=False, timeout=COLLECTIVE_TIMEOUT)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=nranks, timeout=COLLECTIVE_TIMEOUT)
    rows = measure_all(arguments)
    if rank == 0:
        file.write_text(json.dumps(rows))
    dist.destroy_process_group()


def start_ranks(nranks: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures all configurations of one number of ranks, in processes of their own. Returns the rows."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=COLLECTIVE_TIMEOUT)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "rows.json")
        spawn(run_rank, (nranks, store.port, arguments, file), nprocs=nranks)  # type: ignore[no-untyped-call]
        rows: list[dict[str, Any]] = json.loads(file.read_text())
        return rows


def write(rows: list[dict[str, Any]], arguments: argparse.Namespace, environment: dict[str, object]) -> None:
    """The files that --out asks for, of one number of ranks."""
    nranks = rows[0]["ranks"]
    chosen = ("contestants", "budget", "batch", "gpt_batch", "layers", "width", "seed", "threads")
    settings = {name: getattr(arguments, name) for name in chosen}
    document = {"benchmark": "train", "ranks": nranks, "environment": environment, "settings": settings, "rows": rows}
    arguments.out.mkdir(parents=True, exist_ok=True)
    json_file = arguments.out / f"train-{nranks}ranks.json"
    json_file.write_text(json.dumps(document, indent=2, default=str) + "\n")
    report.draw(rows, f"Data-parallel training, {nranks} ranks, {environment['cpu']}", json_file.with_suffix(".png"))
    print(f"wrote {json_file} and {json_file.with_suffix('.png')}")


def main(argv: list[str]) -> int:
    arguments = parse_arguments(argv)
    if problem := why_not_importable("dpcomm"):
        print(
            f"dpcomm is not built for this Python ({problem}): run `make venv`, then .venv/bin/python", file=sys.stderr
        )
        return 2
    import dpcomm

    environment = describe_environment() | {"dpcomm": dpcomm.info()}
    print(f"# {environment['cpu']}, {environment['cores']} cores, torch {environment['torch']}")
    print(f"# samples a rank takes in a step: mlp {arguments.batch}, gpt {arguments.gpt_batch}")
    print(report.LEGEND, report.header(), sep="\n", flush=True)
    rows: list[dict[str, Any]] = []
    for nranks in arguments.ranks:
        try:
            rows += start_ranks(nranks, arguments)
        except (ProcessRaisedException, ProcessExitedException) as failure:
            print(failure, file=sys.stderr)
            return 2
        if arguments.out is not None:
            write([row for row in rows if row["ranks"] == nranks], arguments, environment)
    if arguments.markdown:
        print("\n" + report.markdown(rows))
    differing = [row["contestant"] for row in rows if not row["replicas_identical"]]
    if differing:
        print(f"replicas differed: {', '.join(dict.fromkeys(differing))}", file=sys.stderr)
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
