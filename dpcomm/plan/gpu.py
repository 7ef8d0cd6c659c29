"""How long an all-reduce on GPUs should take: bytes and launches counted from the sources, times speeds that others
have published or that are assumed. Nothing here was measured on a GPU, and none is needed.

Every assumption is three numbers: the best case, the likely one, the worst one. A time is computed for each.
docs/model.md says where the numbers come from.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

from dpcomm.plan.counts import ARENA_BYTES, GROUP, SLOTS, traffic

ELEM_BYTES = 4  # float32
WINDOW = 2  # csrc/carried/schedule.cpp: messages of a ring on their way
P2P_CTAS = 16  # of a rank
BEST, LIKELY, WORST = CASES = (0, 1, 2)


class Bar(NamedTuple):
    """An assumption, with its error bar."""

    best: float
    likely: float
    worst: float


class Coding(NamedTuple):
    """How a group of 256 values lies in a tensor and in a message. Bytes."""

    plain: int = ELEM_BYTES * GROUP
    coded: int = 2 * GROUP + 1  # codes and one exponent
    lossy: bool = True  # a rank sends to itself, too

    @property
    def name(self) -> str:
        """Of the codec, as traffic() knows it."""
        return "fp16" if self.lossy else "none"


FP16 = Coding()
PLAIN, CODED = FP16.plain, FP16.coded


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


class Fixed(NamedTuple):
    """What an exchange costs beside its bytes, in microseconds: with all peers, with two."""

    group_us: Bar
    neighbour_us: Bar


NVLINK_FIXED = Fixed(Bar(10, 16, 30), Bar(6, 10, 18))
PCIE_FIXED = Fixed(Bar(20, 30, 50), Bar(12, 20, 35))
NETWORK_FIXED = Fixed(Bar(25, 40, 70), Bar(15, 25, 45))
HOPPER = Bar(2900, 2500, 2000)  # of 3350 by the data sheet
KERNEL_US = Bar(2, 3, 5)
# What the host needs to enqueue: a kernel, a group, each send or receive in it.
HOST_KERNEL_US, HOST_GROUP_US, HOST_TRANSFER_US = Bar(2.5, 4, 6), Bar(6, 10, 20), Bar(0.3, 0.5, 1)
CTA = Bar(60, 40, 25)  # 10^9 bytes per second that one CTA of engine p2p reads and writes
P2P_US = Bar(8, 12, 25)  # its launch and its two hand-overs
P2P_HAND_OVER_US = Bar(1.5, 2.5, 5)  # each further one


# --- counted ---------------------------------------------------------------------------------------------------------


@functools.lru_cache
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


def cut_of(
    size: float,
    nranks: int,
    arena: int = ARENA_BYTES,
    slices: int | None = None,
    coding: Coding = FP16,
    parts: int | None = None,
) -> Cut:
    """As engine nccl cuts it for codec fp16; or into so many slices, as if slots were large enough. `parts`: chunks, if
    they are not as many as ranks."""
    chunk = math.ceil(math.ceil(size / coding.plain) / (parts or nranks))
    count = slices or max(1, math.ceil(chunk / max(1, slot_groups(nranks, arena, coding))))
    return Cut(count, math.ceil(chunk / count))


def slot_groups(nranks: int, arena: int = ARENA_BYTES, coding: Coding = FP16) -> int:
    """Groups that a slot holds: NcclEngine's slot_bytes_for."""
    return arena // (lanes(nranks) * SLOTS) // 4096 * 4096 // coding.coded


def passes(nranks: int, groups: int, coding: Coding = FP16) -> tuple[int, int, int]:
    """Bytes that give, reduce and take read and write, for a slice of so many groups a chunk: csrc/core/direct.h with
    one message for all readers. Each value is read once and written once a step. Codec fp16; none, in brackets, leaves
    its own contribution where it is:

        give     reads N PLAIN (everyone's chunk, the own one too: N-1), writes N CODED (N-1)
        reduce   reads N CODED, writes PLAIN to the tensor and CODED for the others
        take     reads (N-1) CODED, writes (N-1) PLAIN
    """
    n, plain, coded = nranks, coding.plain, coding.coded
    give = (n if coding.lossy else n - 1) * (plain + coded)
    reduce = n * coded + plain + coded
    take = (n - 1) * (coded + plain)
    return give * groups, reduce * groups, take * groups


class Launches(NamedTuple):
    """What a call enqueues: csrc/nccl/engine.cpp and csrc/carried/schedule.cpp. Two kernels begin and end it."""

    kernels: int
    groups: int
    transfers: int  # ncclSend and ncclRecv of a group


def launches_of(algorithm: str, nranks: int, slices: int) -> Launches:
    """direct: give, reduce, take and two exchanges a slice. oneshot: give, reduce, an exchange. ring: a kernel each
    turn, a hop after all but the last."""
    if algorithm == "direct":
        return Launches(2 + 3 * slices, 2 * slices, 2 * (nranks - 1))
    if algorithm == "oneshot":
        return Launches(2 + 2 * slices, slices, 2 * (nranks - 1))
    turns = 2 * nranks - 1
    return Launches(2 + turns * slices, (turns - 1) * slices, 2)


# --- modelled --------------------------------------------------------------------------------------------------------


def us(moved: float, gb_s: float) -> float:
    """Microseconds for so many bytes."""
    return moved / gb_s / 1e3


