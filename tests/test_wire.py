"""docs/wire.md against the memory of a running communicator, the golden files and the reference, byte by byte.

What is proven: the reference encodes the golden inputs to the golden bytes; the slots of the engine hold those same
bytes where the page says; flags, headers, control page, handshake and records have the layout of the page; its example
is the beginning of the golden message. Golden files are data: a change of theirs raises a version number.
"""

from __future__ import annotations

import array
import fcntl
import os
import re
import socket
import threading
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import reference
import torch
from wire import DRAINED, GIVEN, MAILBOX, PAGE, RESULT, RING, SLOTS, Memory, golden, number, table

import dpcomm
from dpcomm import _native, records

CODECS = ("none", "fp16")
GROUP_CODES = {"none": 1024, "fp16": 512}  # bytes of 256 codes
GROUPS = 2


@pytest.fixture(params=[2, 3], ids=lambda n: f"{n}ranks")
def memory(request: pytest.FixtureRequest) -> Iterator[Memory]:
    made = Memory.of_new_group(request.param, timeout_s=20.0)
    yield made
    made.close()


def inputs(codec: str, nranks: int) -> list[torch.Tensor]:
    """The golden inputs; ranks behind the second contribute -0, which changes no sum."""
    given = [np.frombuffer(raw, np.float32).copy() for raw in golden(codec)["inputs"]]
    given += [np.full_like(given[0], -0.0) for _ in range(nranks - 2)]
    return [torch.from_numpy(x) for x in given]


def of_group(message: bytes, codec: str, group: int) -> bytes:
    """What a message of that group alone holds."""
    codes, size = GROUP_CODES[codec] * GROUPS, GROUP_CODES[codec]
    exponents = message[codes:]
    return message[group * size : (group + 1) * size] + exponents[group : group + 1]


def encoded(x: np.ndarray[Any, Any], codec: str) -> bytes:
    padded = np.zeros(GROUPS * 256, np.float32)
    padded[: x.size] = x
    if codec == "none":
        return padded.tobytes()
    codes, exponents = reference.encode_fp16(padded.reshape(GROUPS, 256))
    return codes.tobytes() + exponents.tobytes()


# --- messages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", CODECS)
def test_the_reference_encodes_golden_inputs_to_golden_bytes(codec: str) -> None:
    data = golden(codec)
    assert data["layout"] == _native.LAYOUT
    xs = [np.frombuffer(raw, np.float32) for raw in data["inputs"]]
    assert [encoded(x, codec) for x in xs] == data["contributions"]
    assert [len(m) for m in data["contributions"]] == [_native.wire_bytes(260, 0, _native.CODECS[codec])] * 2
    travelled = [reference.through_fp16(x) if codec == "fp16" else x for x in xs]
    total = reference.canonical(reference.plus(*travelled))
    assert encoded(total, codec) == data["result"]
    assert reference.allreduce([[x] for x in xs], codec=codec)[0].tobytes() == data["decoded"]


def test_a_changed_input_bit_changes_the_bytes() -> None:
    data = golden("fp16")
    x = np.frombuffer(data["inputs"][0], np.float32).copy()
    x.view(np.uint32)[2] ^= 1 << 13  # the last bit that a half keeps
    assert encoded(x, "fp16") != data["contributions"][0]


@pytest.mark.parametrize("codec", CODECS)
def test_oneshot_leaves_golden_contributions_in_the_slots(memory: Memory, codec: str) -> None:
    data, xs = golden(codec), inputs(codec, len(memory.comms))
    before = [memory.sent(rank) for rank in range(len(xs))]
    dpcomm.allreduce_local(memory.comms, xs, codec=codec, algorithm="oneshot")
    for rank, message in enumerate(data["contributions"]):
        index = before[rank][RESULT]
        assert memory.message(RESULT, rank, 0, index, len(message)) == message
        assert memory.sent(rank)[:2] == [before[rank][GIVEN], index + 1]
        assert {memory.flag(r, RESULT, rank) for r in range(len(xs)) if r != rank} == {index + 1}
    assert all(x.numpy().tobytes() == data["decoded"] for x in xs)


