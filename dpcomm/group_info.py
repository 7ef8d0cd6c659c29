"""`python -m dpcomm info --group`: who the ranks of a torchrun are, what reaches what and how, and which engine serves.

    store         torchrun's, or rank 0's                               board.connect
    hello         facts of each rank; which device                      one step of board.Board
    offer, answer who shares a host                                     same_host.Proof
    communicator  engine="auto", and what it says of itself; one small sum, compared with what it must be
    links         of the ranks of one host, if the engine shares no memory there: an engine that does, tried among them

Needs no process group: the communicator is made from rank, nranks and store. Ends within its time limit, whatever the
others do; an error is printed by one rank.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch._C._distributed_c10d import PrefixStore

from dpcomm import _native, same_host
from dpcomm.board import Board, Place, connect, place
from dpcomm.chosen import spans
from dpcomm.communicator import Communicator
from dpcomm.errors import ArgumentError, CommTimeoutError, Error, InternalError, bare_message
from dpcomm.group_report import NETWORK, NO_VERSION, OWN, SHARED, Rank, Report, text
from dpcomm.nccl_library import find
from dpcomm.options import ENGINES, GPU_ENGINES, engine_reason, positive

HOST_ENGINES = ("shm", "p2p")
TIMEOUT_S, MOST_TIMEOUT_S = 60.0, 3600.0
LEAST_TIMEOUT_S = 5.0
# Of the time limit, for saying what went wrong; of a limit of seconds, a quarter at most.
LAST_WORDS_S = 3.0
SHARE = 0.5  # of the time that is left, for a communicator: its error comes before the last step's own
ELEMS = 1000  # integers whose sum over 64 ranks float32 has exactly: 1000 * 64 * 65 / 2 < 2^24
USAGE = """start it as you start your training, on every host, for example
  torchrun --standalone --nproc-per-node 2 -m dpcomm info --group
  torchrun --nnodes 2 --node-rank 0 --master-addr node0 --master-port 29500 --nproc-per-node 2 -m dpcomm info --group"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `info --group`."""
    parser.add_argument("--group", action="store_true", help="under torchrun: ranks, hosts, links and the engine")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="of --group; default: cuda where every rank has one")
    parser.add_argument(
        "--timeout", type=float, metavar="S", help=f"of --group: it ends within S seconds (default {TIMEOUT_S:g})"
    )


def run(arguments: argparse.Namespace) -> int:
    """Prints, on one rank.

    Returns:
        The exit status 0. Where there is no communicator, it ends the process with status 1.

    Raises:
        ArgumentError: Not started by torchrun, or a time limit that is none.
    """
    began = time.monotonic()
    limit_s = positive("--timeout", TIMEOUT_S if arguments.timeout is None else arguments.timeout, MOST_TIMEOUT_S)
    if limit_s < LEAST_TIMEOUT_S:
        raise ArgumentError(f"--timeout {limit_s:g}: expected {LEAST_TIMEOUT_S:g} seconds or more")
    try:
        where = place(os.environ)
    except ArgumentError as error:
        raise ArgumentError(f"info --group: {bare_message(error)}; {USAGE}") from None
    last = threading.Timer(limit_s, _end, (where, limit_s))
    last.daemon = True
    last.start()
    report = Report(where.nranks)
    last_s = min(LAST_WORDS_S, limit_s / 4)
    deadline = began + limit_s - last_s
    board: Board | None = None
    try:
        store = connect(where, max(deadline - time.monotonic(), 0.001))
        board = Board(store, where.rank, where.nranks, deadline)
        _look(board, where, arguments.device, report)
    except Error as error:
        report.error = {"code": error.code, "message": str(error)}
    status = _conclude(board, where, report, arguments.json, last_s / 4)
    last.cancel()
    if status != 0:  # a thread may still be inside torch; coming back to an interpreter that ends, it would abort
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)
    return status


def _end(where: Place, limit_s: float) -> None:
    """The last resort, on a thread of its own: something waits in a library that has a longer time limit."""
    error = CommTimeoutError(f"rank {where.rank} on {socket.gethostname()}: info --group did not end in {limit_s:g} s")
    print(error, file=sys.stderr, flush=True)
    os._exit(1)


