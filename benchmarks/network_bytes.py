"""What a host sends in a call: as dpcomm counts it, and as the host's interface does. For the ranks of network.py."""

from pathlib import Path

import network_plan as plans
import torch
import torch.distributed as dist

from dpcomm.plan import counts

INTERFACE = "eth0"  # of every host


def leaving_share(engine: str, variant: str, elems: int, shape: tuple[int, int], dtype: str = plans.FLOAT32) -> float:
    """Of the bytes that a communicator counts, those that leave the host. Two levels count no others; flat algorithms
    know no hosts and count what goes to all other ranks."""
    codec, _, algorithm = variant.partition("/")
    if algorithm == "auto" and engine == "two_level":
        return 1.0
    if algorithm == "auto":
        algorithm = counts.auto(counts.Load(elems, dtype, codec), shape[0] * shape[1], network=True)
    return 1.0 if algorithm == "two_level" else plans.leaving_share(algorithm, *shape)


def busiest_host(sent: float, shape: tuple[int, int]) -> float:
    """What the host sends that sends most: the ranks of a host share its line. Collective."""
    by_host = torch.zeros(shape[0], dtype=torch.float64)
    by_host[dist.get_rank() // shape[1]] = sent
    dist.all_reduce(by_host)
    return float(by_host.max())


def interface_sent() -> int:
    """Bytes that this host's interface has sent. /proc/self/net is that of the process's own network."""
    for text in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, counters = text.partition(":")
        if name.strip() == INTERFACE:
            return int(counters.split()[8])  # 8 counters of what was received come first
    raise RuntimeError(f"no interface {INTERFACE}: this is not a host of the network benchmark")


def interface_sent_by_all() -> int:
    """The same, when no rank of this host sends any more. Collective."""
    dist.barrier()
    return interface_sent()