@pytest.mark.parametrize("codec", CODECS)
def test_direct_leaves_golden_contributions_and_results_in_the_slots(memory: Memory, codec: str) -> None:
    """Two groups: chunk 0 is the first, chunk 1 the second, chunk 2 (three ranks) is empty."""
    data, xs = golden(codec), inputs(codec, len(memory.comms))
    before = [memory.sent(rank) for rank in range(len(xs))]
    dpcomm.allreduce_local(memory.comms, xs, codec=codec, algorithm="direct")
    size = GROUP_CODES[codec] + (codec == "fp16")
    for writer, reader in ((0, 1), (1, 0)):  # the reader's chunk
        expected = of_group(data["contributions"][writer], codec, reader)
        assert memory.message(GIVEN, writer, reader, before[writer][GIVEN], size) == expected
        assert memory.flag(reader, GIVEN, writer) == before[writer][GIVEN] + 1
    for owner in (0, 1):
        index = before[owner][RESULT]
        assert memory.message(RESULT, owner, 0, index, size) == of_group(data["result"], codec, owner)
        assert memory.sent(owner)[:2] == [before[owner][GIVEN] + 1, index + 1]
    assert all(x.numpy().tobytes() == data["decoded"] for x in xs)


@pytest.mark.parametrize("codec", CODECS)
def test_ring_sends_golden_contributions_to_the_next_rank(memory: Memory, codec: str) -> None:
    """Chunk c is group c and starts at rank c; what comes after it on the ring is a sum."""
    data, xs = golden(codec), inputs(codec, len(memory.comms))
    nranks, before = len(xs), [memory.sent(rank) for rank in range(len(xs))]
    dpcomm.allreduce_local(memory.comms, xs, codec=codec, algorithm="ring")
    size, messages = GROUP_CODES[codec] + (codec == "fp16"), 2 * nranks - 2
    for owner in (0, 1):
        following, index = (owner + 1) % nranks, before[owner][RING]
        expected = of_group(data["contributions"][owner], codec, owner)
        assert memory.message(RING, owner, following, index, size) == expected
        assert memory.flag(following, RING, owner) == index + messages
        assert memory.flag(owner, DRAINED, following) == index + messages
        assert memory.sent(owner) == [*before[owner][:2], index + messages, index + messages]


def test_the_example_on_the_page_is_the_beginning_of_the_golden_message() -> None:
    found = re.search(
        r"<!-- example:begin -->\n(.*?)<!-- example:end -->\n+The exponent byte is `(..)`", PAGE.read_text(), re.S
    )
    assert found
    rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in found[1].splitlines()[2:]]
    data = golden("fp16")
    values = np.array([row[0] for row in rows], np.float32)
    assert values.tobytes() == data["inputs"][0][: values.nbytes]
    message = data["contributions"][0]
    assert " ".join(row[2] for row in rows) == message[: 2 * len(rows)].hex(" ")
    assert [int(row[1], 16) for row in rows] == np.frombuffer(message, "<u2", len(rows)).tolist()
    assert bytes.fromhex(found[2]) == message[1024:1025]


# --- header and control page -----------------------------------------------------------------------------------------


def test_headers_say_what_was_called(memory: Memory) -> None:
    nranks = len(memory.comms)
    sequence = number(memory.mailbox(0, "sequence")) + 1
    xs = [[torch.ones(5), torch.ones(0), torch.ones(300)] for _ in range(nranks)]
    dpcomm.allreduce_local(memory.comms, xs, "mean", codec="fp16", algorithm="direct")
    digest = 0xCBF29CE484222325
    for count in (5, 0, 300):
        digest = (digest ^ count) * 0x100000001B3 % 2**64
    said = {"sequence": sequence, "numel": 305, "layout": digest, "tensors": 3, "bucket": -1}
    said |= {"op": 1, "dtype": 0, "codec": 1, "algorithm": 1, "padding": 0}
    assert [memory.header(rank, sequence) for rank in range(nranks)] == [said] * nranks
    dpcomm.allreduce_local(
        memory.comms, [torch.ones(3, dtype=torch.complex128) for _ in range(nranks)], algorithm="oneshot"
    )
    later = memory.header(nranks - 1, sequence + 1)
    assert [later[f] for f in ("numel", "op", "dtype", "codec", "algorithm")] == [6, 0, 1, 0, 2]


