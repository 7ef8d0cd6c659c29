"""One rank of the network benchmark: verifies and times every size, and writes the rows if it is rank 0.

network.py starts it, on one of the hosts, with a plan in JSON as its only argument. It does not know how a host is
made or a link is shaped. A round is a turn of each contestant, in an order that rotates; ratios are within a round.
"""

import dataclasses
import datetime
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import network_plan as plans
import torch
import torch.distributed as dist
from contestants import Contestant, make
from goals import size_text
from interleave import WARM_ELEMS, Buffers, Cell, over_all_ranks, spent_on
from measure import percentile
from network_bytes import busiest_host, interface_sent_by_all, leaving_share
from network_report import line
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from tqdm import tqdm
from verification import Precision, Verdict, precision_of_sixteen_bits, precision_of_tensors, verify

import dpcomm

OURS = ("dpcomm", plans.FLAT)
Advance = Callable[[int], object]  # told of turns


@dataclasses.dataclass(frozen=True)
class Row:
    """One contestant, size, shape and rate. Times are of the slowest rank."""

    hosts: int
    ranks_per_host: int
    gbit: float | None  # Gb/s that a link carries; None: not shaped
    contender: str
    variant: str
    engine: str  # of dpcomm's
    size_bytes: int
    rounds: int
    calls: int
    median_ms: float
    p95_ms: float
    ratio: float  # gloo's median over this one's, within a round: the median of all rounds, the least, the most
    ratio_least: float
    ratio_most: float
    sent_bytes: float  # by the busiest host in a call: dpcomm's own count, for the others what the least would be
    counted_bytes: float  # what its interface counted, with TCP's headers and the few bytes of the ranks' meetings
    line_share: float | None  # bits of sent_bytes over the median time, over the rate
    wrong: int
    error: float  # relative L2 against fp64


class Ranks(NamedTuple):
    """All that contestants which are not dpcomm's ask of a communicator."""

    nranks: int


@dataclasses.dataclass
class Subject:
    """A contestant at one size, on this rank."""

    cell: Cell
    engine: str
    verdict: Verdict
    sent_bytes: float
    turns: list[int] = dataclasses.field(default_factory=list)  # calls in each
    counted_bytes: float = 0.0
    counted_calls: float = 0.0  # to which those belong


def main(plan: dict[str, Any]) -> None:
    rank = join(plan)
    selected = [(name, variant) for name, variant in plan["contestants"]]
    dtype = getattr(torch, plan["dtype"])
    buffers = Buffers(max(plan["sizes"]) // dtype.itemsize, dtype)
    with ExitStack() as stack:
        names = dict.fromkeys(name for name, _ in selected if name in OURS)
        comms = {name: stack.enter_context(communicator(name, plan["ranks_per_host"], rank)) for name in names}
        contestants = [contestant(name, variant, comms.get(name), buffers) for name, variant in selected]
        rows = measure(contestants, plan, buffers, comms)
        facts = comms["dpcomm"].describe() if "dpcomm" in comms else {}
    end({"communicator": facts, "rows": rows}, plan)


def join(plan: dict[str, Any]) -> int:
    """Makes this process a rank of the default group, on gloo. Returns which."""
    rank, nranks = int(os.environ["BENCHMARK_RANK"]), plan["hosts"] * plan["ranks_per_host"]
    timeout = datetime.timedelta(seconds=plan["collective_timeout_s"])
    store = TCPStore(plan["store_host"], plan["port"], is_master=False, timeout=timeout)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=nranks, timeout=timeout)
    torch.set_num_threads(1)
    return rank


def communicator(name: str, ranks_per_host: int, rank: int) -> dpcomm.Communicator:
    """The one that a contestant of dpcomm's calls. Collective."""
    if name == plans.FLAT or ranks_per_host == 1:
        comm, expected = dpcomm.Communicator(engine="gloo"), "gloo"
    else:
        comm, expected = dpcomm.Communicator(engine="auto"), "two_level"
    checked(comm, rank, expected)
    return comm


