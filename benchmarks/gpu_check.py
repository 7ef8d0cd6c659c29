"""What needs a GPU, in one go and within a time budget: probes, build, tests, benchmarks, memcheck; writes one JSON.

Exit status: 0; 1 where a step failed or ran out of time, or no test ran; 2 where there is no GPU. Nothing is imported
or built before that is known. What the environment refuses is printed apart and is no failure.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gpu_steps
from gpu_driver import Gpu, find_gpu
from gpu_steps import FAILED, GOOD, NOT_RUN, OK, OUT_OF_TIME, REFUSED, ROOT, Budget, Done, Result, Share

RESULTS = ROOT / "benchmarks" / "results"
SCHEMA = 1  # of the JSON
RANKS = (2, 4, 8)  # virtual ones, in the benchmark
# Of the benchmark beside stock NCCL: 64 KiB, 2 MiB and 64 MiB, which take ten seconds on a slow processor.
BESIDE_NCCL = ("-b", "64K", "-e", "64M", "-f", "32", "-n", "10", "-w", "2", "-c", "1")
DESCRIBE_S = 60.0  # behind the budget
# What a run under memcheck holds, which slows kernels down by a factor of ten and more.
MEMCHECK_FILE, MEMCHECK_TESTS = "tests/gpu/test_gpu_bits.py", "test_a_few_bytes_of_everything"
QUESTION = """
import json, sys
sys.path.append("benchmarks")
from gpu_environment import describe_gpu_environment
print("\\n" + json.dumps(describe_gpu_environment()))
"""


class Check:
    """One run: where it writes, how much time is left, what is known so far."""

    def __init__(self, gpu: Gpu, folder: Path, log: Path, budget_s: float) -> None:
        self.gpu, self.folder, self.log = gpu, folder, log
        self.budget = Budget(budget_s)
        self.results: dict[str, Result] = {}
        self.refusals: dict[str, str] = {}  # by the probe's name

    def call(self, command: Sequence[str], seconds: float, env: Mapping[str, str] | None = None) -> Done:
        return gpu_steps.call(command, seconds, self.log, env)


# --- steps: each takes at most `seconds` -----------------------------------------------------------------------------


def probe(check: Check, seconds: float) -> Result:
    """What the environment allows. A refusal is no failure of dpcomm, so this step cannot fail."""
    from gpu_probe import probe_all

    end = time.monotonic() + seconds
    probes = probe_all(check.call, lambda: end - time.monotonic())
    for one in probes:
        if one.allowed:
            print(f"# {one.what}: allowed{f' ({one.reason})' if one.reason else ''}")
        else:
            check.refusals[one.name] = one.reason
            print(f"# environment refuses {one.what}: {one.reason}")
    refused = len(check.refusals)
    remark = f"{len(probes) - refused} allowed, {refused} refused"
    return Result(REFUSED if refused else OK, remark, data=[asdict(one) for one in probes])


def build(check: Check, seconds: float) -> Result:
    """Installs dpcomm in place, for this GPU only; compiles what has changed."""
    install = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-v", "-e", "."]
    architecture = check.gpu.capability.replace(".", "") + "-real"
    end = time.monotonic() + seconds
    done = check.call(install, seconds, {"DPCOMM_CUDA": "ON", "CUDAARCHS": os.environ.get("CUDAARCHS", architecture)})
    if done.outcome != OK:
        return failure(done)
    question = [sys.executable, "-c", "from dpcomm import _native; assert _native.cuda_built, 'no CUDA half'"]
    done = check.call(question, end - time.monotonic())
    return failure(done) if done.outcome != OK else Result(OK, f"for {architecture}")


def tests(check: Check, seconds: float) -> Result:
    """All tests marked gpu."""
    from gpu_tests import find_files, run_files

    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        journal = Path(folder) / "tests.jsonl"
        result = run_files(find_files(), journal, lambda: end - time.monotonic(), check.call)
    for test in result.data["tests"]:
        if test["outcome"] != "passed":
            print(f"## {test['outcome']}: {test['name']}\n{gpu_steps.tail(test['message'], 1200)}")
    return result


def kernels(check: Check, seconds: float) -> Result:
    """The kernel alone, without Python."""
    return benchmark(check, ["benchmarks/gpu_kernels.py", "--quick"], seconds)


def allreduce(check: Check, seconds: float) -> Result:
    """The engine, called from Python, between virtual ranks; for each number of them."""
    end = time.monotonic() + seconds
    done: dict[str, Result] = {}
    for i, nranks in enumerate(RANKS):
        arguments = ["benchmarks/allreduce.py", "--engine", "p2p", "--virtual-ranks", str(nranks)]
        done[str(nranks)] = benchmark(check, arguments, (end - time.monotonic()) / (len(RANKS) - i))
    bad = [(name, one) for name, one in done.items() if one.outcome != OK]
    remark = "; ".join(f"{name} ranks: {one.outcome} {one.remark}".rstrip() for name, one in bad)
    return Result(bad[0][1].outcome if bad else OK, remark, data={name: one.data for name, one in done.items()})


def beside_nccl(check: Check, seconds: float) -> Result:
    """dpcomm beside stock NCCL: a process for each GPU; for one alone, virtual ranks of one process."""
    count = check.gpu.count
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] if count > 1 else []
    virtual = [] if count > 1 else ["--virtual-ranks", "2"]
    result = benchmark(check, [*torchrun, "benchmarks/nccl.py", *BESIDE_NCCL, *virtual], seconds)
    ranks = f"{count} processes" if count > 1 else "one GPU, virtual ranks: nothing crosses a link"
    return Result(result.outcome, f"{ranks}; {result.remark}".rstrip("; "), data=result.data)


def benchmark(check: Check, arguments: Sequence[str], seconds: float) -> Result:
    """Runs a benchmark that writes a JSON; what it has written counts even where it ran out of time."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figures.json"
        done = check.call([sys.executable, *arguments, "--json", str(file)], seconds)
        try:
            figures = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            if done.outcome == OK:
                return Result(FAILED, f"no figures: {error}")
            figures = None
    if done.outcome != OK:
        failed = failure(done)
        return Result(failed.outcome, failed.remark, data=figures)
    return Result(OK, data=figures)