@pytest.mark.parametrize("table_of", ["DTYPES", "OPS", "CODECS", "ALGORITHMS"])
def test_codes_of_names_are_those_of_the_page(table_of: str) -> None:
    field = {"DTYPES": "dtype", "OPS": "op", "CODECS": "codec", "ALGORITHMS": "algorithm"}[table_of]
    row = re.search(rf"^\| `\[3\d, 3\d\)` \| {field} \| (.*) \|$", PAGE.read_text(), re.M)
    assert row
    listed = {name: int(code) for code, name in re.findall(r"(\d) (\w+)", row[1])}
    native = getattr(_native, table_of)
    assert listed == {name: code for name, code in native.items() if name != "auto"}


def test_a_disagreement_is_in_the_failure_word(memory: Memory) -> None:
    sequence = number(memory.mailbox(0, "sequence")) + 1
    sizes = [4] * (len(memory.comms) - 1) + [8]
    works = [comm.allreduce(torch.ones(n), async_op=True) for comm, n in zip(memory.comms, sizes, strict=True)]
    for work in works:
        with pytest.raises(dpcomm.MismatchError):
            work.wait(20.0)
    cause, low, high, field = memory.control("failure")[:4]
    assert (cause, high, field) == (1, len(sizes) - 1, 7)
    assert low < high
    assert number(memory.control("failure")[4:]) == sequence


def test_abort_and_goodbye_are_in_the_control_page(memory: Memory) -> None:
    assert not any(memory.control("failure") + memory.control("closed"))
    last, sequence = len(memory.comms) - 1, number(memory.mailbox(1, "sequence"))
    memory.comms[last]._abort("no more of this")
    assert list(memory.control("failure")[:2]) == [5, last]
    assert memory.control("reason")[96 * last : 96 * (last + 1)].rstrip(b"\0") == b"no more of this"
    memory.comms[1].close()
    assert number(memory.control("closed")[8:16]) == sequence + 1


def test_a_timeout_names_whom_it_waited_for() -> None:
    memory = Memory.of_new_group(3, timeout_s=2.0)
    works = [memory.comms[r].allreduce(torch.ones(4), async_op=True) for r in (0, 2)]
    for work in works:
        with pytest.raises(dpcomm.Error):
            work.wait(20.0)
    cause, rank = memory.control("failure")[:2]
    assert (cause, number(memory.control("waiting_for")[8 * rank : 8 * rank + 8])) == (4, 0b010)
    memory.close()


# --- arena and handshake ---------------------------------------------------------------------------------------------


