"""What ranks tell each other through the store while a communicator is built: fixed-size, checked records.

    prefix [0, 44)   magic, protocol, arena layout, rank, dpcomm version: the same in every version of dpcomm, so that
                     two versions recognise each other
    body             `Hello` or `Outcome`
    crc32            of all before it, 4 bytes

No pickle: a record from a stranger can at worst be refused.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar, cast

from dpcomm import _native
from dpcomm.errors import InternalError, VersionError

MAGIC = b"dpcomm\r\n"
PROTOCOL = 5
PAYLOAD_BYTES = 96

PREFIX = struct.Struct("<8sIII24s")
CRC = struct.Struct("<I")
HELLO = struct.Struct("<IqqQQQ40s64s128s16s16s16sdqIII8s8sIi16s")
OUTCOME = struct.Struct(f"<I16sii1024sI{PAYLOAD_BYTES}s")


class Hello(NamedTuple):
    """Who a rank is and what it wants to build."""

    rank: int
    nranks: int
    pid: int
    uid: int
    net_namespace: int
    pid_namespace: int
    start_time: int  # of the process, in clock ticks since boot: tells a reused pid from the first
    boot_id: str
    hostname: str
    group: str
    codec: str
    engine: str
    algorithm: str
    bucket_cap_mb: float
    arena_bytes: int
    channels: int  # asked for; 0: measured
    processors: int  # that the process may run on
    processor_set: int  # the same for the same processors
    device: str  # "cpu" or "cuda"
    arena: str  # of GPUs, as asked for: "auto", "device" or "pinned"; empty on CPU
    max_ctas: int  # asked for; 0: as many as perform best
    ordinal: int  # of the GPU in its process, -1 on CPU; ranks differ in it
    intra_codec: str  # of engine two_level


def hosts_as_said(hellos: Sequence[Hello]) -> list[list[int]]:
    """The ranks of each host, by what they say of themselves: same name, same boot, same network namespace."""
    places: dict[tuple[str, str, int], list[int]] = {}
    for hello in hellos:
        places.setdefault((hello.hostname, hello.boot_id, hello.net_namespace), []).append(hello.rank)
    return list(places.values())


class Outcome(NamedTuple):
    """How a stage ended on a rank: code "" is success. The payload belongs to the stage."""

    rank: int
    stage: int
    code: str
    errno: int
    lost_rank: int
    message: str
    payload: bytes


T = TypeVar("T", Hello, Outcome)


def encode(record: Hello | Outcome) -> bytes:
    """The record's bytes. Texts too long for their field are cut."""
    if isinstance(record, Hello):
        # The longest text field is 128 bytes; struct cuts what is too long for a shorter one, `_string` mends the edge.
        body = HELLO.pack(*(_text(f, 128) if isinstance(f, str) else f for f in record[1:]))
    else:
        body = OUTCOME.pack(
            record.stage,
            _text(record.code, 16),
            record.errno,
            record.lost_rank,
            _text(record.message, 1024),
            len(record.payload),
            record.payload,
        )
    prefix = PREFIX.pack(MAGIC, PROTOCOL, _native.LAYOUT, record.rank, _text(_native.version, 24))
    return prefix + body + CRC.pack(zlib.crc32(prefix + body))


def decode(kind: type[T], data: bytes, rank: int) -> T:
    """Checks the bytes that `rank` published and takes them apart.

    Raises:
        VersionError: They come from a version of dpcomm that this one cannot work with.
        InternalError: They are no such record.
    """
    where = f"handshake from rank {rank}"
    body = HELLO if kind is Hello else OUTCOME
    if len(data) < PREFIX.size:
        raise InternalError(f"{where}: {len(data)} bytes are too few. Does something else write to this store?")
    magic, protocol, layout, sender, version = PREFIX.unpack_from(data)
    if magic != MAGIC:
        raise InternalError(f"{where}: bad magic. Does something else write to this store?")
    theirs, ours = (protocol, layout, _string(version, where)), (PROTOCOL, _native.LAYOUT, _native.version)
    if theirs != ours:
        raise VersionError(
            f"rank {rank} runs dpcomm {theirs[2]} (protocol {theirs[0]}, layout {theirs[1]}), this rank "
            f"dpcomm {ours[2]} (protocol {ours[0]}, layout {ours[1]}). Install one version everywhere."
        )
    if len(data) != PREFIX.size + body.size + CRC.size:
        raise InternalError(f"{where}: {len(data)} bytes, expected {PREFIX.size + body.size + CRC.size}")
    if CRC.unpack(data[-CRC.size :])[0] != zlib.crc32(data[: -CRC.size]):
        raise InternalError(f"{where}: bad checksum")
    if sender != rank:
        raise InternalError(f"{where}: it calls itself rank {sender}. Two processes with one rank?")
    fields = body.unpack_from(data, PREFIX.size)
    record: Any = _hello(fields, rank, where) if kind is Hello else _outcome(fields, rank, where)
    return cast(T, record)


def _hello(fields: tuple[Any, ...], rank: int, where: str) -> Hello:
    values: list[Any] = [_string(f, where) if isinstance(f, bytes) else f for f in fields]
    return Hello(rank, *values)


def _outcome(fields: tuple[Any, ...], rank: int, where: str) -> Outcome:
    stage, code, errno, lost_rank, message, size, payload = fields
    if size > PAYLOAD_BYTES:
        raise InternalError(f"{where}: a payload of {size} bytes, at most {PAYLOAD_BYTES} fit")
    return Outcome(rank, stage, _string(code, where), errno, lost_rank, _string(message, where), payload[:size])


def _text(text: str, size: int) -> bytes:
    """UTF-8 cut to `size` bytes at a character's edge."""
    return text.encode(errors="replace")[:size].decode(errors="ignore").encode()


def _string(field: bytes, where: str) -> str:
    try:
        return field.rstrip(b"\0").decode()
    except UnicodeDecodeError:
        raise InternalError(f"{where}: text that is not UTF-8") from None


def bitmap(flags: list[bool]) -> bytes:
    """One bit for each rank, as many as fit into a payload."""
    value = sum(1 << rank for rank, flag in enumerate(flags[: 8 * PAYLOAD_BYTES]) if flag)
    return value.to_bytes(PAYLOAD_BYTES, "little")


def ranks_in(payload: bytes) -> tuple[int, ...]:
    """The ranks whose bits are set."""
    value = int.from_bytes(payload, "little")
    return tuple(rank for rank in range(value.bit_length()) if value >> rank & 1)