def contestant(name: str, variant: str, comm: dpcomm.Communicator | None, buffers: Buffers) -> Contestant:
    """All meet in the same calls: while ranks meet, the line is idle and its bucket fills."""
    called = "dpcomm" if comm is not None else name
    ranks: Any = comm if comm is not None else Ranks(dist.get_world_size())
    (made,) = make([(called, variant)], ranks, buffers.source)
    return made._replace(name=name, meet=dist.all_reduce)


def end(document: dict[str, Any], plan: dict[str, Any]) -> None:
    """Rank 0 leaves the document; all leave the group, and end without the interpreter's own end: a thread of gloo's
    that wants the GIL by then would abort the process. Python's processes of `multiprocessing` end in the same way."""
    if dist.get_rank() == 0:
        Path(plan["out"]).write_text(json.dumps(document, default=str))
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def checked(comm: dpcomm.Communicator, rank: int, expected: str = "gloo") -> dict[str, Any]:
    """What the communicator says of itself.

    Raises:
        RuntimeError: The bytes do not go the way that is to be measured.
    """
    facts = comm.describe()
    if facts["engine"] != expected:
        found = f"engine {facts['engine']} ({facts['why']}) instead of {expected}"
        raise RuntimeError(f"rank {rank}: {found}: nothing measured")
    return facts


def measure(
    contestants: list[Contestant], plan: dict[str, Any], buffers: Buffers, comms: dict[str, dpcomm.Communicator]
) -> list[dict[str, Any]]:
    """The rows of all sizes; rank 0 shows how far it is. Collective."""
    first, rows = dist.get_rank() == 0, []
    shape = plans.shape_of(plan)
    where = f"{plans.shape_text(*shape)}, {plans.rate_text(plan['gbit'])}"
    turns = len(plan["sizes"]) * len(contestants) * plans.MOST_ROUNDS
    with tqdm(total=turns, unit="turn", leave=False, disable=None if first else True) as bar:
        for size in plan["sizes"]:
            bar.set_description(f"{where}, {size_text(size)}")
            elems = size // buffers.x.element_size()
            subjects = [verified(each, elems, comms.get(each.name), plan, buffers.x.dtype) for each in contestants]
            time_rounds(subjects, elems, plan["seconds_per_size"], buffers, bar.update)
            new = rows_of(subjects, shape, plan["gbit"], size)
            rows += [dataclasses.asdict(row) for row in new]
            for row in rows[-len(new) :] if first else []:
                bar.write(line(row), file=sys.stdout)
            sys.stdout.flush()
    return rows


def verified(
    each: Contestant, elems: int, comm: dpcomm.Communicator | None, plan: dict[str, Any], dtype: torch.dtype
) -> Subject:
    """One call whose result is checked; it also tells what a call sends and how long one takes. Collective."""
    spent, shape = [0.0], plans.shape_of(plan)
    corrupt = "value" if each.name == plan["corrupt"] else None

    def allreduce(x: Tensor) -> None:
        dist.barrier()
        start = time.perf_counter()
        each.as_sum(x)
        spent[0] = time.perf_counter() - start

    before = comm.stats()["wire_bytes"] if comm is not None else 0
    engine = comm.engine if comm is not None else ""
    precision = precision_in(dtype, each, engine, dist.get_world_size())
    verdict = verify(allreduce, elems, precision, corrupt, dtype)
    if comm is not None:
        sent = comm.stats()["wire_bytes"] - before
        host_sent = busiest_host(sent * leaving_share(comm.engine, each.variant, elems, shape, plan["dtype"]), shape)
    else:
        elem_bytes = 2 if each.name == "fp16_compress_hook" else dtype.itemsize
        host_sent = plans.sent_plainly(elems * elem_bytes, dist.get_world_size())
    (spent_s,) = largest([spent[0]])
    return Subject(Cell(each, "hot", seconds_a_call=spent_s), engine, verdict, host_sent)


