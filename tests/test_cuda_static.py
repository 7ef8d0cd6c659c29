"""What can be known of the CUDA kernels without a GPU: they are compiled as the build compiles them, then read.

One compilation of the p2p kernels serves all assertions (benchmarks/gpu_code.py). Their negative controls are faults
planted into copies of the sources (or of the command), which the same reading must report.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple

import pytest
from planted import Fault
from under_way import under_way

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
import gpu_code
from gpu_code import ARCHITECTURES, CSRC, KERNELS, Compiled, CompilerError, Kernel, Usage, count, opcodes, whole

pytestmark = [
    pytest.mark.timeout(2 * gpu_code.DEADLINE_S),  # the first test waits for the compiler
    pytest.mark.skipif(gpu_code.find_nvcc() is None, reason="no nvcc: CUDA sources cannot be compiled here"),
]

REGISTER_FILE = 65536  # of an SM, on all architectures
# A lane's registers at most. 128 x 512 lanes are the whole register file, so that one CTA always fits on an SM. Eight-
# byte types have 256 lanes; theirs leave a quarter of it free.
MAX_REGISTERS = {512: 128, 256: 192}


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    return gpu_code.compile_all()


# --- what is looked for ----------------------------------------------------------------------------------------------

ORDERED = (
    r"(ld|st|red|atom|fence|membar)\..*"
    r"\b(relaxed|volatile|acquire|release|acq_rel|sc|weak|mmio|cta|cluster|gpu|gl|sys)\b.*"
)
FLAG_READ, FLAG_WRITE = "ld.acquire.sys.global.u32", "st.release.sys.global.u32"
WORD_READ, WORD_WRITE = "ld.acquire.sys.global.u64", "st.release.sys.global.u64"  # failure words
COUNT_UP = "atom.acq_rel.gpu.global.add.u32"
SET_ONCE = ("membar.sys", "atom.sys.cas.b64")
ONLY_ORDERED = {FLAG_READ, FLAG_WRITE, WORD_READ, WORD_WRITE, COUNT_UP, *SET_ONCE}
CANONICAL_NAN = {4: "0f7FC00000", 8: "0d7FF8000000000000"}  # by bytes of the accumulator
HARDWARE_NAN = ("0f7FFFFFFF", "0dFFF8000000000000")


class Sites(NamedTuple):
    """Places in the source, unrolled where it is unrolled, that move one vector; each 8 elements."""

    user_loads: int  # at least; an operation of its own (sum, min, max) may load for itself
    slot_loads: int
    user_stores: int  # those of fill_with_nan not counted
    slot_stores: int
    partial_loads: int  # of user memory at most, by element: the end of a segment
    partial_stores: int


# direct: put, reduce (own values come from a slot in codec fp16), get; a result goes to one reader or to all.
# oneshot: put, reduce. ring: put, add, last add, forward.
# Partial loads: an add has one for each of three operations, and a scale needs its values up to three times. Partial
# stores: the compiler may have a loop of its own for the last turn of a ring, which forwards nothing.
SITES = {
    ("none", "direct"): Sites(2, 2, 2, 3, 5, 2),
    ("none", "oneshot"): Sites(2, 1, 1, 1, 5, 1),
    ("none", "ring"): Sites(3, 3, 2, 4, 7, 3),
    ("fp16", "direct"): Sites(1, 2, 3, 3, 3, 3),
    ("fp16", "oneshot"): Sites(1, 1, 1, 1, 3, 1),
    ("fp16", "ring"): Sites(3, 3, 2, 4, 5, 3),
}


def narrow(ops: Counter[str], direction: str, kind: str) -> int:
    """Accesses of less than 16 bytes to elements of a kind of which PTX has nothing else: f32, f64, 16 bits."""
    scalar = "[bsu]16" if kind == "16" else kind
    vectors = {"16": r"(\.v[24])?", "f32": r"(\.v2)?", "f64": ""}[kind]
    return count(ops, rf"{direction}(\.global)?{vectors}\.{scalar}")


def resource_faults(kernel: Kernel, usage: Usage) -> Iterator[str]:
    if usage.stack_bytes or usage.spill_bytes:
        yield "stack"
    if usage.registers > MAX_REGISTERS[kernel.threads]:
        yield "registers"


def whole_faults(kernel: Kernel, ops: Counter[str], headers: Counter[str]) -> Iterator[str]:
    """Elements move as 16-byte accesses. `headers` is a kernel whose 16-byte accesses to integers are headers."""
    sites = SITES[kernel.codec, kernel.algorithm]
    user, slot = kernel.element_bytes * 8 // 16, kernel.code_bytes * 8 // 16
    fill = 0 if kernel.dtype.startswith("int") else user
    need = {
        "ld": sites.user_loads * user + sites.slot_loads * slot,
        "st": sites.user_stores * user + sites.slot_stores * slot + fill,
    }
    for direction, least in need.items():
        if whole(ops, direction) - whole(headers, direction, "bsu") < least:
            yield f"narrow {direction}"


def narrow_faults(kernel: Kernel, ops: Counter[str]) -> Iterator[str]:
    """Single elements move at the ends of segments only, in user memory only."""
    sites = SITES[kernel.codec, kernel.algorithm]
    mine = {"float32": "f32", "float64": "f64", "float16": "16", "bfloat16": "16"}.get(kernel.dtype, "")
    for direction, partial in (("ld", sites.partial_loads), ("st", sites.partial_stores)):
        fill = 8 if direction == "st" and mine == "16" else 0  # wider constants are integers
        for kind in ("f32", "f64", "16"):
            if narrow(ops, direction, kind) > (8 * partial + fill if kind == mine else 0):
                yield f"narrow {direction}"


def ptx_faults(kernel: Kernel, ptx: str) -> Iterator[str]:
    """Every broken rule in one kernel's PTX, by a short name."""
    ops = opcodes(ptx)
    if re.search(rf"\.maxntid {kernel.threads}(, 1, 1)?$", ptx, re.MULTILINE) is None:
        yield "lanes"
    if not (ops[FLAG_READ] and ops[FLAG_WRITE] and ops[WORD_READ] and ops[WORD_WRITE]):
        yield "flags"
    if {op for op in ops if re.fullmatch(ORDERED, op)} - ONLY_ORDERED:
        yield "order or scope"
    if ops[COUNT_UP] != 1 or not ops[SET_ONCE[0]] or ops[SET_ONCE[0]] != ops[SET_ONCE[1]]:
        yield "atomics"
    if count(ops, r"(atom|red)\..*") - ops[COUNT_UP] - ops[SET_ONCE[1]] > (3 if kernel.codec == "fp16" else 0):
        yield "atomics"  # codec fp16 counts groups that are not finite, in each place that encodes
    if count(ops, r"ld(\.\w+)*\.nc(\.\w+)*|ldu\..*|tex\..*"):
        yield "read-only cache"
    if count(ops, r"(fma|mad)\.r[nzmp]\..*|.*\.(ftz|approx|full)\b.*"):
        yield "arithmetic"
    if count(ops, r"trap|brkpt|call(\..*)?|(ld|st)\.local.*") or ".local" in ptx:
        yield "trap, call or local memory"
    if kernel.codec == "fp16" and not ops["redux.sync.max.s32"]:
        yield "shuffles"
    nan = "" if kernel.dtype.startswith("int") else CANONICAL_NAN[8 if kernel.dtype == "float64" else 4]
    if nan not in ptx or any(other in ptx for other in HARDWARE_NAN):
        yield "NaN"


