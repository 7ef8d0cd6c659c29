"""One process of the benchmark beside stock NCCL: verifies and times every size; rank 0 prints and writes.

Contestants take turns in one run, in an order that rotates; on GPUs by CUDA events.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from environment import describe_environment
from gpu_clock import Times, time_on_device
from gpu_environment import describe_gpu_environment
from nccl_contestants import Entrant, Field, assemble
from nccl_plan import (
    CONTESTS,
    DTYPES,
    Contest,
    Row,
    Subject,
    Timing,
    document,
    header,
    line,
    row_of,
    setting,
    turns_for,
)
from plots import draw_curves
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from tqdm import tqdm

TIMEOUT = datetime.timedelta(minutes=5)
NO_GPU = dict.fromkeys(("gpu", "driver", "cuda", "nccl"), "")  # facts that a rehearsal does not have


def run(arguments: argparse.Namespace) -> int:
    """The whole benchmark of this process. Returns how many elements were wrong on all ranks."""
    device = join(arguments.device)
    contest, ranks, first = CONTESTS[arguments.device], dist.get_world_size(), dist.get_rank() == 0
    environment = describe_gpu_environment() if device.type == "cuda" else {**NO_GPU, **describe_environment()}
    remarks = setting(contest, ranks, arguments.virtual_ranks)
    field = assemble(contest, arguments, device)
    rows: list[Row] = []
    if first:
        for name, why in field.absent.items():
            print(f"# absent: {name}: {why}")
        print(header(remarks, environment, ranks), flush=True)
    settings = settings_of(contest, arguments, ranks, field)
    turns = turns_for(arguments.iterations, arguments.warmup)
    planned = len(arguments.sizes) * len(field.entrants) * (turns.warm + turns.timed)
    with tqdm(total=planned, unit="turn", leave=False, disable=None if first else True) as bar:
        for size in arguments.sizes:
            new = measure_size(field.entrants, size, arguments, device, bar.update)
            rows += new
            for row in new if first else []:
                bar.write(line(row), file=sys.stdout)
            sys.stdout.flush()
            if first and arguments.json is not None:  # after each size: little is lost where time runs out
                save(arguments.json, document(settings, environment, remarks, field.absent, rows))
    if first:
        finish(arguments, rows, ranks, remarks)
    end(field)
    return sum(row.wrong or 0 for row in rows)


def settings_of(contest: Contest, arguments: argparse.Namespace, ranks: int, field: Field) -> dict[str, Any]:
    """What the JSON says of the run, besides its rows."""
    return {
        "rehearsal": contest.marked,
        "ranks": ranks,
        "virtual_ranks": arguments.virtual_ranks if ranks == 1 else None,
        "settings": {
            key: getattr(arguments, key) for key in ("sizes", "iterations", "warmup", "check", "dtype", "device")
        },
        "communicators": field.facts,
    }


def join(kind: str) -> torch.device:
    """Makes this process a rank of the default group, alone where torchrun has not started it. Returns its device."""
    device = torch.device("cpu")
    if kind == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=TIMEOUT)
    else:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=TIMEOUT)
    return device


def end(field: Field) -> None:
    """Nobody leaves while others still call."""
    meet()
    field.close()
    dist.destroy_process_group()


def measure_size(
    entrants: list[Entrant],
    size: int,
    arguments: argparse.Namespace,
    device: torch.device,
    advance: Callable[[int], object],
) -> list[Row]:
    """Verifies, then times all contestants at one size. Collective."""
    elems = size // DTYPES[arguments.dtype]
    served = [entrant for entrant in entrants if entrant.serves(size)]
    subjects = [subject_of(entrant, size, elems, arguments) for entrant in served]
    timings = time_in_turns(served, elems, arguments, device, advance)
    return [row_of(subject, timing) for subject, timing in zip(subjects, timings, strict=True)]


def subject_of(entrant: Entrant, size: int, elems: int, arguments: argparse.Namespace) -> Subject:
    """Everything about a row but its times. Collective."""
    verdict = entrant.verify(elems, entrant.name == arguments.corrupt) if arguments.check else None
    sent = entrant.sent(elems)
    return Subject(
        contestant=entrant.name,
        size_bytes=size,
        dtype=arguments.dtype,
        ranks=entrant.ranks,
        on_a_bus=entrant.on_a_bus,
        wire_bytes=largest([sent])[0] if sent is not None else None,
        wrong=verdict.wrong if verdict else None,
        error=verdict.error if verdict else None,
        note=entrant.note,
    )


def time_in_turns(
    entrants: list[Entrant],
    elems: int,
    arguments: argparse.Namespace,
    device: torch.device,
    advance: Callable[[int], object],
) -> list[Timing | None]:
    """Of each contestant; None where there is nothing to time. Collective."""
    turns = turns_for(arguments.iterations, arguments.warmup)
    prepared = [entrant.prepare(elems) for entrant in entrants]
    found: list[list[Times]] = [[] for _ in entrants]
    for number in range(turns.warm + turns.timed):
        start = number % len(entrants)  # nobody has the same neighbour in every round
        for at in [*range(start, len(entrants)), *range(start)]:
            calls = prepared[at]
            if calls is not None:
                calls.refill()
                meet()
                times = time_turn(calls.call, turns.calls, device)
                if number >= turns.warm:
                    found[at].append(times)
            advance(1)
    return [
        Timing(largest([one.gpu_us for one in times]), largest([one.host_us for one in times])) if times else None
        for times in found
    ]


def time_turn(call: Callable[[], object], calls: int, device: torch.device) -> Times:
    """Of `calls` calls back to back, as a program makes them: where the host is slower than the device, it counts."""
    if device.type == "cuda":
        return time_on_device(lambda _: call(), calls)
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    us = (time.perf_counter() - begin) * 1e6 / calls
    return Times(us, us)


def meet() -> None:
    """All ranks are at the same point, on the host; their devices have ended what they had."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
    dist.all_reduce(torch.zeros(1))


def largest(values: list[float]) -> list[float]:
    """One by one the maximum over all ranks. Collective."""
    found = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    maxima: list[float] = found.tolist()
    return maxima


def save(file: Path, content: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2, default=str) + "\n")


def finish(arguments: argparse.Namespace, rows: list[Row], ranks: int, remarks: list[str]) -> None:
    """Draws what --plot asks for, and says what was written."""
    if arguments.json is not None:
        print(f"wrote {arguments.json}")
    if arguments.plot is not None:
        arguments.plot.parent.mkdir(parents=True, exist_ok=True)
        curves: dict[str, dict[int, float]] = {}
        for row in rows:
            if row.time_us is not None:
                curves.setdefault(row.contestant, {})[row.size_bytes] = row.time_us
        title = "; ".join([f"All-reduce, {ranks} rank(s), {arguments.dtype}", *remarks])
        draw_curves(curves, title, "us, median of the slowest rank", arguments.plot)
        print(f"wrote {arguments.plot}")