def _conclude(board: Board | None, where: Place, report: Report, as_json: bool, last_s: float) -> int:
    """One rank prints; the others stay until it has, since torchrun ends all ranks when one fails."""
    failed = report.error is not None
    speaks = where.local_rank == 0  # where there is no store to ask who does
    try:
        if board is not None:
            speaks = board.first("speaker") if failed else where.rank == 0
    except Error:  # the store went away, with the rank that kept it: rather twice than not at all
        board, speaks = None, failed
    if speaks:
        _print(report, as_json)
    if board is not None:
        with contextlib.suppress(Error):  # whoever kept the store has nothing more to say
            if speaks:
                board.tell("said")
            board.await_word("said", last_s)
            board.leave(last_s)
    return 1 if failed else 0


def _print(report: Report, as_json: bool) -> None:
    if as_json:
        print(json.dumps(report.as_dict(), indent=2), flush=True)
        return
    if page := text(report):
        print(page, flush=True)
    if report.error is not None:
        print(report.error["message"], file=sys.stderr, flush=True)


def _look(board: Board, where: Place, wanted: str | None, report: Report) -> None:
    """Fills in the report, step by step, so that an error leaves what was found before it."""
    facts = board.share("hello", lambda: _facts(where))
    report.device = wanted or ("cuda" if all(fact["gpu"] for fact in facts) else "cpu")
    report.ranks = [_rank(number, fact, report.device) for number, fact in enumerate(facts)]
    report.hosts = _hosts(board)
    gpu = facts[board.rank]["gpu"]
    device = "cpu" if report.device == "cpu" else f"cuda:{gpu['ordinal'] if gpu else 0}"
    board.step = "communicator"
    with _hearing(report, board.rank), _communicator(board, board.rank, board.nranks, "all", "auto", device) as comm:
        about = comm.describe()
        report.engine, report.why = comm.engine, str(about["why"])
        report.check = board.share("all-reduce", lambda: _check(comm))[0]
        links = board.share("links", lambda: (_hows(board, report, about, device), report.notes))
    report.ranks = [dataclasses.replace(rank, how=hows) for rank, (hows, _) in zip(report.ranks, links, strict=True)]
    report.notes = list(dict.fromkeys(note for _, notes in links for note in notes))
    report.engines = _verdicts(report)


def _facts(where: Place) -> dict[str, Any]:
    """This rank's part of a `Rank`. Its GPU is that of its number on the host, as training scripts choose it."""
    reasons = {engine: engine_reason(engine) for engine in ENGINES[1:]}
    gpus = [] if reasons["p2p"] else _native.cuda_devices()
    nccl = NO_VERSION if reasons["nccl"] else find().version
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "processors": sorted(os.sched_getaffinity(0)),
        "gpu": gpus[where.local_rank % len(gpus)] if gpus else None,
        "versions": {"dpcomm": _native.version, "torch": str(torch.__version__), "NCCL": nccl},
        "refuses": {engine: reason for engine, reason in reasons.items() if reason},
    }


def _rank(number: int, fact: dict[str, Any], device: str) -> Rank:
    gpu = fact["gpu"]
    name = "cpu"
    if device == "cuda":
        name = f"cuda:{gpu['ordinal']} {gpu['name']} {gpu['pci_bus_id']}" if gpu else "no GPU"
    return Rank(number, fact["host"], fact["pid"], name, fact["processors"], fact["versions"], fact["refuses"])


def _hosts(board: Board) -> list[list[int]]:
    """The ranks of each host."""
    proofs: list[same_host.Proof] = []

    def offer() -> str:
        proofs.append(same_host.Proof(board.rank))
        return proofs[0].offer()

    try:
        offers = board.share("offer", offer)
        board.share("call", lambda: proofs[0].call(offers))
        return same_host.groups(board.nranks, board.share("answer", lambda: proofs[0].answers(offers)))
    finally:
        for proof in proofs:
            proof.close()


def _communicator(board: Board, rank: int, nranks: int, name: str, engine: str, device: str) -> Communicator:
    store = PrefixStore(name, board.store)
    return Communicator(
        rank=rank, nranks=nranks, store=store, device=device, engine=engine, timeout_s=board.left_s() * SHARE
    )


