"""What `plan` counts: elements, groups, messages, slices, and the bytes that a rank or a host's card has to send.

Nothing here is a time. The same arithmetic as the engines': csrc/host/call_facts.cpp, csrc/core/chunks.h and
csrc/cpu/carried_engine.cpp; bytes of a message are the extension's own.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

from dpcomm import _native

KIB, MIB = 1 << 10, 1 << 20
counted = lru_cache(4096)  # a fit asks the same of each row thousands of times
GROUP = 256  # elements that share a scale
ARENA_BYTES = 64 * MIB  # DPCOMM_ARENA_MB
SLOTS = 4  # csrc/carried/schedule.h: kCarriedSlots
LEAST_SLICE, MOST_SLICE, SLICES = 512 * KIB, 2 * MIB, 4  # csrc/cpu/carried_steps.h
LEAST_GROUPS = 512  # of a slice of two levels: csrc/cpu/two_level.cpp
ASIDE_BYTES = 512 * KIB  # from here on three ranks and more leave codec none to gloo's own all-reduce
ELEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


class Traffic(NamedTuple):
    """Bytes that all ranks of one call read and write together, by kind of memory."""

    tensor_read: float
    tensor_written: float
    message_read: float
    message_written: float

    @property
    def total(self) -> float:
        return sum(self)

    @property
    def busier_way(self) -> float:
        """What crosses the bus in its busier direction where messages lie in host memory."""
        return max(self.message_read, self.message_written)


@counted
def traffic(algorithm: str, codec: str, nranks: int, tensor: float, wire: float, pinned: bool) -> Traffic:
    """Counted from csrc/core/direct.h, oneshot.h and ring.h, with chunks of equal size.

    S bytes of a rank's tensors, W of one message of all of them, N ranks; everything for one rank, times N. A codec
    that loses bits (fp16) also sends to itself; where all see one memory (pinned) a result is written once, else N - 1
    times.

        direct   give     reads S (N-1)/N, fp16 S         writes messages W (N-1)/N, fp16 W
                 reduce   reads own S/N (fp16 none), messages W (N-1)/N (fp16 W)
                          writes S/N, results W/N times readers
                 take     reads messages W (N-1)/N        writes S (N-1)/N
        oneshot  put      reads S, writes W: N - 1 times (fp16 N), in one memory once
                 reduce   reads own S (fp16 none), messages W (N-1) (fp16 W N), writes S
        ring     give, N - 1 additions, N - 1 forwards: tensors read and written once, messages W 2(N-1)/N each way

    Args:
        tensor: S. wire: W.
        pinned: messages lie in host memory, which all ranks see.
    """
    n, lossy = nranks, codec == "fp16"
    senders = n if lossy else n - 1  # of contributions, to each reader
    if algorithm == "direct":
        results = 1 if pinned else n - 1
        one = Traffic(tensor, tensor, wire * (senders + n - 1) / n, wire * (senders + results) / n)
    elif algorithm == "oneshot":
        puts = 1 if pinned else senders
        one = Traffic(tensor * (puts + (not lossy)), tensor, wire * senders, wire * puts)
    else:
        one = Traffic(tensor, tensor, wire * 2 * (n - 1) / n, wire * 2 * (n - 1) / n)
    return Traffic(*(n * each for each in one))


class Load(NamedTuple):
    """One call: elements of a dtype, and the codec they travel in."""

    elems: int
    dtype: str
    codec: str

    @property
    def plain(self) -> int:
        """Bytes of the tensor."""
        return self.elems * ELEM_BYTES[self.dtype]

    @property
    def groups(self) -> int:
        return math.ceil(self.elems / GROUP)

    @property
    def group_bytes(self) -> int:
        """Bytes of a group in a message of dpcomm's own algorithms."""
        return _native.wire_bytes(GROUP, _native.DTYPES[self.dtype], _native.CODECS[self.codec])

    @property
    def coded(self) -> int:
        """Bytes of one message that holds everything: csrc/core/types.h, group_bytes."""
        return self.groups * self.group_bytes

    @property
    def native(self) -> int:
        """Bytes that a library's own all-reduce is given: two an element with a codec."""
        return self.plain if self.codec == "none" else min(2 * self.elems, self.plain)

    def share(self, parts: int) -> Load:
        """The largest of equal parts, cut between groups."""
        return self._replace(elems=min(self.elems, math.ceil(self.groups / parts) * GROUP))


