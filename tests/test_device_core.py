"""The core as nvcc reads it for the host, against the reference, to the bit: no GPU is needed, none is imitated.

tests/cpp/device_core.cu plays the ranks. nvcc compiles it with the flags of the build, AddressSanitizer and alignment
checks. Negative controls are faults planted into copies of csrc, in lines that the CPU's own build of the core lacks
or hardly uses: the same cases must fail.
"""

from __future__ import annotations

import hashlib
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from functools import cache
from pathlib import Path
from typing import NamedTuple

import cpp_build
import numpy as np
import pytest
import reference
from cases import Array, Case, check_bits, operations
from planted import Fault
from test_build import find_nvcc
from under_way import under_way

from dpcomm import _native

sys.path.append(str(cpp_build.ROOT / "benchmarks"))
import gpu_code

pytestmark = [
    pytest.mark.timeout(300),  # the first test waits for the compiler
    pytest.mark.skipif(find_nvcc() is None, reason="no nvcc: the core cannot be read as for a GPU here"),
]

SOURCE = cpp_build.ROOT / "tests" / "cpp" / "device_core.cu"
CSRC = cpp_build.ROOT / "csrc"
FOLDER = cpp_build.FOLDER / "device_core"
# PTX for one architecture is enough: there are no kernels in it.
FLAGS = (
    "-O0",  # compiled in a sixth of the time, and the cases take no longer
    "--generate-code=arch=compute_90,code=compute_90",
    "-Xcompiler=-fsanitize=address,-fsanitize=alignment,-fno-sanitize-recover=all",
    "-Xcompiler=-Wno-maybe-uninitialized",  # as in tests/cpp/CMakeLists.txt
)
CONFIGURING = threading.Lock()
Kernel = tuple[str, str, str]  # dtype, codec, algorithm
KERNELS: tuple[Kernel, ...] = (
    ("float32", "none", "direct"),
    ("float32", "none", "oneshot"),
    ("float32", "none", "ring"),
    ("bfloat16", "none", "direct"),
    ("bfloat16", "none", "oneshot"),
    ("float32", "fp16", "direct"),
    ("float32", "fp16", "oneshot"),
    ("float32", "fp16", "ring"),
)
IDS = tuple("-".join(kernel) for kernel in KERNELS)
# Between the passes of these, one thread plays the library that adds up.
NATIVE: tuple[Kernel, ...] = tuple((d, c, "native") for d in ("float32", "bfloat16") for c in ("fp16", "bf16"))
ALL = (*KERNELS, *NATIVE)
ALL_IDS = tuple("-".join(kernel) for kernel in ALL)
GUARD = 0xA5  # what lies around every segment
GUARD_BYTES = 64
MISMATCH, BUCKET = 1, 2  # Cause and Field of csrc/core/header.h

# The last string is what the cases must say of the fault.
FAULTS = {
    "wide-access-at-any-address": Fault(
        "core/segments.h",
        "!is_short && (kVecAlign == 1 || reinterpret_cast<uintptr_t>(segment.data) % kVecAlign == 0)",
        "!is_short",
        "misaligned address",
    ),
    "partial-vector-one-too-long": Fault(
        "core/portable.h", "if (k < n) to[k] =", "if (k < n + 1) to[k] =", "AddressSanitizer: heap-buffer-overflow"
    ),
    "maximum-without-the-last-of-a-vector": Fault(
        "core/portable.h", "for (int k = 1; k < kVec; ++k) m =", "for (int k = 1; k < kVec - 1; ++k) m =", "lone maxima"
    ),
}


# --- building --------------------------------------------------------------------------------------------------------


@cache
def compile_command() -> tuple[str, ...]:
    """How the build compiles a CUDA source, without the source, its architectures and its optimisation.

    The check for calls across execution spaces goes, too: lanes that are threads exist on the host only.
    """
    folder = FOLDER / "configure"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    words = gpu_code.build_commands(folder)["p2p_float"]
    assert words[-4:-1] == ["-x", "cu", "-c"]
    dropped = ("--generate-code", "-O3", "-Werror=cross-execution-space-call")
    return tuple(word for word in words[:-4] if not word.startswith(dropped))


