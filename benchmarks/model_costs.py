"""How long an all-reduce on GPUs should take: bytes and launches counted from the sources, times speeds that others
have published or that are assumed. Nothing here is measured, and no GPU is needed.

Every assumption is three numbers: the best case, the likely one, the worst one. A time is computed for each.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

from loopback_plan import traffic

GROUP, ELEM_BYTES = 256, 4  # elements that share a scale; float32
CODED = 2 * GROUP + 1  # bytes of a group in fp16: codes and one exponent
PLAIN = ELEM_BYTES * GROUP
MIB = 1 << 20
ARENA_BYTES = 64 * MIB  # DPCOMM_ARENA_MB
SLOTS, WINDOW = 4, 2  # csrc/carried/schedule.h: kCarriedSlots, and messages of a ring on their way
P2P_CTAS = 16  # of a rank
BEST, LIKELY, WORST = CASES = (0, 1, 2)


class Bar(NamedTuple):
    """An assumption, with its error bar."""

    best: float
    likely: float
    worst: float


class Machine(NamedTuple):
    """Some hosts with some GPUs each. Speeds in 10^9 bytes per second and direction, times in microseconds."""

    name: str
    hosts: int
    gpus: int  # of a host
    memory: Bar  # what a codec kernel reads and writes
    kernel_us: Bar  # a kernel behind another, beside its bytes
    group_us: Bar  # ncclSend and ncclRecv with all peers, beside their bytes
    neighbour_us: Bar  # with two peers
    peers: Bar  # what a GPU sends to all others of its host at once
    neighbour: Bar  # to one
    stock_us: Bar  # ncclAllReduce, beside its bytes
    stock: Bar  # its bus bandwidth
    nics: int = 0  # of a host
    nic: Bar = Bar(0, 0, 0)  # each
    published_us: tuple[tuple[int, float], ...] = ()  # of ncclAllReduce: (bytes, time), where there are such figures
    published_bus: tuple[float, float] | None = None  # its bus bandwidth for large messages: least and most

    @property
    def ranks(self) -> int:
        return self.hosts * self.gpus


# What the host needs to enqueue: a kernel, a group, each send or receive in it.
HOST_KERNEL_US, HOST_GROUP_US, HOST_TRANSFER_US = Bar(2.5, 4, 6), Bar(6, 10, 20), Bar(0.3, 0.5, 1)
CTA = Bar(60, 40, 25)  # 10^9 bytes per second that one CTA of engine p2p reads and writes
P2P_US = Bar(8, 12, 25)  # its launch and its two hand-overs

_HOPPER = Bar(2900, 2500, 2000)  # of 3350 by the data sheet
_NVLINK = Bar(370, 340, 280)
_KERNEL_US = Bar(2, 3, 5)
_HOPPER_US = ((MIB // 2, 24.0), (8 * MIB, 76.0), (16 * MIB, 121.0), (32 * MIB, 195.0), (128 * MIB, 561.0))

MACHINES = (
    Machine(
        "8 GPUs, NVLink 4 (8x H100 SXM)",
        hosts=1,
        gpus=8,
        memory=_HOPPER,
        kernel_us=_KERNEL_US,
        group_us=Bar(10, 16, 30),
        neighbour_us=Bar(6, 10, 18),
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
        kernel_us=_KERNEL_US,
        group_us=Bar(20, 30, 50),
        neighbour_us=Bar(12, 20, 35),
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
        memory=_HOPPER,
        kernel_us=_KERNEL_US,
        group_us=Bar(25, 40, 70),
        neighbour_us=Bar(15, 25, 45),
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
        memory=_HOPPER,
        kernel_us=_KERNEL_US,
        group_us=Bar(25, 40, 70),
        neighbour_us=Bar(15, 25, 45),
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
        kernel_us=_KERNEL_US,
        group_us=Bar(25, 40, 70),
        neighbour_us=Bar(15, 25, 45),
        peers=_NVLINK,
        neighbour=_NVLINK,
        stock_us=Bar(60, 90, 150),
        stock=Bar(12.2, 12, 11),
        nics=1,
        nic=Bar(12.2, 11.8, 11),
        published_bus=(12.2, 12.2),
    ),
)


# --- counted ---------------------------------------------------------------------------------------------------------


def lanes(nranks: int) -> int:
    """Lanes of slots that rank 0's scratch has: Scratch::plan of csrc/nccl/scratch.cpp."""
    taken: set[int] = set()
    for r in range(nranks):
        used = [writer for writer in range(nranks) if r == 0 or writer == 0]
        used += [nranks] + ([nranks + 1] if r in (0, 1 % nranks) else [])
        first = -nranks
        while any(first + lane < 0 or first + lane in taken for lane in used):
            first += 1
        taken |= {first + lane for lane in used}
    return max(taken) + 1