def arena_bytes(nranks: int, slots: int, slot_bytes: int) -> int:
    return -(-(SLOTS + (nranks + 2) * slots * slot_bytes) // 4096) * 4096


def test_arenas_have_the_size_of_the_page(memory: Memory) -> None:
    facts = memory.comms[0].describe()
    assert (facts["slots"], facts["slot_bytes"]) == (8, 132096)
    assert facts["arena_bytes"] == arena_bytes(facts["nranks"], 8, 132096)
    assert MAILBOX + table("mailbox")["sent_result"].stop <= SLOTS


def handshake(secret: bytes, rank: int, nranks: int, size: int) -> bytes:
    values: dict[str, Any] = {
        "secret": secret,
        "magic": b"dpcm",
        "version": 1,
        "rank": rank,
        "nranks": nranks,
        "memory_bytes": size,
    }
    said = bytearray(64)
    for field, place in table("handshake").items():
        value = values.get(field, 0)
        said[place] = value if isinstance(value, bytes) else int(value).to_bytes(place.stop - place.start, "little")
    return bytes(said)


def sealed_memfd(size: int) -> int:
    fd = os.memfd_create("peer", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return fd


@pytest.mark.parametrize("spoiled", ["", "secret", "magic", "version", "rank", "nranks", "memory_bytes"])
def test_a_rank_written_from_the_page_is_accepted(spoiled: str) -> None:
    """This test plays rank 1 of 2; with one field changed it is refused."""
    builder = _native.ShmBuilder(0, 2, _native.ShmWish(64 << 20), "")
    size, secret = arena_bytes(2, 8, 132096), bytes(range(32))
    assert builder.probe([builder.endpoint(), bytes(32)]) == [True, True]
    said = bytearray(handshake(secret, 1, 2, size))
    if spoiled:
        said[table("handshake")[spoiled].start] ^= 2
    memfd = sealed_memfd(size)
    outcome: list[Exception | None] = []

    def bind() -> None:
        try:
            builder.bind(secret, 10.0 if spoiled != "secret" else 0.5)
            outcome.append(None)
        except dpcomm.Error as error:
            outcome.append(error)

    binding = threading.Thread(target=bind)
    with socket.socket(socket.AF_UNIX) as peer:
        peer.settimeout(10.0)
        peer.connect("\0dpcomm-" + builder.endpoint().hex())
        binding.start()
        peer.sendmsg([said], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [memfd]))])
        answer, descriptors, *_ = socket.recv_fds(peer, 65, 4)
        binding.join(15.0)
    os.close(memfd)
    for fd in descriptors:
        os.close(fd)
    expected = {"": type(None), "secret": dpcomm.CommTimeoutError}.get(spoiled, dpcomm.InternalError)
    assert [type(error) for error in outcome] == [expected]
    if not spoiled:
        assert answer == handshake(secret, 0, 2, size)
        assert len(descriptors) == 1


# --- records ---------------------------------------------------------------------------------------------------------

HELLO = records.Hello(
    3, 5, 4711, 1000, 111, 222, 333, "boot", "host", "group", "fp16", "shm", "direct", 25.0, 64 << 20, 4, 2, 77,
    "cuda", "pinned", 16, 7, "fp16",
)  # fmt: skip
OUTCOME = records.Outcome(2, 3, "RESOURCE", 28, -1, "no space", b"\x05\x00payload")


def field(data: bytes, place: slice, like: object) -> object:
    raw = data[place]
    if isinstance(like, str):
        return raw.rstrip(b"\0").decode()
    if isinstance(like, float):
        return float(np.frombuffer(raw, "<f8")[0])
    return number(raw, signed=True) if isinstance(like, int) else raw


@pytest.mark.parametrize(("name", "record", "size"), [("hello", HELLO, 440), ("outcome", OUTCOME, 1200)])
def test_records_have_the_layout_of_the_page(name: str, record: records.Hello | records.Outcome, size: int) -> None:
    data = records.encode(record)
    assert len(data) == size
    prefix = {f: data[place] for f, place in table("prefix").items()}
    assert prefix["magic"] == b"dpcomm\r\n"
    assert [number(prefix[f]) for f in ("protocol", "layout", "rank")] == [
        records.PROTOCOL,
        _native.LAYOUT,
        record.rank,
    ]
    assert prefix["version"].rstrip(b"\0").decode() == _native.version
    layout = dict(table(name))
    assert number(data[layout.pop("crc32")]) == zlib.crc32(data[:-4])
    if isinstance(record, records.Outcome):
        length = number(data[layout.pop("size")])
        assert data[layout.pop("payload")][:length] == record.payload
    for f, place in layout.items():
        assert field(data, place, getattr(record, f)) == getattr(record, f), f
    kind: Any = type(record)
    assert records.decode(kind, data, record.rank) == record
