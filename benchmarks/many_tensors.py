"""A list of thousands of small tensors: dpcomm's one call beside a flat copy, a loop and gloo, in turns.

Starts two processes on this host and prints medians of the slowest rank. Every way's result is checked against the
first one's, so they do the same work.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.multiprocessing.spawn import spawn

import dpcomm

RANKS = 2
Way = Callable[[list[Tensor]], object]


def flat_copy(reduce: Callable[[Tensor], object]) -> Way:
    """What users write: one flat tensor, reduced, and copied back."""

    def way(xs: list[Tensor]) -> None:
        flat = _flatten_dense_tensors(xs)  # type: ignore[no-untyped-call]
        reduce(flat)
        torch._foreach_copy_(xs, list(_unflatten_dense_tensors(flat, xs)))  # type: ignore[no-untyped-call]

    return way


def ways(comm: dpcomm.Communicator) -> dict[str, Way]:
    return {
        "dpcomm, the list": comm.allreduce,
        "dpcomm, a flat copy": flat_copy(comm.allreduce),
        "dpcomm, a loop": lambda xs: [comm.allreduce(x) for x in xs],
        "gloo, a flat copy": flat_copy(dist.all_reduce),
        "gloo, coalesced": dist.all_reduce_coalesced,
    }


def inputs(sizes: Sequence[int]) -> list[Tensor]:
    """Small whole numbers: their sums are exact, whatever the order."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    return [torch.randint(-100, 100, (n,), generator=generator).float() for n in sizes]


def measure(sizes: Sequence[int], rounds: int) -> dict[str, float]:
    """Median microseconds of each way, on the slowest rank; and of one call on a flat tensor. Collective."""
    with dpcomm.Communicator() as comm:
        contestants = ways(comm)
        first = inputs(sizes)
        comm.allreduce(first)
        for name, way in contestants.items():
            xs = inputs(sizes)
            way(xs)
            if not all(map(torch.equal, xs, first)):
                raise AssertionError(f"{name}: another result")
        zeros, flat = [torch.zeros(n) for n in sizes], [torch.zeros(sum(sizes))]
        subjects = {name: (way, zeros) for name, way in contestants.items()}
        subjects["dpcomm, one flat tensor"] = (lambda xs: comm.allreduce(xs[0]), flat)
        times: dict[str, list[int]] = {name: [] for name in subjects}
        for _ in range(rounds):
            for name, (way, xs) in subjects.items():
                way(xs)  # where the ranks meet
                start = time.perf_counter_ns()
                way(xs)
                times[name].append(time.perf_counter_ns() - start)
    slowest = {}
    for name, nanoseconds in times.items():
        timed = torch.tensor(nanoseconds)
        dist.all_reduce(timed, dist.ReduceOp.MAX)
        slowest[name] = statistics.median((timed / 1e3).tolist())
    return slowest


def run_rank(rank: int, port: int, arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=TCPStore("127.0.0.1", port, is_master=False), rank=rank, world_size=RANKS)
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(arguments.least, arguments.most + 1, (arguments.tensors,), generator=generator).tolist()
    medians = measure(sizes, arguments.rounds)
    if rank == 0:
        print(f"{len(sizes)} tensors of {min(sizes)} to {max(sizes)} float32, {sum(sizes)} in all, {RANKS} ranks")
        for name, median in medians.items():
            print(f"{name:24} {median:10.0f} us")
    dist.destroy_process_group()


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tensors", type=int, default=5000, help="how many (default: 5000)")
    parser.add_argument("--least", type=int, default=16, help="elements of the smallest (default: 16)")
    parser.add_argument("--most", type=int, default=400, help="elements of the largest (default: 400)")
    parser.add_argument("--rounds", type=int, default=20, help="timed calls of each way (default: 20)")
    arguments = parser.parse_args(argv)
    if min(arguments.tensors, arguments.least, arguments.rounds) < 1 or arguments.most < arguments.least:
        parser.error("all numbers must be at least 1, and --most at least --least")
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    spawn(run_rank, (store.port, arguments), nprocs=RANKS)  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main(sys.argv[1:])
