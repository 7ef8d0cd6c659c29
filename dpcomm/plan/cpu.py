"""How long an all-reduce on CPUs should take: engines shm and gloo, and two levels of both.

In the manner of Hockney (1994) and of Thakur, Rabenseifner and Gropp (2005): a time for each message, a time for each
byte moved, a time for each value encoded; counts are counts.py's, times were measured (constants.py). New
here is how line and processor go together. docs/plan.md has the sources, and the errors.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from dpcomm.plan import counts
from dpcomm.plan.counts import MIB, Load, Place

# Of a packet of 1500 bytes on Ethernet TCP carries 1448, and the packet is 1514 bytes long.
PAYLOAD = 1448 / 1514
FLOAT_MIB = MIB / 4  # elements of float32 in a MiB: what a codec's work is counted in


class Carried(NamedTuple):
    """Processor time of a rank, in microseconds, on engine gloo or in gloo's own all-reduce."""

    message_us: float  # each, one behind the other
    sent_us: float  # a MiB sent, which also is received
    coded_us: float  # a MiB of float32 encoded, added up and decoded


class Gloo(NamedTuple):
    """What was fitted to the measurements between hosts."""

    ours: Carried  # direct, oneshot, ring, and two levels between hosts
    native: Carried  # gloo's own all-reduce
    header_us: float  # ours: to tell one other rank of the call, before anything of it is sent
    call_us: float  # native: whatever is sent
    wake_us: float  # where ranks share processors: until the next one of gloo's ring has a turn
    inside: float  # price of engine shm's work inside a host, in two levels, beside the threads that move bytes
    overlap: float  # exponent: 1 is none, infinity is perfect


class Shm(NamedTuple):
    """What was fitted to the measurements within a host. Microseconds."""

    call_us: float
    handover_us: float
    wake_us: float  # where ranks share a processor: for each more than one
    cached_us: float  # a MiB read or written, in caches
    memory_us: float  # beyond them
    coded_us: float  # a MiB of float32 encoded, added up and decoded
    cache_mib: float  # of all ranks' tensors: where half is in caches
    crowding: float


SHARPNESS = 4  # of the step from caches to memory


def gloo_us(place: Place, load: Load, algorithm: str, fitted: Gloo) -> float:
    """A call on engine gloo; algorithm "native": gloo's own all-reduce, a ring.

    Args:
        place: hosts, ranks, what a host's network card carries.
        load: what is reduced, and its codec.
        algorithm: direct, oneshot, ring or native.
        fitted: the constants.

    Returns:
        Microseconds.
    """
    if place.nranks == 1:
        return 0.0
    line = line_us(counts.host_bytes(algorithm, load, place), place)
    if algorithm != "native":
        return together(carried_us(place, load, algorithm, place.nranks, fitted), line, overlap=fitted.overlap)
    messages = counts.messages(algorithm, load, place.nranks)
    turns = fitted.wake_us * messages if place.crowded > 1 else 0.0
    work = (fitted.call_us + work_us(fitted.native, load, algorithm, place.nranks, messages)) * place.crowded
    return together(work, line, turns, overlap=fitted.overlap)


def carried_us(place: Place, load: Load, algorithm: str, nranks: int, fitted: Gloo) -> float:
    """What the processors of a rank need on engine gloo for the share of a call that is among nranks, if the line costs
    nothing. All ranks are told of the call."""
    messages = counts.messages(algorithm, load, nranks, two_levels=nranks < place.nranks)
    told = fitted.header_us * (place.nranks - 1)
    return (told + work_us(fitted.ours, load, algorithm, nranks, messages)) * place.crowded


def work_us(own: Carried, load: Load, algorithm: str, nranks: int, messages: int) -> float:
    """Processor time of a rank that has a processor for itself."""
    moved = own.sent_us * counts.sent_bytes(algorithm, load, nranks) / MIB
    return own.message_us * messages + moved + own.coded_us * coded_mib(algorithm, load, nranks)


def coded_mib(algorithm: str, load: Load, nranks: int) -> float:
    """A codec's work, in MiB of float32: direct encodes and decodes each value about three times (give, reduce, take);
    oneshot encodes it once and decodes everyone's."""
    times = (1 + nranks) / 3 if algorithm == "oneshot" else 1.0
    return times * load.elems / FLOAT_MIB if load.codec != "none" else 0.0


def line_us(moved: float, place: Place) -> float:
    """What a host's network card needs for so many bytes of payload."""
    return 1e6 * moved / (place.network * PAYLOAD) if place.network else 0.0


def together(*times: float, overlap: float) -> float:
    """What goes on at once, each slowed down by the others: a p-norm, so never less than the longest nor more than the
    sum."""
    longest = max(times)
    return longest * sum((each / longest) ** overlap for each in times) ** (1 / overlap) if longest else 0.0


def shm_us(place: Place, load: Load, algorithm: str, fitted: Shm) -> float:
    """A call on engine shm, among the ranks of one host: bytes read and written (counts.traffic), and
    hand-overs: one in oneshot, two in direct, 2 (N-1) in a ring.

    Returns:
        Microseconds.
    """
    n = place.ranks
    if n == 1:
        return 0.0
    moved = counts.traffic(algorithm, load.codec, n, load.plain, load.coded, pinned=True).total / n
    hand_overs = {"direct": 2, "oneshot": 1, "ring": 2 * (n - 1)}[algorithm]
    apart = 1 / (1 + (fitted.cache_mib * MIB / max(1, n * load.plain)) ** SHARPNESS)  # share that caches do not hold
    byte_us = fitted.cached_us * (1 - apart) + fitted.memory_us * apart
    coded = coded_mib(algorithm, load, n)
    waits = fitted.call_us + fitted.handover_us * hand_overs * place.crowded + fitted.wake_us * (place.crowded - 1)
    work = byte_us * moved / MIB + fitted.coded_us * coded
    return waits + work * math.pow(place.crowded, fitted.crowding)


def two_level_us(place: Place, load: Load, gloo: Gloo, shm: Shm) -> float:
    """Reduce-scatter inside each host, all-reduce of a shard for each rank between hosts, all-gather inside. Both
    halves inside move what engine shm's direct moves, without a codec; the R shards share their host's card.

    Returns:
        Microseconds.
    """
    shard = load.share(place.ranks)
    between = carried_us(place, shard, counts.auto(shard, place.hosts, network=True), place.hosts, gloo)
    inside = gloo.inside * shm_us(place, load._replace(codec="none"), "direct", shm)
    line = line_us(counts.host_bytes("two_level", load, place), place)
    return together(inside + between, line, overlap=gloo.overlap)
