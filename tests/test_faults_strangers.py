"""Others in the store and at the sockets: garbage is refused with a sentence, strangers are dropped and counted.

Numbers in the names count the faults that dpcomm promises to answer; those that are missing have a test elsewhere.
"""

from __future__ import annotations

import os
import random
import socket
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist
from faulty import catch, check, check_all, check_usable
from stores import Spy, at, build, with_spy_on_rank_1

from dpcomm import records
from dpcomm.errors import InternalError, VersionError

GRACE_S = 1.0


# --- in the store ----------------------------------------------------------------------------------------------------


def with_checksum(record: bytes) -> bytes:
    return record[:-4] + struct.pack("<I", zlib.crc32(record[:-4]))


def patched(record: bytes, offset: int, value: bytes) -> bytes:
    return with_checksum(record[:offset] + value + record[offset + len(value) :])


# Offsets of the prefix: magic 0, protocol 8, layout 12, rank 16, version 20.
GARBAGE: dict[str, tuple[Callable[[bytes], bytes], str, str]] = {
    "48-short": (lambda r: r[:10], "InternalError", "10 bytes are too few"),
    "48-cut": (lambda r: r[:-1], "InternalError", " bytes, expected "),
    "48-oversized": (lambda r: r + bytes(1 << 20), "InternalError", " bytes, expected "),
    "48-bad-magic": (lambda r: b"PICKLE" + r[6:], "InternalError", "bad magic"),
    "48-random": (lambda r: random.Random(7).randbytes(len(r)), "InternalError", "bad magic"),
    "48-bad-checksum": (lambda r: r[:60] + bytes([r[60] ^ 1]) + r[61:], "InternalError", "bad checksum"),
    "48-other-rank": (lambda r: patched(r, 16, struct.pack("<I", 2)), "InternalError", "calls itself rank 2"),
    "42-other-version": (lambda r: patched(r, 20, b"9.9.9\0"), "VersionError", "rank 1 runs dpcomm 9.9.9"),
    "42-other-layout": (lambda r: patched(r, 12, struct.pack("<I", 77)), "VersionError", "layout 77"),
    "42-other-protocol": (lambda r: patched(r, 8, struct.pack("<I", 99))[:90], "VersionError", "(protocol 99"),
}


@pytest.mark.parametrize("stage", ["hello", "allocate", "verify"])
@pytest.mark.parametrize("fault", GARBAGE)
def test_garbage_in_the_store_is_named_on_all_ranks(fault: str, stage: str) -> None:
    change, name, text = GARBAGE[fault]
    caught = build(with_spy_on_rank_1(3, at(stage, change)))
    check_all(caught, name, "rank 1", text, within_s=GRACE_S)


def good_records() -> list[tuple[Any, bytes]]:
    """A record of each kind, with its kind."""
    hello = records.Hello(
        1,
        4,
        100,
        0,
        5,
        6,
        7,
        "boot",
        "host",
        "group",
        "none",
        "auto",
        "auto",
        25.0,
        1 << 26,
        0,
        2,
        7,
        "cpu",
        "",
        0,
        -1,
        "none",
    )
    outcome = records.Outcome(1, 2, "TIMEOUT", 0, -1, "ranks [2] did not come", b"p" * 64)
    made: list[tuple[Any, bytes]] = [(type(record), records.encode(record)) for record in (hello, outcome)]
    assert [records.decode(kind, data, 1) for kind, data in made] == [hello, outcome]
    return made