def fingerprint(csrc: Path, flags: tuple[str, ...]) -> str:
    version = cpp_build.call([str(find_nvcc()), "--version"], 60).stdout
    digest = hashlib.sha256(f"{version}{flags}".encode())
    for path in [SOURCE, csrc / "CMakeLists.txt", *sorted((csrc / "core").iterdir())]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def build(csrc: Path, name: str) -> Path:
    """The program made of these sources; the one of an earlier run, if it was made of the same ones."""
    program, key = FOLDER / name, FOLDER / f"{name}.key"
    wanted = fingerprint(csrc, FLAGS)
    if not (program.exists() and key.exists() and key.read_text() == wanted):
        with CONFIGURING:  # a cache does not keep two threads from filling it at once
            command = compile_command()
        words = [word.replace(str(CSRC), str(csrc)) for word in command]
        cpp_build.must([*words, *FLAGS, str(SOURCE), "-o", str(program)], 240)
        key.write_text(wanted)
    return program


def build_one(name: str) -> Path:
    """The program, under "", or the one with this fault."""
    if not name:
        return build(CSRC, "device_core")
    copy = FOLDER / f"{name}-csrc"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(CSRC, copy)
    FAULTS[name].plant(copy)
    program = build(copy, name)
    shutil.rmtree(copy)
    return program


@pytest.fixture(scope="module")
def programs() -> Iterator[dict[str, Future[Path]]]:
    """By name: see build_one()."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with under_way(build_one, ["", *FAULTS]) as made:
        yield made


@pytest.fixture
def program(programs: dict[str, Future[Path]]) -> Path:
    return programs[""].result()


# --- calling ---------------------------------------------------------------------------------------------------------


class Settings(NamedTuple):
    """What an engine would be told, and warps a rank has."""

    warps: int = 1
    slots: int = 4
    slot_bytes: int = 1152  # two groups of fp16, one of float32: small buckets take several slices
    first_message: int = 0
    calls: int = 1
    disagreeing_rank: int = -1


PLAIN = Settings()


class Answer(NamedTuple):
    """The first cause (0: none), the count of groups with a NaN or Inf, and every rank's segments."""

    failure: int
    nonfinite_groups: int
    segments: list[list[Array]]


class Broken(Exception):
    """The program ended with a signal, a sanitizer's report or bytes written beside a segment."""