class Cut(NamedTuple):
    """How a bucket is cut: Chunks::cut of csrc/core/chunks.h."""

    slices: int
    groups: int  # of one slice of one chunk


def cut_of(size: int, nranks: int, arena: int = ARENA_BYTES, slices: int | None = None) -> Cut:
    """As engine nccl cuts it for codec fp16; or into so many slices, as if slots were large enough."""
    chunk = math.ceil(math.ceil(size / PLAIN) / nranks)
    count = slices or max(1, math.ceil(chunk / slot_groups(nranks, arena)))
    return Cut(count, math.ceil(chunk / count))


def slot_groups(nranks: int, arena: int = ARENA_BYTES) -> int:
    """Groups that a slot holds: NcclEngine's slot_bytes_for."""
    return arena // (lanes(nranks) * SLOTS) // 4096 * 4096 // CODED


def one_slice_bytes(nranks: int) -> int:
    """The largest bucket that travels in one slice."""
    return slot_groups(nranks) * nranks * PLAIN


def passes(nranks: int, groups: int) -> tuple[int, int, int]:
    """Bytes that give, reduce and take of codec fp16 read and write, for a slice of so many groups a chunk:
    csrc/core/direct.h with one message for all readers. Each value is read once and written once a step.

        give     reads N PLAIN (everyone's chunk, the own one too), writes N CODED
        reduce   reads N CODED, writes PLAIN to the tensor and CODED for the others
        take     reads (N-1) CODED, writes (N-1) PLAIN
    """
    n = nranks
    give = n * (PLAIN + CODED)
    reduce = n * CODED + PLAIN + CODED
    take = (n - 1) * (CODED + PLAIN)
    return give * groups, reduce * groups, take * groups


class Launches(NamedTuple):
    """What a call enqueues: csrc/nccl/engine.cpp and csrc/carried/schedule.cpp. Two kernels begin and end it."""

    kernels: int
    groups: int
    transfers: int  # ncclSend and ncclRecv of a group


def launches_of(algorithm: str, nranks: int, slices: int) -> Launches:
    """direct: give, reduce, take and two exchanges a slice. ring: a kernel each turn, a hop after all but the last."""
    if algorithm == "direct":
        return Launches(2 + 3 * slices, 2 * slices, 2 * (nranks - 1))
    turns = 2 * nranks - 1
    return Launches(2 + turns * slices, (turns - 1) * slices, 2)


# --- modelled --------------------------------------------------------------------------------------------------------


def us(moved: float, gb_s: float) -> float:
    """Microseconds for so many bytes."""
    return moved / gb_s / 1e3


def exchange_us(m: Machine, message: int, case: int) -> float:
    """Everyone sends a message to everyone: within the host at once, between hosts through its NICs."""
    inside = us((m.gpus - 1) * message, m.peers[case])
    between = us(m.gpus * (m.ranks - m.gpus) * message, m.nics * m.nic[case]) if m.hosts > 1 else 0.0
    return m.group_us[case] + max(inside, between)


def hop_us(m: Machine, message: int, case: int) -> float:
    """Everyone sends a message to the next rank. Of a host, one rank's next is on another."""
    inside = us(message, m.neighbour[case]) if m.gpus > 1 else 0.0
    return m.neighbour_us[case] + max(inside, us(message, m.nic[case]) if m.hosts > 1 else 0.0)


def enqueue_us(launches: Launches, case: int) -> float:
    """What the host needs for a call; a call cannot be faster."""
    group = HOST_GROUP_US[case] + launches.transfers * HOST_TRANSFER_US[case]
    return launches.kernels * HOST_KERNEL_US[case] + launches.groups * group