def test_48_fuzz_of_records() -> None:
    """Any bytes at all: a record or one of two errors; with a right checksum, too, so that the fields are reached."""
    rng = random.Random(1)
    refused = 0
    for kind, good in good_records():
        for _ in range(300):
            data = bytearray(good)
            for _ in range(rng.randint(1, 8)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            cut = bytes(data[: rng.randrange(len(data) + 1)]) if rng.random() < 0.3 else bytes(data)
            for bad in (cut, cut + rng.randbytes(rng.randrange(50)), with_checksum(bytes(data))):
                try:
                    records.decode(kind, bad, 1)
                except (InternalError, VersionError):  # and no other
                    refused += 1
    assert refused > 1200


# --- at the sockets --------------------------------------------------------------------------------------------------


class Intruder:
    """Connects to rank 0's listening socket when it is there, before any other rank does."""

    def __init__(self, act: Callable[[str, bytes], None]) -> None:
        self.act = act

    def publish(self, record: bytes) -> bytes:
        payload = records.decode(records.Outcome, record, 0).payload
        self.act("\0dpcomm-" + payload[:32].hex(), payload[32:64])
        return record


def build_with(act: Callable[[str, bytes], None]) -> list[object]:
    store = dist.HashStore()  # type: ignore[attr-defined]
    return build([Spy(store, at("allocate", Intruder(act).publish)), store, store])


def test_47_another_user_is_dropped_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to become another user")

    def connect_as_nobody(name: str, secret: bytes) -> None:
        script = (
            "import os, socket, sys; os.setgid(65534); os.setuid(65534); s = socket.socket(socket.AF_UNIX); "
            "s.connect(chr(0) + sys.argv[1]); s.send(bytes.fromhex(sys.argv[2]) + bytes(32))"
        )
        command = [sys.executable, "-S", "-c", script, name[1:], secret.hex()]
        subprocess.run(command, check=True, timeout=20)

    comms = build_with(connect_as_nobody)
    assert [c.describe()["rejected_connections"] for c in comms] == [1, 0, 0]  # type: ignore[attr-defined]
    check_usable(comms)  # type: ignore[arg-type]
    said = [r.getMessage() for r in caplog.records if r.name == "dpcomm"]
    assert len(said) == 1
    assert "uid 65534" in said[0]
    assert "only uid 0 may connect" in said[0]


def test_47_strangers_who_talk_nonsense_are_dropped_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    kept: list[socket.socket] = []
    words = (b"", b"x", b"GET / HTTP/1.1\r\n\r\n" * 10, bytes(64), random.Random(3).randbytes(4096), None)

    def connect(name: str, secret: bytes) -> None:
        for word in words:
            stranger = socket.socket(socket.AF_UNIX)
            stranger.connect(name)
            if word is None:
                stranger.close()
            else:
                stranger.sendall(word)
                kept.append(stranger)  # says no more, and does not hang up

    comms = build_with(connect)
    assert comms[0].describe()["rejected_connections"] == len(words)  # type: ignore[attr-defined]
    check_usable(comms)  # type: ignore[arg-type]
    assert len([r for r in caplog.records if "dropped a connection of pid" in r.getMessage()]) == len(words)
    for stranger in kept:
        stranger.close()


@pytest.mark.parametrize("word", [b"\xff" * 32, b"\xff" * 100, b"\xff"], ids=["bad-magic", "oversized", "short"])
def test_48_a_bad_handshake_with_the_secret_fails_on_all(word: bytes) -> None:
    def connect(name: str, secret: bytes) -> None:
        with socket.socket(socket.AF_UNIX) as peer:
            peer.connect(name)
            peer.sendall(secret + word)

    caught = build_with(connect)
    text = "it ends after 33 of 64 bytes" if len(word) == 1 else "bad magic"
    check_all(caught, "InternalError", "stage 'bind'", "handshake from", text, within_s=3.0)  # type: ignore[arg-type]


def test_48_an_endpoint_nobody_listens_at() -> None:
    """Rank 1's record leads nowhere: all learn it, as of a rank that cannot be reached."""

    def mislead(record: bytes) -> bytes:
        outcome = records.decode(records.Outcome, record, 1)
        return records.encode(outcome._replace(payload=bytes(32)))

    # Under engine auto this is a rank of another host, which gloo reaches.
    caught = build(with_spy_on_rank_1(3, at("allocate", mislead)), [{"engine": "shm"}] * 3)
    check_all(caught, "UnsupportedError", "rank 2 cannot reach rank 1", within_s=GRACE_S)
    check(catch(records.decode, records.Outcome, b"", 1), "InternalError", "0 bytes are too few")