def _check(comm: Communicator) -> str:
    """One sum, which every rank knows beforehand.

    Raises:
        InternalError: It is another one.
    """
    if comm.device.type == "cuda" and not torch.cuda.is_available():
        return "left out, since this torch has no CUDA; the communicator's own first calls were right"
    counting = torch.arange(1, ELEMS + 1, dtype=torch.float32)
    x = ((comm.rank + 1) * counting).to(comm.device)
    comm.allreduce(x)
    if not torch.equal(x.cpu(), comm.nranks * (comm.nranks + 1) // 2 * counting):
        raise InternalError(f"rank {comm.rank}: the sum of {ELEMS} numbers over all ranks is wrong")
    return f"the sum of {ELEMS} float32 values is right on every rank"


def _hows(board: Board, report: Report, about: dict[str, Any], device: str) -> list[str]:
    """How data gets to each rank."""
    if about["engine"] in HOST_ENGINES:
        return _on_host(board, list(range(board.nranks)), about)
    hosts = about.get("hosts", report.hosts)  # of engine two_level
    (mine,) = (host for host in hosts if board.rank in host)
    hows = [NETWORK] * board.nranks
    hows[board.rank] = OWN
    if about["engine"] == "two_level":
        for rank, how in zip(mine, _on_host(board, mine, about), strict=True):
            hows[rank] = how
    elif len(mine) > 1:
        engine = "shm" if device == "cpu" else "p2p"
        try:
            with _communicator(board, mine.index(board.rank), len(mine), f"host{mine[0]}", engine, device) as comm:
                _check(comm)
                near = _on_host(board, mine, comm.describe())
        except Error as error:  # no reason to end: the engine in use does without
            report.notes.append(f"engine {engine} among ranks {spans(mine)}: {error}")
        else:
            for rank, how in zip(mine, near, strict=True):
                hows[rank] = how
    return hows


def _on_host(board: Board, ranks: list[int], about: dict[str, Any]) -> list[str]:
    """How data gets to these ranks, on which a communicator of one host was made; engine p2p says it of each."""
    hows = [str(how) for how in about.get("peers", [SHARED] * len(ranks))]
    return [OWN if rank == board.rank else how for rank, how in zip(ranks, hows, strict=True)]


def _verdicts(report: Report) -> dict[str, str]:
    """What each engine has to say."""
    verdicts = {}
    for engine in ENGINES[1:]:
        refusals: dict[str, list[int]] = {}
        for rank in report.ranks:
            if reason := rank.refuses.get(engine):
                refusals.setdefault(reason, []).append(rank.rank)
        if engine == report.engine:
            verdicts[engine] = "in use"
        elif refusals:
            texts = [
                reason if len(ranks) == report.nranks else f"{reason} (ranks {spans(ranks)})"
                for reason, ranks in refusals.items()
            ]
            verdicts[engine] = f"no: {'; '.join(texts)}"
        elif lack := _lacking(engine, report.hosts):
            verdicts[engine] = f"no: {lack}"
        elif (engine in GPU_ENGINES) != (report.device == "cuda"):
            other = "cuda" if engine in GPU_ENGINES else "cpu"
            verdicts[engine] = f"usable for data on the other device: see --device {other}"
        else:
            needs = ", with a process group" if engine == "torch" else ""
            verdicts[engine] = f"usable where asked for{needs}: engine={engine!r}"
    return verdicts


def _lacking(engine: str, hosts: list[list[int]]) -> str:
    """What these hosts lack for an engine; empty where it is nothing."""
    if engine in HOST_ENGINES and len(hosts) > 1:
        return f"needs one host, and these are {len(hosts)}"
    if engine == "two_level" and len(hosts) == 1:
        return "needs several hosts, and this is one"
    if engine == "two_level" and max(map(len, hosts)) == 1:
        return "needs ranks that share a host, and here each has its own"
    return ""


@contextlib.contextmanager
def _hearing(report: Report, rank: int) -> Iterator[None]:
    """Takes what dpcomm logs meanwhile into the report: the line that says the choice, and warnings."""

    def emit(record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            report.notes.append(record.getMessage())
        elif rank == 0 and not report.said:  # later ones are of communicators among the ranks of one host
            report.said = record.getMessage()

    handler = logging.Handler(logging.INFO)
    handler.emit = emit  # type: ignore[method-assign]
    logger = logging.getLogger("dpcomm")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