def faults(compiled: Compiled, architecture: str, kernel: Kernel) -> set[str]:
    ptx = compiled.ptx[architecture, kernel]
    headers = compiled.ptx[architecture, Kernel("none", "float32", kernel.algorithm)]
    return {
        *resource_faults(kernel, compiled.usage[architecture, kernel]),
        *whole_faults(kernel, opcodes(ptx), opcodes(headers)),
        *narrow_faults(kernel, opcodes(ptx)),
        *ptx_faults(kernel, ptx),
    }


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernel_keeps_the_rules(compiled: Compiled, architecture: str, kernel: Kernel) -> None:
    assert faults(compiled, architecture, kernel) == set(), compiled.usage[architecture, kernel]


def test_every_kernel_is_read(compiled: Compiled) -> None:
    """A kernel that is added, or an architecture that is dropped, does not go unnoticed."""
    expected = {(a, k) for a in ARCHITECTURES for k in KERNELS}
    assert compiled.usage.keys() == expected
    assert compiled.ptx.keys() == expected
    assert {path.stem for path in (CSRC / "cuda").glob("p2p_*.cu")} == set(gpu_code.UNITS)
    assert all(lanes * registers <= REGISTER_FILE for lanes, registers in MAX_REGISTERS.items())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("algorithm", gpu_code.ALGORITHMS)
def test_whole_numbers_move_like_floats(compiled: Compiled, architecture: str, algorithm: str) -> None:
    """Their single accesses look like bookkeeping, of which both have the same: so they are compared."""
    for bits in ("32", "64"):
        ints, floats = (
            opcodes(compiled.ptx[architecture, Kernel("none", f"{kind}{bits}", algorithm)]) for kind in ("int", "float")
        )
        for direction in ("ld", "st"):
            single = rf"{direction}(\.global)?\.[bfsu]{bits}"
            assert 0 < count(ints, single) <= count(floats, single), (direction, bits)