def direct_us(m: Machine, size: int, case: int) -> float:
    """dpcomm nccl, fp16, direct."""
    cut = cut_of(size, m.ranks)
    return max(direct_on_device_us(m, cut, case), enqueue_us(launches_of("direct", m.ranks, cut.slices), case))


def direct_on_device_us(m: Machine, cut: Cut, case: int) -> float:
    """One slice: give, exchange, reduce, exchange, take, one behind the other. Several: the exchanges are on a stream
    of their own, and the busier stream decides, behind the first give and before the last take."""
    give, reduce, take = (us(moved, m.memory[case]) + m.kernel_us[case] for moved in passes(m.ranks, cut.groups))
    exchange = exchange_us(m, cut.groups * CODED, case)
    steps, wire = cut.slices * (give + reduce + take), cut.slices * 2 * exchange
    busy = steps + wire if cut.slices == 1 else max(steps + 2 * exchange, wire + give + take)
    return busy + 2 * m.kernel_us[case]  # that begin and end the call


def ring_us(m: Machine, size: int, case: int) -> float:
    """dpcomm nccl, fp16, ring: 2N - 1 turns of a kernel and, but for the last, a hop. Two slices take turns."""
    n, cut = m.ranks, cut_of(size, m.ranks)
    turns = 2 * n - 1
    moved = sum(traffic("ring", "fp16", n, cut.groups * n * PLAIN, cut.groups * n * CODED, False)) / n
    step = us(moved / turns, m.memory[case]) + m.kernel_us[case]
    hop = hop_us(m, cut.groups * CODED, case)
    windows, alone = divmod(cut.slices, WINDOW)
    busy = windows * turns * max(WINDOW * step, WINDOW * hop, step + hop) + alone * (turns * step + (turns - 1) * hop)
    return max(busy + 2 * m.kernel_us[case], enqueue_us(launches_of("ring", n, cut.slices), case))


def p2p_us(m: Machine, size: int, case: int) -> float:
    """dpcomm p2p, fp16, direct: one kernel, whose CTAs move every byte while the links carry what is for others."""
    n, coded = m.ranks, size * CODED / PLAIN
    moved = sum(traffic("direct", "fp16", n, size, coded, False)) / n
    return P2P_US[case] + max(
        us(moved, min(P2P_CTAS * CTA[case], m.memory[case])), us(2 * coded * (n - 1) / n, m.peers[case])
    )


def stock_us(m: Machine, size: float, case: int) -> float:
    """ncclAllReduce: between published times as they are, a tenth more or less; else a fixed time and bytes."""
    bus = 2 * (m.ranks - 1) / m.ranks
    if not m.published_us:
        return m.stock_us[case] + us(bus * size, m.stock[case])
    points, factor = m.published_us, Bar(0.9, 1.0, 1.1)[case]
    if size <= points[0][0]:  # a call of no bytes, and the first point
        return m.stock_us[case] + (points[0][1] * factor - m.stock_us[case]) * size / points[0][0]
    if size >= points[-1][0]:
        return points[-1][1] * factor + us(bus * (size - points[-1][0]), m.stock[case])
    (low, low_us), (high, high_us) = next(pair for pair in itertools.pairwise(points) if size <= pair[1][0])
    return (low_us + (high_us - low_us) * (size - low) / (high - low)) * factor


def none_us(m: Machine, size: int, case: int) -> float:
    """dpcomm nccl, none: ncclAllReduce between the kernels that begin and end a call."""
    return stock_us(m, size, case) + 2 * m.kernel_us[case]


def bfloat16_us(m: Machine, size: int, case: int) -> float:
    """Cast, ncclAllReduce of half the bytes, cast back."""
    cast = us(1.5 * size, m.memory[case]) + m.kernel_us[case]
    return stock_us(m, size / 2, case) + 2 * cast


def halves_gain(m: Machine, size: int, case: int = LIKELY) -> float:
    """What two slices save of the time of one, on the device; negative where they cost. Slots are as large as that
    needs."""
    whole, halves = (direct_on_device_us(m, cut_of(size, m.ranks, slices=count), case) for count in (1, 2))
    return (whole - halves) / whole