def memcheck(check: Check, seconds: float) -> Result:
    """compute-sanitizer over a short list of tests."""
    from gpu_probe import SANITIZER_STATUS, Refused, find_tool

    if "sanitizer" in check.refusals:
        return Result(REFUSED, check.refusals["sanitizer"])
    try:
        tool = find_tool("compute-sanitizer")
    except Refused as refusal:
        return Result(REFUSED, str(refusal))
    pytest = [sys.executable, "-m", "pytest", "-q", MEMCHECK_FILE, "-k", MEMCHECK_TESTS]
    command = [tool, "--tool", "memcheck", "--error-exitcode", str(SANITIZER_STATUS), *pytest]
    done = check.call(command, seconds)
    if done.status == SANITIZER_STATUS:
        return Result(FAILED, "memcheck found errors", data=gpu_steps.tail(done.output))
    if done.outcome == OK and not re.search(r"\b\d+ passed", done.output):
        return Result(FAILED, "no test ran", data=gpu_steps.tail(done.output))
    return failure(done) if done.outcome != OK else Result(OK, "no errors")


def failure(done: Done) -> Result:
    """Of a command; prints the end of its output."""
    print(f"## {gpu_steps.tail(done.output, 2000)}")
    if done.status is None:
        return Result(OUT_OF_TIME, f"ended after {done.seconds:.0f} s")
    return Result(FAILED, f"status {done.status}", data=gpu_steps.tail(done.output))


@dataclass(frozen=True)
class Step:
    """One step: its part of the budget, and what must have gone well before."""

    run: Callable[[Check, float], Result]
    share: Share
    needs: tuple[str, ...] = ()