# --- negative controls -----------------------------------------------------------------------------------------------

PLANTED = Kernel("none", "float32", "oneshot")  # the quickest to compile
UNIT = """#include "p2p_kernels.cuh"
namespace dpcomm {
template __global__ void p2p<None<Float32>, Algorithm::oneshot>(const __grid_constant__ P2pCall);
}
"""
FAULTS = {
    "spills": Fault(
        "cuda/p2p_kernels.cuh", "__launch_bounds__(kThreadsOf<Codec>, 1)", "__launch_bounds__(512, 4)", "stack"
    ),
    "lanes": Fault("gpu/launch.h", "kCtaThreads = 512;", "kCtaThreads = 1024;", "lanes"),
    "narrow": Fault("core/portable.h", "struct alignas(16) Vec", "struct Vec", "narrow ld", "narrow st"),
    "narrow-slots": Fault(
        "cuda/lanes.cuh", "store(to, v);", "for (int k = 0; k < kVec; ++k) to[k] = element(v, k);", "narrow st"
    ),
    "narrow-messages": Fault(
        "core/tile.h",
        "decode(scale, load(codes + i * kVec))",
        "decode(scale, load_some(codes + i * kVec, 8))",
        "narrow ld",
    ),
    "relaxed-flag": Fault("core/portable.h", FLAG_WRITE, "st.relaxed.sys.global.u32", "flags", "order or scope"),
    "gpu-scope": Fault("core/portable.h", FLAG_READ, "ld.acquire.gpu.global.u32", "flags", "order or scope"),
    "relaxed-count": Fault("core/portable.h", COUNT_UP, "atom.relaxed.gpu.global.add.u32", "atomics", "order or scope"),
    "no-fence": Fault("core/portable.h", "__threadfence_system();", "", "atomics"),
    "ldg": Fault(
        "cuda/device_wait.h",
        "load_acquire(first_cause)",
        "__ldg(reinterpret_cast<const unsigned long long*>(first_cause))",
        "read-only cache",
    ),
    "fma": Fault("core/element.h", "return x + y;", "return x * y + x;", "arithmetic", without="--fmad=false"),
    "trap": Fault(
        "core/portable.h", "__threadfence_system();", "__threadfence_system(), __trap();", "trap, call or local memory"
    ),
    "nan": Fault("core/element.h", "int32_t, 0x7fc00000>", "int32_t, 0x7fffffff>", "NaN"),
}
WARNING = Fault("cuda/lanes.cuh", "  __device__ int index() const {", "  __device__ int index() const { int unused;")


def compile_planted(command: list[str], folder: Path, fault: Fault | None) -> Compiled:
    """One kernel of a copy of the sources with a fault, for sm_90 only."""
    copy = folder / "csrc"
    shutil.copytree(CSRC, copy)
    if fault is not None:
        fault.plant(copy)
    source = copy / "cuda" / "planted.cu"
    source.write_text(UNIT)
    without = fault.without if fault is not None else ""
    words = [w.replace(str(CSRC), str(copy)) for w in command[:-1] if not w.startswith("--generate-code")]
    words = ["-cubin" if w == "-c" else w for w in words if w != without]
    output = ["-o", str(folder / "planted.cubin"), "--keep", "--keep-dir", str(folder), "-Xptxas=-v"]
    log = gpu_code.run([*words, str(source), "-arch=sm_90", *output], folder)
    ptx = gpu_code.parse_ptx((folder / "planted.ptx").read_text())
    return Compiled(gpu_code.parse_usage(log), {("90", kernel): text for kernel, text in ptx.items()}, {}, {})


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Compiled]]]:
    """The kernel without a fault, under "", and with each."""
    folder = tmp_path_factory.mktemp("planted")
    command = gpu_code.build_commands(folder / "configure")["p2p_float"]
    wanted: dict[str, Fault | None] = {"": None, **FAULTS, "warning": WARNING}
    for name in wanted:
        (folder / (name or "none")).mkdir()
    with under_way(lambda name: compile_planted(command, folder / (name or "none"), wanted[name]), wanted) as made:
        yield made


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_found(planted: dict[str, Future[Compiled]], name: str) -> None:
    assert faults(planted[""].result(), "90", PLANTED) == set()
    assert faults(planted[name].result(), "90", PLANTED) >= set(FAULTS[name].names)


def test_warning_stops_the_build(planted: dict[str, Future[Compiled]]) -> None:
    """Device code that leaves a variable unused does not compile."""
    with pytest.raises(CompilerError, match="unused"):
        planted["warning"].result()