class Place(NamedTuple):
    """Hosts that each have as many ranks."""

    hosts: int
    ranks: int  # of a host
    network: float | None = None  # bytes per second that a host can send, all its cards together; None: without limit
    processors: float | None = None  # of a host, for all its ranks; None: one each

    @property
    def nranks(self) -> int:
        return self.hosts * self.ranks

    @property
    def crowded(self) -> float:
        """Ranks that share a processor, at least 1."""
        return max(1.0, self.ranks / self.processors) if self.processors else 1.0


def sent_groups(algorithm: str, groups: int, nranks: int, memory: bool) -> int:
    """Groups that the busiest rank, the first, sends: wire_groups of csrc/host/call_facts.cpp.

    Args:
        memory: all ranks see one memory, so that what all get is written once.
    """
    copies = 1 if memory else nranks - 1
    if algorithm == "oneshot":
        return groups * copies
    chunk = math.ceil(groups / nranks)
    sizes = [max(0, min(groups - part * chunk, chunk)) for part in (0, 1 % nranks, 2 % nranks)]
    if algorithm == "direct":
        return groups + (copies - 1) * sizes[0]
    return 2 * groups - sizes[1] - sizes[2]


@counted
def sent_bytes(algorithm: str, load: Load, nranks: int) -> float:
    """Bytes that a rank sends over a network. A library's own all-reduce is a ring, which sends the least there is,
    2 (N-1)/N of the bucket: Patarasuk and Yuan 2009."""
    if nranks == 1:
        return 0.0
    if algorithm == "native":
        return 2 * (nranks - 1) / nranks * load.native
    return sent_groups(algorithm, load.groups, nranks, memory=False) * load.group_bytes


@counted
def host_bytes(algorithm: str, load: Load, place: Place) -> float:
    """Bytes that the network card of a host has to send, and to receive.

    direct, oneshot   what its R ranks send to the N - R ranks elsewhere: R (N-R)/(N-1) of what one rank sends
    ring, native      one rank's next is on another host: what one rank sends
    two_level         R ranks with a shard each, direct among the hosts: 2 (H-1)/H of the bucket

    """
    if place.hosts == 1:
        return 0.0
    if algorithm == "two_level":
        shard = load.share(place.ranks)
        return place.ranks * sent_bytes("direct", shard, place.hosts)
    sent = sent_bytes(algorithm, load, place.nranks)
    if algorithm in ("ring", "native"):
        return sent
    return sent * place.ranks * (place.nranks - place.ranks) / (place.nranks - 1)


def carried_slices(algorithm: str, load: Load, nranks: int, two_levels: bool = False) -> int:
    """Slices of a chunk on engine gloo: a quarter of it each, within limits, and within a slot
    (CarriedEngine::begin and carried_slot_bytes).

    Args:
        two_levels: of a shard, between the hosts (TwoLevel::slice_bytes); a rank owns one.
    """
    arena = ARENA_BYTES // 2 if two_levels else ARENA_BYTES
    fits = arena // ((3 * nranks + 2) * SLOTS) // 4096 * 4096
    slot = max(4096, min(fits, MOST_SLICE))
    parts = 1 if algorithm == "oneshot" else nranks
    chunk = load.coded / parts
    least = LEAST_GROUPS * load.group_bytes if two_levels else LEAST_SLICE
    wished = min(max(chunk / SLICES, min(least, slot)), slot)
    return max(1, math.ceil(math.ceil(load.groups / parts) / max(1, int(wished // load.group_bytes))))


@counted
def messages(algorithm: str, load: Load, nranks: int, two_levels: bool = False) -> int:
    """Messages that a rank sends one behind the other: to each peer once a hand-over and slice; a ring's and a
    library's 2 (N-1) steps."""
    if algorithm == "native":
        return 2 * (nranks - 1)
    hand_overs = 1 if algorithm == "oneshot" else 2
    return hand_overs * (nranks - 1) * carried_slices(algorithm, load, nranks, two_levels)


@counted
def auto(load: Load, nranks: int, network: bool) -> str:
    """What algorithm "auto" is at this size: _native.choose_algorithm; engine gloo's steps_aside."""
    if network and nranks > 2 and load.codec == "none" and load.dtype == "float32" and load.plain >= ASIDE_BYTES:
        return "native"
    names = {number: name for name, number in _native.ALGORITHMS.items()}
    dtype, codec = _native.DTYPES[load.dtype], _native.CODECS[load.codec]
    return names[_native.choose_algorithm(load.elems, dtype, codec, nranks, network)]
