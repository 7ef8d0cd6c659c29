"""The machines of docs/model.md, and what follows for them. The formulas are dpcomm/plan/gpu.py's.

Nothing here is measured, and no GPU is needed.
"""

from __future__ import annotations

from dpcomm.plan.counts import ARENA_BYTES, MIB
from dpcomm.plan.gpu import (
    BEST,
    CASES,
    CODED,
    HOPPER,
    KERNEL_US,
    LIKELY,
    NETWORK_FIXED,
    NVLINK_FIXED,
    PCIE_FIXED,
    PLAIN,
    WORST,
    Bar,
    Machine,
    bfloat16_us,
    cut_of,
    direct_on_device_us,
    direct_us,
    exchange_us,
    lanes,
    launches_of,
    native_us,
    none_us,
    p2p_us,
    passes,
    ring_us,
    slot_groups,
    stock_us,
    us,
)

__all__ = [
    "ARENA_BYTES",
    "BEST",
    "CASES",
    "CODED",
    "LIKELY",
    "MACHINES",
    "MIB",
    "PLAIN",
    "WORST",
    "Bar",
    "Machine",
    "bfloat16_us",
    "cut_of",
    "direct_on_device_us",
    "direct_us",
    "exchange_us",
    "halves_gain",
    "lanes",
    "launches_of",
    "native_us",
    "none_us",
    "one_slice_bytes",
    "p2p_us",
    "passes",
    "ring_us",
    "slot_groups",
    "stock_us",
    "us",
]

_NVLINK = Bar(370, 340, 280)
_HOPPER_US = ((MIB // 2, 24.0), (8 * MIB, 76.0), (16 * MIB, 121.0), (32 * MIB, 195.0), (128 * MIB, 561.0))

MACHINES = (
    Machine(
        "8 GPUs, NVLink 4 (8x H100 SXM)",
        hosts=1,
        gpus=8,
        memory=HOPPER,
        kernel_us=KERNEL_US,
        group_us=NVLINK_FIXED.group_us,
        neighbour_us=NVLINK_FIXED.neighbour_us,
        peers=_NVLINK,
        neighbour=_NVLINK,
        stock_us=Bar(18, 22, 24),
        stock=Bar(480, 478, 475),
        published_us=_HOPPER_US,
        published_bus=(475, 480),
    ),
    Machine(
        "8 GPUs, PCIe 4",
        hosts=1,
        gpus=8,
        memory=Bar(1500, 800, 600),
        kernel_us=KERNEL_US,
        group_us=PCIE_FIXED.group_us,
        neighbour_us=PCIE_FIXED.neighbour_us,
        peers=Bar(24, 18, 10),
        neighbour=Bar(25, 24, 20),
        stock_us=Bar(30, 45, 60),
        stock=Bar(26, 25, 24),
        published_bus=(24, 26),
    ),
    Machine(
        "2 x 8 GPUs, NVLink inside, one 100 Gb/s NIC a host",
        hosts=2,
        gpus=8,
        memory=HOPPER,
        kernel_us=KERNEL_US,
        group_us=NETWORK_FIXED.group_us,
        neighbour_us=NETWORK_FIXED.neighbour_us,
        peers=_NVLINK,
        neighbour=_NVLINK,
        stock_us=Bar(40, 50, 70),
        stock=Bar(22.9, 18, 12.2),  # of a tree, whose NICs carry every byte once, to a ring
        nics=1,
        nic=Bar(12.2, 11.8, 11),
    ),
    Machine(
        "2 x 8 GPUs, NVLink inside, eight 400 Gb/s NICs a host",
        hosts=2,
        gpus=8,
        memory=HOPPER,
        kernel_us=KERNEL_US,
        group_us=NETWORK_FIXED.group_us,
        neighbour_us=NETWORK_FIXED.neighbour_us,
        peers=_NVLINK,
        neighbour=_NVLINK,
        stock_us=Bar(40, 50, 70),
        stock=Bar(430, 380, 330),
        nics=8,
        nic=Bar(48.8, 46, 40),
    ),
    Machine(
        "8 hosts of one GPU, a 100 Gb/s NIC each",
        hosts=8,
        gpus=1,
        memory=Bar(2900, 1500, 800),
        kernel_us=KERNEL_US,
        group_us=NETWORK_FIXED.group_us,
        neighbour_us=NETWORK_FIXED.neighbour_us,
        peers=_NVLINK,
        neighbour=_NVLINK,
        stock_us=Bar(60, 90, 150),
        stock=Bar(12.2, 12, 11),
        nics=1,
        nic=Bar(12.2, 11.8, 11),
        published_bus=(12.2, 12.2),
    ),
)


def one_slice_bytes(nranks: int) -> int:
    """The largest bucket that travels in one slice."""
    return slot_groups(nranks) * nranks * PLAIN


def halves_gain(m: Machine, size: int, case: int = LIKELY) -> float:
    """What two slices save of the time of one, on the device; negative where they cost. Slots are as large as that
    needs."""
    whole, halves = (direct_on_device_us(m, cut_of(size, m.ranks, slices=count), case) for count in (1, 2))
    return (whole - halves) / whole