STEPS = {
    "probe": Step(probe, Share(0.15, 0.0)),
    "build": Step(build, Share(0.55, 0.0)),
    "nccl": Step(beside_nccl, Share(0.15, 0.06), ("build",)),  # the newest question: before tests
    "tests": Step(tests, Share(0.60, 0.25), ("build",)),
    "kernels": Step(kernels, Share(0.15, 0.06), ("build",)),
    "allreduce": Step(allreduce, Share(0.20, 0.10), ("build",)),
    "memcheck": Step(memcheck, Share(0.25, 0.09), ("build",)),
}


def run_steps(check: Check, only: Sequence[str], steps: Mapping[str, Step]) -> None:
    """Runs the steps that are wanted; a step that others need and that failed takes them along."""
    wanted = [name for name in steps if not only or name in only]
    for i, name in enumerate(wanted):
        step = steps[name]
        missing = [need for need in step.needs if need in check.results and check.results[need].outcome not in GOOD]
        seconds = check.budget.seconds(step.share, [steps[other].share for other in wanted[i + 1 :]])
        print(f"# {name}: at most {seconds:.0f} s", flush=True)
        began = time.monotonic()
        if missing:
            result = Result(NOT_RUN, f"needs {', '.join(missing)}")
        elif seconds <= 0:
            result = Result(OUT_OF_TIME, "not begun")
        else:
            result = run_step(step, check, seconds)
        spent = time.monotonic() - began
        check.results[name] = Result(result.outcome, result.remark, round(spent, 1), result.data)


def run_step(step: Step, check: Check, seconds: float) -> Result:
    """A fault in a step is that step's failure: the figures of the others must not be lost."""
    try:
        return step.run(check, seconds)
    except Exception as error:  # noqa: BLE001 - see above
        return Result(FAILED, f"{type(error).__name__}: {error}")


# --- the report ------------------------------------------------------------------------------------------------------


def describe(check: Check) -> dict[str, Any]:
    """Where this was measured. Asked in another process: this one must not take a share of the GPU."""
    gpu = check.gpu
    facts = {"gpu": gpu.name, "gpus": gpu.count, "capability": gpu.capability}
    facts |= {"driver": gpu.driver, "driver_cuda": gpu.driver_cuda}
    done = check.call([sys.executable, "-c", QUESTION], DESCRIBE_S)
    try:
        return {**json.loads(done.output.strip().splitlines()[-1]), **facts}
    except (IndexError, ValueError):
        return {**facts, "unknown": gpu_steps.tail(done.output, 500)}


def exit_status(results: Mapping[str, Result]) -> int:
    return 0 if all(result.outcome in GOOD for result in results.values()) else 1


def report(check: Check, environment: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that is known, fit for json.dump."""
    return {
        "schema": SCHEMA,
        "environment": dict(environment),
        "steps": gpu_steps.as_rows(check.results),
        "figures": {name: result.data for name, result in check.results.items()},
    }


def write(check: Check, environment: Mapping[str, Any]) -> Path:
    check.folder.mkdir(parents=True, exist_ok=True)
    day = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    path = check.folder / f"gpu-check-{re.sub(r'[^A-Za-z0-9]+', '-', check.gpu.name)}-{day}.json"
    path.write_text(json.dumps(report(check, environment), indent=2) + "\n")
    return path


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=list(STEPS), default=[], help="this step; may be repeated")
    parser.add_argument("--budget-s", type=float, default=480.0, help="seconds for all steps (default: 480)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON and, if given, of the full log")
    options = parser.parse_args(arguments)
    if not options.budget_s > 0:
        parser.error("--budget-s: expected more than 0 seconds")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    gpu = find_gpu()
    if gpu.reason:
        print(f"gpu-check: there is no NVIDIA GPU to check on here ({gpu.reason}).", file=sys.stderr)
        return 2
    print(f"# {gpu.name}, capability {gpu.capability}, driver {gpu.driver}", flush=True)
    log = (ROOT / "build" if options.out == RESULTS else options.out) / "gpu-check.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    check = Check(gpu, options.out, log, options.budget_s)
    run_steps(check, options.only, STEPS)
    path = write(check, describe(check))
    print("\n".join(gpu_steps.table(check.results)))
    print(f"wrote {path}; full output: {log}")
    return exit_status(check.results)


if __name__ == "__main__":
    sys.exit(main())