def precision_in(dtype: torch.dtype, each: Contestant, engine: str, nranks: int) -> Precision:
    """gloo adds 16 bits as they are. dpcomm rounds the sum; before, in two levels that of each host, in a ring each."""
    if dtype == torch.float32:
        return each.precision
    if each.name == "gloo":
        return precision_of_sixteen_bits(dtype, nranks)
    algorithm = each.variant.partition("/")[2]
    before = nranks - 2 if algorithm == "ring" else int(engine == "two_level" and algorithm in ("auto", "two_level"))
    tensors = precision_of_tensors(each.precision, dtype, nranks)
    return tensors._replace(roundings=tensors.roundings + before)


def time_rounds(subjects: list[Subject], elems: int, budget_s: float, buffers: Buffers, advance: Advance) -> None:
    """Rounds until the budget is spent. All ranks decide alike, by the slowest one's times. Collective."""
    turn_s = budget_s / (plans.MOST_ROUNDS * len(subjects))
    warm_calls = min(1.0, WARM_ELEMS / elems)  # the untimed call of a turn
    spent = 0.0
    for number in range(plans.MOST_ROUNDS):
        if number >= plans.LEAST_ROUNDS and spent >= budget_s:
            advance((plans.MOST_ROUNDS - number) * len(subjects))
            return
        first = number % len(subjects)
        for subject in subjects[first:] + subjects[:first]:  # nobody has the same neighbour in every round
            cell = subject.cell
            calls = max(1, min(plans.MOST_TURN_CALLS, int(turn_s / cell.seconds_a_call)))
            before = interface_sent_by_all()
            spent += spent_on(cell, elems, calls, buffers)
            subject.counted_bytes += interface_sent_by_all() - before
            subject.counted_calls += calls + warm_calls
            subject.turns.append(calls)
            advance(1)


def rows_of(subjects: list[Subject], shape: tuple[int, int], gbit: float | None, size: int) -> list[Row]:
    """The figures of one size. Collective."""
    times = [over_all_ranks(subject.cell) for subject in subjects]
    medians = [round_medians(its, subject.turns) for its, subject in zip(times, subjects, strict=True)]
    gloo = next(its for its, subject in zip(medians, subjects, strict=True) if subject.cell.contestant.name == "gloo")
    counted = largest([subject.counted_bytes / subject.counted_calls for subject in subjects])
    return [
        row_of(subject, its, ratios(gloo, own), most, shape, (gbit, size))
        for subject, its, own, most in zip(subjects, times, medians, counted, strict=True)
    ]


def row_of(
    subject: Subject,
    times: list[float],
    over: list[float],
    counted: float,
    shape: tuple[int, int],
    where: tuple[float | None, int],
) -> Row:
    gbit, size = where
    median_us = statistics.median(times)
    return Row(
        hosts=shape[0],
        ranks_per_host=shape[1],
        gbit=gbit,
        contender=subject.cell.contestant.name,
        variant=subject.cell.contestant.variant,
        engine=subject.engine,
        size_bytes=size,
        rounds=len(subject.turns),
        calls=len(times),
        median_ms=median_us / 1e3,
        p95_ms=percentile(times, 95) / 1e3,
        ratio=statistics.median(over),
        ratio_least=min(over),
        ratio_most=max(over),
        sent_bytes=subject.sent_bytes,
        counted_bytes=counted,
        line_share=plans.line_share(subject.sent_bytes, median_us / 1e6, gbit),
        wrong=subject.verdict.wrong,
        error=subject.verdict.error,
    )


def round_medians(times: list[float], turns: list[int]) -> list[float]:
    """The median of each turn's calls."""
    ends = [sum(turns[: number + 1]) for number in range(len(turns))]
    return [statistics.median(times[end - calls : end]) for end, calls in zip(ends, turns, strict=True)]


def ratios(gloo: list[float], own: list[float]) -> list[float]:
    """Of each round."""
    return [theirs / ours for theirs, ours in zip(gloo, own, strict=True)]


def largest(values: list[float]) -> list[float]:
    """One by one the maximum over all ranks. Collective."""
    found = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    maxima: list[float] = found.tolist()
    return maxima


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
