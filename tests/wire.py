"""Looks into the shared memory of communicators whose ranks are threads of this process, where docs/wire.md says.

Every offset comes from the tables of that page, so a test that finds the right bytes has checked the page.
"""

from __future__ import annotations

import ctypes
import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import dpcomm

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "wire.md"
CONTROL, MAILBOX, SLOTS = 0, 8192, 61440  # offsets in an arena
MOST_RANKS = 64
GIVEN, RESULT, RING, DRAINED = 0, 1, 2, 3  # streams
STREAMS = ("given", "result", "ring", "drained")

Layout = dict[str, slice]


@cache
def table(name: str) -> Layout:
    """The byte ranges of one table of the page, by name of the field.

    Raises:
        AssertionError: There is no such table, or its ranges overlap.
    """
    found = re.search(rf"<!-- table:{name} -->\n((?:\|.*\n)+)", PAGE.read_text())
    assert found, f"docs/wire.md has no table '{name}'"
    rows = re.findall(r"^\| `\[(\d+), (\d+)\)` \| (\w+) \|", found[1], re.MULTILINE)
    ranges = {field: slice(int(begin), int(end)) for begin, end, field in rows}
    ends = 0
    for field, place in ranges.items():
        assert ends <= place.start < place.stop, f"table '{name}': {field} begins before the field above it ends"
        ends = place.stop
    return ranges


def number(data: bytes, signed: bool = False) -> int:
    return int.from_bytes(data, "little", signed=signed)


def golden(codec: str) -> dict[str, Any]:
    """A golden file, its lists of hexadecimal lines joined to bytes."""

    def joined(value: Any) -> Any:
        if isinstance(value, list):
            return (
                bytes.fromhex("".join(value)) if all(isinstance(v, str) for v in value) else [joined(v) for v in value]
            )
        return value

    file = ROOT / "tests" / "golden" / f"{codec}.json"
    return {name: joined(value) for name, value in json.loads(file.read_text()).items()}


def mappings() -> set[tuple[int, int]]:
    """All shared mappings of this process, as address and size."""
    found = set()
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, flags, *_ = line.split()
        begin, end = (int(v, 16) for v in span.split("-"))
        if flags.endswith("s"):
            found.add((begin, end - begin))
    return found


@dataclass
class Memory:
    """The arenas of a local group, by rank."""

    comms: list[dpcomm.Communicator]
    addresses: list[int]

    @classmethod
    def of_new_group(cls, nranks: int, **options: Any) -> Memory:
        before = mappings()
        comms = dpcomm.init_local(["cpu"] * nranks, **options)
        size = comms[0].describe()["arena_bytes"]
        fresh = [address for address, bytes_ in mappings() - before if bytes_ == size]
        assert len(fresh) == nranks, f"{len(fresh)} new mappings of {size} bytes"
        memory = cls(comms, fresh)
        # A rank's headers lie in its own mailbox only: they tell which arena is whose (the first calls left some).
        memory.addresses.sort(key=lambda a: [r for r in range(nranks) if memory._has_headers(a, r)])
        assert all(memory._has_headers(a, r) == (r == i) for i, a in enumerate(fresh) for r in range(nranks))
        return memory

    def _has_headers(self, address: int, rank: int) -> bool:
        page = address + MAILBOX + table("mailbox")["even"].start
        return any(ctypes.string_at(page + 64 * rank, 64))

    def read(self, rank: int, begin: int, size: int) -> bytes:
        """Bytes of a rank's arena."""
        return ctypes.string_at(self.addresses[rank] + begin, size)

    def control(self, field: str) -> bytes:
        place = table("control")[field]
        return self.read(0, CONTROL + place.start, place.stop - place.start)

    def mailbox(self, rank: int, field: str) -> bytes:
        place = table("mailbox")[field]
        return self.read(rank, MAILBOX + place.start, place.stop - place.start)

    def header(self, rank: int, sequence: int) -> dict[str, int]:
        """A rank's header of a call, field by field."""
        page = self.mailbox(rank, "even" if sequence % 2 else "odd")  # the first call, 1, has none before it
        data = page[64 * rank : 64 * rank + 64]
        return {field: number(data[place], field == "bucket") for field, place in table("header").items()}

    def flag(self, reader: int, stream: int, writer: int) -> int:
        flags = self.mailbox(reader, STREAMS[stream])
        return number(flags[128 * writer : 128 * writer + 128][table("flag")["value"]])

    def sent(self, rank: int) -> list[int]:
        return [number(self.mailbox(rank, f"sent_{name}")) for name in STREAMS]

    def message(self, stream: int, writer: int, reader: int, index: int, size: int) -> bytes:
        """The first bytes of the slot that message `index` of a stream lies in."""
        facts, nranks = self.comms[0].describe(), len(self.comms)
        home, lane = {GIVEN: (reader, writer), RESULT: (writer, nranks), RING: (reader, nranks + 1)}[stream]
        place = SLOTS + (lane * facts["slots"] + index % facts["slots"]) * facts["slot_bytes"]
        return self.read(home, place, size)

    def close(self) -> None:
        for comm in self.comms:
            comm.close()