def lay_out(xs: list[Array], shifts: tuple[int, ...]) -> tuple[list[int], int]:
    """Where each array begins, `shifts` bytes behind a multiple of 64 and between guards, and the bytes of it all."""
    offsets, end = [], 0
    for s, x in enumerate(xs):
        offsets.append(-(-end // 64) * 64 + GUARD_BYTES + shifts[s % len(shifts)])
        end = offsets[-1] + x.nbytes
    return offsets, -(-end // 64) * 64 + GUARD_BYTES


def call(
    program: Path,
    case: Case,
    inputs: list[list[Array]],
    settings: Settings = PLAIN,
    shifts: tuple[int, ...] = (0,),
) -> Answer:
    """The case on the program's ranks.

    Raises:
        Broken: see there.
    """
    offsets, image_bytes = lay_out(inputs[0], shifts)
    words = [
        *(len(inputs), settings.warps, len(case.counts)),
        *(_native.DTYPES[case.dtype], _native.OPS[case.op]),
        *(_native.CODECS[case.codec], _native.ALGORITHMS[case.algorithm]),
        *(settings.slots, settings.slot_bytes, settings.first_message, settings.calls, settings.disagreeing_rank),
        image_bytes,
        *(word for place in zip(offsets, case.counts, strict=True) for word in place),
    ]
    images = np.full((len(inputs), image_bytes), GUARD, np.uint8)
    mine = np.zeros(image_bytes, bool)
    for s, offset in enumerate(offsets):
        for r, xs in enumerate(inputs):
            images[r, offset : offset + xs[s].nbytes] = xs[s].view(np.uint8)
            mine[offset : offset + xs[s].nbytes] = True
    request = struct.pack(f"<{len(words)}q", *words) + images.tobytes()
    done = subprocess.run([str(program)], input=request, capture_output=True, timeout=60, check=False)
    if done.returncode != 0:
        raise Broken(f"{case}: status {done.returncode}\n{done.stderr.decode(errors='replace')[:4000]}")
    failure, nonfinite_groups = struct.unpack_from("<Qq", done.stdout)
    after = np.frombuffer(done.stdout, np.uint8, offset=16).reshape(images.shape)
    if (after[:, ~mine] != GUARD).any():
        raise Broken(f"{case}: bytes outside the segments were written")
    segments = [
        [image[at : at + x.nbytes].copy().view(x.dtype) for at, x in zip(offsets, inputs[0], strict=True)]
        for image in after
    ]
    return Answer(failure, nonfinite_groups, segments)


def check(program: Path, case: Case, nranks: int, settings: Settings = PLAIN, shifts: tuple[int, ...] = (0,)) -> None:
    answer = call(program, case, [case.inputs(r) for r in range(nranks)], settings, shifts)
    assert answer.failure == 0, f"{case}: failure word {answer.failure:#x}"
    want = case.expected(nranks)
    for _ in range(settings.calls - 1):
        want = reference.allreduce([want] * nranks, case.op, codec=case.codec, bit_class=case.bit_class)
    check_bits(answer.segments, want, f"{nranks} ranks, {case}, {settings}")


# --- bits ------------------------------------------------------------------------------------------------------------


def check_segments(program: Path, kernel: Kernel, nranks: int) -> None:
    """Several segments, empty ones among them, at all alignments, with special values and counters that wrap."""
    dtype, codec, algorithm = kernel
    elem = 2 if dtype == "bfloat16" else 4
    shifts = tuple(elem * i for i in (0, 1, 2, 3, 4, 0, 8))
    few = nranks < 4  # all lanes are threads: of many ranks, each meeting is dear
    settings = Settings(2 if few else 1, slot_bytes=1152 if few else 2176, first_message=2**32 - 3)
    for op in operations(dtype, codec)[:: 1 if few else 2]:
        case = Case((1, 0, 255, 256, 0, 1000, 513, 7), dtype, op, codec, algorithm, special=True)
        check(program, case, nranks, settings, shifts)


def check_lone_maxima(program: Path, algorithm: str) -> None:
    """Each group has one large element: in every lane once, at all places of a vector. An exponent that leaves it out
    makes it overflow."""
    count = 32 * 256
    inputs = [[np.full(count, r + 1, np.float32)] for r in range(2)]
    for g in range(32):
        inputs[g % 2][0][256 * g + 33 * g % 256] = 1e6
    answer = call(program, Case((count,), codec="fp16", algorithm=algorithm), inputs, Settings(slot_bytes=8320))
    check_bits(answer.segments, reference.allreduce(inputs, "sum", codec="fp16"), f"lone maxima, {algorithm}")


@pytest.mark.parametrize("kernel", ALL, ids=ALL_IDS)
def test_bits_of_any_size(program: Path, kernel: Kernel) -> None:
    """Empty, tails, whole groups; the operations in turn, half of them on special values."""
    dtype, codec, algorithm = kernel
    ops = operations(dtype, codec)
    for i, count in enumerate((0, 1, 255, 256, 257, 2051)):
        check(program, Case((count,), dtype, ops[i % len(ops)], codec, algorithm, special=i % 3 != 0), 3)


@pytest.mark.parametrize("nranks", [2, 3, 4, 8])
@pytest.mark.parametrize("kernel", ALL, ids=ALL_IDS)
def test_segments_of_any_size_and_alignment(program: Path, kernel: Kernel, nranks: int) -> None:
    check_segments(program, kernel, nranks)


@pytest.mark.parametrize("nranks", [2, 4])
@pytest.mark.parametrize("kernel", ALL, ids=ALL_IDS)
def test_calls_in_a_row(program: Path, kernel: Kernel, nranks: int) -> None:
    """Ranks do not meet between calls. The mean of equal replicas goes through the codec again."""
    dtype, codec, algorithm = kernel
    case = Case((1500, 3), dtype, "mean", codec, algorithm)
    check(program, case, nranks, Settings(calls=5, first_message=2**32 - 9))


@pytest.mark.parametrize("algorithm", ["direct", "oneshot"])
def test_exponent_fits_the_maximum_wherever_it_is(program: Path, algorithm: str) -> None:
    check_lone_maxima(program, algorithm)


@pytest.mark.parametrize("kernel", KERNELS, ids=IDS)
@pytest.mark.parametrize("settings", [Settings(slots=8, slot_bytes=4096), Settings(3, slot_bytes=65536)], ids=str)
def test_bits_do_not_depend_on_slots(program: Path, kernel: Kernel, settings: Settings) -> None:
    dtype, codec, algorithm = kernel
    check(program, Case((5011, 300), dtype, "mean", codec, algorithm, special=True), 3, settings)


def test_nonfinite_groups_are_counted_once(program: Path) -> None:
    """One NaN on one of two ranks, in the chunk of the other: one contribution and one result hold it."""
    inputs = [[np.ones(2 * 256, np.float32)] for _ in range(2)]
    inputs[0][0][300] = np.nan
    answer = call(program, Case((512,), codec="fp16", algorithm="direct"), inputs)
    assert answer.nonfinite_groups == 2
    assert [int(np.isnan(xs[0]).sum()) for xs in answer.segments] == [1, 1]


@pytest.mark.parametrize(("codec", "halfway"), [("fp16", 0x477FF000), ("bf16", 0x7F7F8000)])
def test_what_16_bits_cannot_hold_is_counted(program: Path, codec: str, halfway: int) -> None:
    """Each rank's own codes: a NaN, the least number that rounds to infinity (not the one below it); then sums."""
    least = np.uint32(halfway).view(np.float32)  # bits, half of the last place beyond the largest code
    inputs = [[np.ones(4 * 256, np.float32)] for _ in range(2)]
    inputs[0][0][[255, 256]] = np.nan, least
    inputs[1][0][513] = np.nextafter(least, np.float32(0))
    inputs[0][0][600] = inputs[1][0][600] = np.float32(0.75) * least
    case = Case((1024,), codec=codec, algorithm="native")
    answer = call(program, case, inputs)
    assert answer.nonfinite_groups == 2
    check_bits(answer.segments, reference.allreduce(inputs, codec=codec, bit_class="native"), str(case))
    assert [int(np.isinf(xs[0]).sum()) for xs in answer.segments] == [2, 2]


@pytest.mark.parametrize("nranks", [2, 4])
@pytest.mark.parametrize("kernel", KERNELS, ids=IDS)
def test_ranks_that_disagree_leave_memory_alone(program: Path, kernel: Kernel, nranks: int) -> None:
    dtype, codec, algorithm = kernel
    case = Case((1500, 7), dtype, "sum", codec, algorithm)
    inputs = [case.inputs(r) for r in range(nranks)]
    answer = call(program, case, inputs, Settings(disagreeing_rank=1, calls=2))
    assert (answer.failure & 0xFF, answer.failure >> 24 & 0xFF) == (MISMATCH, BUCKET)
    assert 1 in (answer.failure >> 8 & 0xFF, answer.failure >> 16 & 0xFF)
    for got, before in zip(answer.segments, inputs, strict=True):
        check_bits([got], before, f"{case}: memory after a mismatch")


# --- negative controls -----------------------------------------------------------------------------------------------


def check_some(program: Path) -> None:
    """The least of the above that notices the faults; the program without one passes it."""
    check_segments(program, ("float32", "fp16", "oneshot"), 2)
    check_lone_maxima(program, "oneshot")


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_noticed(programs: dict[str, Future[Path]], name: str) -> None:
    faulty = programs[name].result()
    with pytest.raises((AssertionError, Broken), match=FAULTS[name].names[0]):
        check_some(faulty)