def exchange_us(m: Machine, message: float, case: int) -> float:
    """Everyone sends a message to everyone: within the host at once, between hosts through its NICs."""
    inside = us((m.gpus - 1) * message, m.peers[case])
    between = us(m.gpus * (m.ranks - m.gpus) * message, m.nics * m.nic[case]) if m.hosts > 1 else 0.0
    return m.group_us[case] + max(inside, between)


def hop_us(m: Machine, message: float, case: int) -> float:
    """Everyone sends a message to the next rank. Of a host, one rank's next is on another."""
    inside = us(message, m.neighbour[case]) if m.gpus > 1 else 0.0
    return m.neighbour_us[case] + max(inside, us(message, m.nic[case]) if m.hosts > 1 else 0.0)


def enqueue_us(launches: Launches, case: int) -> float:
    """What the host needs for a call; a call cannot be faster."""
    group = HOST_GROUP_US[case] + launches.transfers * HOST_TRANSFER_US[case]
    return launches.kernels * HOST_KERNEL_US[case] + launches.groups * group


def direct_us(m: Machine, size: float, case: int, coding: Coding = FP16) -> float:
    """dpcomm nccl, direct."""
    cut = cut_of(size, m.ranks, coding=coding)
    enqueued = enqueue_us(launches_of("direct", m.ranks, cut.slices), case)
    return max(direct_on_device_us(m, cut, case, coding), enqueued)


def direct_on_device_us(m: Machine, cut: Cut, case: int, coding: Coding = FP16) -> float:
    """One slice: give, exchange, reduce, exchange, take, one behind the other. Several: the exchanges are on a stream
    of their own, and the busier stream decides, behind the first give and before the last take."""
    moved = passes(m.ranks, cut.groups, coding)
    give, reduce, take = (us(each, m.memory[case]) + m.kernel_us[case] for each in moved)
    exchange = exchange_us(m, cut.groups * coding.coded, case)
    steps, wire = cut.slices * (give + reduce + take), cut.slices * 2 * exchange
    busy = steps + wire if cut.slices == 1 else max(steps + 2 * exchange, wire + give + take)
    return busy + 2 * m.kernel_us[case]  # that begin and end the call


def oneshot_us(m: Machine, size: float, case: int, coding: Coding = FP16) -> float:
    """dpcomm nccl, oneshot: everyone sends all to everyone."""
    cut = cut_of(size, m.ranks, coding=coding, parts=1)
    message = cut.groups * coding.coded
    moved = traffic("oneshot", coding.name, m.ranks, cut.groups * coding.plain, message, True).total / m.ranks
    steps = us(moved, m.memory[case]) + 2 * m.kernel_us[case]
    exchange = exchange_us(m, message, case)
    busy = max(cut.slices * steps + exchange, cut.slices * exchange + steps) + 2 * m.kernel_us[case]
    return max(busy, enqueue_us(launches_of("oneshot", m.ranks, cut.slices), case))


def ring_us(m: Machine, size: float, case: int, coding: Coding = FP16) -> float:
    """dpcomm nccl, ring: 2N - 1 turns of a kernel and, but for the last, a hop. Two slices take turns."""
    n, cut = m.ranks, cut_of(size, m.ranks, coding=coding)
    turns = 2 * n - 1
    tensor, wire = cut.groups * n * coding.plain, cut.groups * n * coding.coded
    moved = traffic("ring", coding.name, n, tensor, wire, False).total / n
    step = us(moved / turns, m.memory[case]) + m.kernel_us[case]
    hop = hop_us(m, cut.groups * coding.coded, case)
    windows, alone = divmod(cut.slices, WINDOW)
    busy = windows * turns * max(WINDOW * step, WINDOW * hop, step + hop) + alone * (turns * step + (turns - 1) * hop)
    return max(busy + 2 * m.kernel_us[case], enqueue_us(launches_of("ring", n, cut.slices), case))


def p2p_us(m: Machine, size: float, case: int, coding: Coding = FP16, algorithm: str = "direct") -> float:
    """dpcomm p2p: one kernel, whose CTAs move every byte while the links carry what is for others."""
    n, coded = m.ranks, size * coding.coded / coding.plain
    moved = traffic(algorithm, coding.name, n, size, coded, False).total / n
    sent = coded * (n - 1) if algorithm == "oneshot" else 2 * coded * (n - 1) / n
    hand_overs = {"direct": 0, "oneshot": -1, "ring": 2 * (n - 1) - 2}[algorithm]  # beyond two
    fixed = P2P_US[case] + hand_overs * P2P_HAND_OVER_US[case]
    return fixed + max(us(moved, min(P2P_CTAS * CTA[case], m.memory[case])), us(sent, m.peers[case]))


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


def none_us(m: Machine, size: float, case: int) -> float:
    """dpcomm nccl, none: ncclAllReduce between the kernels that begin and end a call."""
    return stock_us(m, size, case) + 2 * m.kernel_us[case]


def bfloat16_us(m: Machine, size: float, case: int) -> float:
    """Cast, ncclAllReduce of half the bytes, cast back."""
    return half_us(m, size, size / 2, case)


def native_us(m: Machine, size: float, half: float, case: int) -> float:
    """dpcomm nccl, native in 16 bits: casts of ours, between the kernels that begin and end a call."""
    return half_us(m, size, half, case) + 2 * m.kernel_us[case]


def half_us(m: Machine, size: float, half: float, case: int) -> float:
    """The same, of a tensor of `size` bytes that has `half` bytes as 16-bit numbers."""
    cast = us(size + half, m.memory[case]) + m.kernel_us[case]
    return stock_us(m, half, case) + 2 * cast
