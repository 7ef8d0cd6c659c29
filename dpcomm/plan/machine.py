"""GPUs of which only the nominal speeds are known: what to assume of the rest, and two levels of them.

What is assumed is what docs/model.md assumes of its machines, as a share of the nominal speed where it has one.
"""

from __future__ import annotations

import math

from dpcomm.plan.counts import SLICES
from dpcomm.plan.gpu import (
    FP16,
    HOPPER,
    KERNEL_US,
    NETWORK_FIXED,
    NVLINK_FIXED,
    PCIE_FIXED,
    Bar,
    Coding,
    Launches,
    Machine,
    enqueue_us,
    launches_of,
    passes,
    us,
)

NVLINK_FROM = 100.0  # GB/s of a link: what is slower is taken for PCIe
NVLINK_SHARE = Bar(370 / 450, 340 / 450, 280 / 450)  # what NCCL's messages make of it
PCIE_SHARE = Bar(24 / 32, 18 / 32, 10 / 32)  # everyone to everyone
STOCK_SHARE = Bar(26 / 32, 25 / 32, 24 / 32)  # its all-reduce, without the switch's help; of NVLink 370 / 450
NIC_SHARE = Bar(12.2 / 12.5, 11.8 / 12.5, 11 / 12.5)
TREE_GAIN = Bar(1.88, 1.52, 1.0)  # two hosts: a tree's cards carry every byte once, a ring's nearly twice
PCIE_MEMORY, ANY_MEMORY = Bar(1500, 800, 600), Bar(2900, 1500, 800)
NVLINK_STOCK_US, PCIE_STOCK_US, LONE_STOCK_US = Bar(18, 22, 24), Bar(30, 45, 60), Bar(5, 8, 12)
# Of a tree's step between hosts; NCCL's own tables have 5 (LL), 8.5 (LL128) and 14 to 50 (Simple): graph/tuning.cc.
STEP_US = Bar(8.5, 13, 22)


def machine_of(hosts: int, gpus: int, link: float | None, network: float | None) -> Machine:
    """What is assumed of such hosts.

    Args:
        gpus: of a host.
        link: 10^9 bytes per second that a GPU can send within its host; not needed if it is alone there.
        network: 10^9 bytes per second that a host can send, all its cards together; not needed for one host.

    Returns:
        A machine whose every speed has a best, a likely and a worst case.
    """
    fast = link is not None and link >= NVLINK_FROM
    inside = _scaled(NVLINK_SHARE if fast else PCIE_SHARE, link or 1.0)
    nic = _scaled(NIC_SHARE, network or 1.0)
    fixed = NETWORK_FIXED if hosts > 1 else NVLINK_FIXED if fast else PCIE_FIXED
    memory = ANY_MEMORY if gpus == 1 else HOPPER if fast else PCIE_MEMORY
    return Machine(
        "",
        hosts,
        gpus,
        memory,
        KERNEL_US,
        *fixed,
        peers=inside,
        neighbour=inside,
        stock_us=stock_fixed_us(hosts, gpus, fast),
        stock=_stock_bus(hosts, gpus, link or 1.0, nic),
        nics=1 if hosts > 1 else 0,
        nic=nic,
    )


def _scaled(shares: Bar, speed: float) -> Bar:
    return Bar(*(share * speed for share in shares))


def _stock_bus(hosts: int, gpus: int, link: float, nic: Bar) -> Bar:
    """ncclAllReduce's bus bandwidth: of the slower of the two ways. 10^9 bytes per second."""
    inside = _scaled(STOCK_SHARE, link) if gpus > 1 else Bar(math.inf, math.inf, math.inf)
    if hosts == 1:
        return inside
    gain = TREE_GAIN if hosts == 2 else Bar(1, 1, 1)
    return Bar(*(min(a, b * c) for a, b, c in zip(inside, nic, gain, strict=True)))


def stock_fixed_us(hosts: int, gpus: int, fast: bool) -> Bar:
    """ncclAllReduce beside its bytes: inside a host, and up and down a tree of hosts (NCCL's graph/tuning.cc adds its
    latencies like this)."""
    inside = LONE_STOCK_US if gpus == 1 else NVLINK_STOCK_US if fast else PCIE_STOCK_US
    steps = 2 * math.ceil(math.log2(hosts)) if hosts > 1 else 0
    return Bar(*(a + steps * b for a, b in zip(inside, STEP_US, strict=True)))


def two_level_us(m: Machine, size: float, case: int, coding: Coding = FP16) -> float:
    """Reduce-scatter inside hosts without a codec; all-reduce of the shards between them, direct, with the codec;
    all-gather inside. All of it travels by engine nccl, one exchange behind the other; kernels of one slice run while
    another is on its way, in SLICES slices.

    Returns:
        Microseconds.
    """
    g, hosts = m.gpus, m.hosts
    inside = us(2 * size * (g - 1) / g, m.peers[case]) if g > 1 else 0.0
    adding = us(size * (1 + 1 / g), m.memory[case]) if g > 1 else 0.0  # what g ranks have of a shard, into memory
    groups = math.ceil(size / g / hosts / coding.plain)  # of one chunk of a shard
    steps = us(sum(passes(hosts, groups, coding)), m.memory[case])
    wire = us(2 * g * (hosts - 1) * groups * coding.coded, m.nics * m.nic[case])
    device, travel = adding + steps, inside + wire
    enqueued = enqueue_us(launches_of("direct", hosts, SLICES), case)
    if g > 1:  # each host's part of a slice is gathered, added up and spread
        enqueued += enqueue_us(Launches(SLICES * hosts, 2 * SLICES * hosts, 2 * (g - 1)), case)
    fixed = (2 + 2 * (g > 1)) * m.group_us[case] + (5 + (g > 1)) * m.kernel_us[case]
    return max(fixed + max(device, travel) + min(device, travel) / SLICES, enqueued)
