"""Which way of giving messages to gloo fills a line: two hosts exchange bytes over one process group or two.

Behind the choice in dpcomm/carriers.py (docs/performance.md, "Between hosts"). Hosts are network namespaces (hosts.py).
Prints medians; knows nothing of dpcomm.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from hosts import hosts, why_no_hosts
from torch._C._distributed_c10d import PrefixStore, ProcessGroupGloo

KIB = 1024
LIMIT = timedelta(seconds=60)
EXCHANGES = [(1, 64), (1, 256), (4, 256), (1, 1024), (12, 1024), (48, 256)]  # messages, KiB each
IN_FLIGHT = 2


def device(address: str) -> Any:
    return ProcessGroupGloo.create_device(hostname=address)


def group(store: Any, name: str, rank: int, made_on: Any) -> Any:
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices, options._timeout, options._threads = [made_on], LIMIT, 1
    return ProcessGroupGloo(PrefixStore(name, store), rank, 2, options)


def exchange(send_on: Any, receive_on: Any, peer: int, messages: int, size: int, ahead: int) -> Callable[[], None]:
    """Sends and receives so many messages; `ahead`: how many receives are posted before their turn."""
    given = [torch.zeros(size, dtype=torch.uint8) for _ in range(messages)]
    taken = [torch.zeros(size, dtype=torch.uint8) for _ in range(messages)]

    def run() -> None:
        receives: list[Any] = []
        works: list[tuple[Any, Any]] = []
        for i in range(messages):
            while len(receives) < min(messages, i + 1 + ahead):
                receives.append(receive_on.recv([taken[len(receives)]], peer, len(receives)))
            works.append((receives[i], send_on.send([given[i]], peer, i)))
            if i >= IN_FLIGHT:
                for work in works[i - IN_FLIGHT]:
                    work.wait()
        for pair in works[max(0, messages - IN_FLIGHT) :]:
            for work in pair:
                work.wait()

    return run


def median_us(meet: Any, run: Callable[[], None], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        meet.barrier().wait()
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


def play(rank: int, address: str, store_host: str, port: int, rounds: int) -> None:
    """One rank; rank 0 prints."""
    store = dist.TCPStore(store_host, port, is_master=False, timeout=LIMIT)  # type: ignore[attr-defined]
    first, second = device(address), device(address)
    one, two, apart = (group(store, str(i), rank, on) for i, on in enumerate((first, first, second)))
    meet = group(store, "meet", rank, device(address))
    ways = {
        "one group": (one, one, 0),
        "one, receives ahead": (one, one, 2),
        "a group a direction": (*((one, two) if rank == 0 else (two, one)), 0),
        "two, receives ahead": (*((one, two) if rank == 0 else (two, one)), 2),
        "a device each": (*((one, apart) if rank == 0 else (apart, one)), 0),
    }
    if rank == 0:
        print("messages  " + "  ".join(f"{way:>20}" for way in ways) + "   median us")
    for messages, kib in EXCHANGES:
        found = [
            median_us(meet, exchange(out, into, 1 - rank, messages, kib * KIB, ahead), rounds)
            for out, into, ahead in ways.values()
        ]
        if rank == 0:
            print(f"{messages:>2} x {kib:>4}  " + "  ".join(f"{us:>20.0f}" for us in found), flush=True)
    meet.barrier().wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--rank", nargs=4, metavar=("RANK", "ADDRESS", "STORE", "PORT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        rank, address, store_host, port = arguments.rank
        play(int(rank), address, store_host, int(port), arguments.rounds)
        return 0
    if why := why_no_hosts():
        print(why, file=sys.stderr)
        return 2
    with hosts(2) as net:
        store = net.inside(lambda: dist.TCPStore(net.store_host, 0, is_master=True, wait_for_workers=False))  # type: ignore[attr-defined]
        ranks = [
            subprocess.Popen(
                [
                    *[*net.command(rank), sys.executable, __file__, "--rounds", str(arguments.rounds), "--rank"],
                    *[str(rank), net.address(rank), net.store_host, str(store.port)],
                ]
            )
            for rank in range(2)
        ]
        return max(rank.wait(timeout=600) for rank in ranks)


if __name__ == "__main__":
    sys.exit(main())
