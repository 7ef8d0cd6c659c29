"""Trains a small GPT in data-parallel processes, gradients averaged by stock DDP or by dpcomm, and reports the times.

Run by itself it starts its processes with torchrun; under torchrun it is one of them. The parts are in `lm/`.
"""

import argparse
import datetime
import importlib
import logging
import os
import shlex
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from lm import report
from lm.data import ByteWindows, load_text
from lm.model import ModelShape, count_parameters, seeded_model
from lm.training import WARMUP_STEPS, Method, Run, Settings, measure_allreduce
from tqdm import tqdm

DEMO = [Method("stock", "none"), Method("dpcomm", "none"), Method("dpcomm", "fp16")]
TURN_STEPS = 10  # runs take turns of this many steps: all meet the same state of the machine
COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=5)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--demo", action="store_true", help="train three times from the same seed: stock, dpcomm none, dpcomm fp16")
    add("--hook", choices=["stock", "dpcomm"], default="dpcomm", help="who averages gradients (default: dpcomm)")
    add("--codec", choices=["none", "fp16"], default="fp16", help="what dpcomm puts on the wire (default: fp16)")
    add("--nproc", type=positive, default=2, help="processes to start; ignored under torchrun (default: 2)")
    add("--text", type=Path, metavar="FILE", help="text to learn (default: the Python standard library's sources)")
    add("--steps", type=positive, default=300, help="optimizer steps of each run (default: 300)")
    add("--batch", type=positive, default=2, help="sequences a rank takes in one step (default: 2)")
    add("--seed", type=int, default=0, help="of weights and data order (default: 0)")
    add("--bucket-cap-mb", type=float, default=4.0, help="size of DDP's gradient buckets in MiB (default: 4)")
    add("--layers", type=positive, default=ModelShape.layers, help=f"(default: {ModelShape.layers})")
    add("--width", type=positive, default=ModelShape.width, help=f"a multiple of 4 (default: {ModelShape.width})")
    add("--context", type=positive, default=ModelShape.context, help=f"in bytes (default: {ModelShape.context})")
    add("--out", type=Path, metavar="FOLDER", help="for report.json, report.png (default: runs/demo or runs/train)")
    arguments = parser.parse_args(argv)
    if arguments.steps <= WARMUP_STEPS + 1:
        parser.error(f"--steps must be at least {WARMUP_STEPS + 2}: the first {WARMUP_STEPS} are not timed")
    if arguments.width % ModelShape.heads:
        parser.error(f"--width must be a multiple of {ModelShape.heads}, the number of attention heads")
    if arguments.text is not None and not os.access(arguments.text, os.R_OK):
        parser.error(f"--text: {arguments.text} cannot be read")
    if arguments.out is None:
        arguments.out = Path("runs", "demo" if arguments.demo else "train")
    return arguments


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def methods_of(arguments: argparse.Namespace) -> list[Method]:
    if arguments.demo:
        return DEMO
    return [Method(arguments.hook, arguments.codec if arguments.hook == "dpcomm" else "none")]


def launch(nproc: int, argv: list[str]) -> int:
    """Starts this script under torchrun on this host; returns torchrun's exit status."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc)]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}  # one core a rank; torchrun warns where it is not set
    return subprocess.run([*torchrun, str(Path(__file__).resolve()), *argv], env=environment, check=False).returncode


class Progress:
    """Rank 0's view of the runs: a bar for each on a terminal, else a line after each turn."""

    def __init__(self, runs: list[Run], steps: int) -> None:
        self._visible = dist.get_rank() == 0
        self._on_terminal = self._visible and sys.stderr.isatty()
        self._bars = [
            tqdm(
                total=steps,
                desc=f"{run.method.name:<15}",
                position=i,
                disable=not self._on_terminal,
                bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
            )
            for i, run in enumerate(runs)
        ]

    def stepped(self, index: int, run: Run) -> None:
        bar = self._bars[index]
        bar.set_postfix_str(self._figures(run), refresh=False)
        bar.update()

    def turn_ended(self, run: Run) -> None:
        if self._visible and not self._on_terminal:
            print(f"{run.method.name:<15}  step {len(run.losses):>4}  {self._figures(run)}", flush=True)

    def close(self) -> None:
        for bar in self._bars:
            bar.close()

    @staticmethod
    def _figures(run: Run) -> str:
        step = f"{1e3 * run.step_s[-1]:.0f} ms" if run.step_s else "-"
        exposed = f"{1e3 * run.exposed_s[-1]:.1f} ms" if run.exposed_s else "-"
        return f"loss {run.losses[-1]:.3f}, step {step}, exposed communication {exposed}"


def train(runs: list[Run], steps: int) -> None:
    """Trains all runs in turns; the last step of every turn measures the exposed communication."""
    progress = Progress(runs, steps)
    for first in range(0, steps, TURN_STEPS):
        turn = min(TURN_STEPS, steps - first)
        for index, run in enumerate(runs):
            for _ in range(turn - 1):
                run.step()
                progress.stepped(index, run)
            run.measure_exposed()
            progress.stepped(index, run)
            progress.turn_ended(run)
    progress.close()


def work(arguments: argparse.Namespace) -> int:
    """One rank: trains every method, then reports. Returns 1 where replicas differ, else 0."""
    torch.set_num_threads(1)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("dpcomm").setLevel(logging.INFO)  # rank 0 says which engine serves each model, and why
    dist.init_process_group("gloo", timeout=COLLECTIVE_TIMEOUT)
    shape = ModelShape(layers=arguments.layers, width=arguments.width, context=arguments.context)
    settings = Settings(shape, arguments.steps, arguments.batch, arguments.seed, arguments.bucket_cap_mb)
    text = load_text(arguments.text)
    nranks = dist.get_world_size()
    if dist.get_rank() == 0:
        parameters = f"{count_parameters(seeded_model(shape, settings.seed)):,}"
        print(f"{parameters} parameters, {len(text):,} bytes of text, {nranks} ranks, seed {settings.seed}", flush=True)
    runs = [Run(method, settings, ByteWindows(text, shape.context)) for method in methods_of(arguments)]
    train(runs, settings.steps)
    wire_bytes = [run.wire_bytes_per_step() for run in runs]  # read before the measurement below adds to it
    measure_allreduce(runs)
    results = [run.result(wire) for run, wire in zip(runs, wire_bytes, strict=True)]
    for run in runs:
        run.close()
    if dist.get_rank() == 0:
        command = shlex.join(["python", *sys.argv])
        print("\n" + report.table(results) + "\n")
        for path in report.write(results, settings, nranks, command, arguments.out):
            print(f"wrote {path}")
    dist.destroy_process_group()
    return 0 if all(r.replicas_identical for r in results) else 1


def main(argv: list[str]) -> int:
    arguments = parse_arguments(argv)
    needs_dpcomm = any(method.hook == "dpcomm" for method in methods_of(arguments))
    if needs_dpcomm and (problem := why_not_importable("dpcomm")):
        print(
            f"dpcomm is not built for this Python ({problem}): run `make venv`, then .venv/bin/python", file=sys.stderr
        )
        return 2
    if "RANK" in os.environ:
        return work(arguments)
    return launch(arguments.nproc, argv)


def why_not_importable(module: str) -> str:
    """Empty where the module can be imported, else the reason."""
    try:
        importlib.import_module(module)
    except ImportError as problem:
        return str(problem)
    return ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
