"""What can be known of the kernels of engine nccl without a GPU; test_cuda_static.py says what is meant.

Steps wait for nobody, so they have neither flags nor barriers. Values move in accesses of 16 bytes, at as many places
as the source has.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from planted import Fault
from test_cuda_static import HARDWARE_NAN, ORDERED, SITES, Sites

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
import gpu_code
from gpu_code import ARCHITECTURES, CSRC, KERNELS, Kernel, count, opcodes, whole

pytestmark = [
    pytest.mark.timeout(2 * gpu_code.DEADLINE_S),  # the first test waits for the compiler
    pytest.mark.skipif(gpu_code.find_nvcc() is None, reason="no nvcc: CUDA sources cannot be compiled here"),
]

UNITS = ("step_fp16", "step_half", "step_float", "step_whole", "inside_kernels", "native", "call_ends")
MOST_REGISTERS = 128  # of 512 lanes: one CTA fits on every SM
STEPS = re.compile(
    r"\w*?5stepsI\w*?\d(None|Fp16)I\w*?(Float32|Float64|Float16|Bfloat16|5WholeI[il])\w*?AlgorithmE([123])E\w*"
)
INSIDE = re.compile(
    r"\w*?6insideI\w*?\d(None|Fp16)I\w*?(Float32|Float64|Float16|Bfloat16|5WholeI[il])\w*InsideLaunch\w*"
)
PASSES = re.compile(
    r"\w*?(cast_values|widen_codes)I\w*?6NativeI\w*?\d(Float32|Float16|Bfloat16)E(?:\w*?\d(Float16|Bfloat16)E|S\w_)E\w*"
)
# put, add (what comes first, and what follows), get; in codec fp16 own values come from a slot.
INSIDE_SITES = {"none": Sites(2, 3, 2, 1, 5, 2), "fp16": Sites(1, 3, 2, 1, 3, 2)}
INSIDE_KERNELS = tuple(Kernel(codec, dtype, "inside") for codec, dtypes in gpu_code.CODINGS.items() for dtype in dtypes)
ENDS = re.compile(r"\w*?(begin|end)E?\d*\w*?(Begin|End)Launch\w*")


class Pass(NamedTuple):
    """One of the kernels around NCCL's own all-reduce in 16 bits."""

    name: str
    dtype: str
    wire: str

    def __str__(self) -> str:
        return f"{self.name}-{self.dtype}-{self.wire}"


NATIVE = tuple(
    Pass(name, dtype, wire)
    for name in ("cast_values", "widen_codes")
    for dtype in gpu_code.CODINGS["fp16"]
    for wire in ("float16", "bfloat16")
)
MOST_OF_NATIVE = 64  # registers: at least two of its CTAs fit on every SM
Name = Kernel | Pass | str  # a string: an end of a call


class Read(NamedTuple):
    """What the compiler says and makes of each kernel: (architecture, kernel)."""

    usage: dict[tuple[str, Name], gpu_code.Usage]
    ptx: dict[tuple[str, Name], str]


def named(mangled: str) -> Name:
    if match := STEPS.fullmatch(mangled):
        element = gpu_code.ELEMENTS.get(match[2], match[2].lower())
        return Kernel(match[1].lower(), element, gpu_code.ALGORITHMS[int(match[3]) - 1])
    if match := INSIDE.fullmatch(mangled):
        return Kernel(match[1].lower(), gpu_code.ELEMENTS.get(match[2], match[2].lower()), "inside")
    if match := PASSES.fullmatch(mangled):
        return Pass(match[1], match[2].lower(), (match[3] or match[2]).lower())
    match = ENDS.fullmatch(mangled)
    assert match, mangled
    return match[2].lower()


def read(folder: Path, units: tuple[str, ...], architectures: tuple[str, ...]) -> Read:
    found = Read({}, {})
    for unit in units:
        log = (folder / unit / "log").read_text()
        for entry in gpu_code.PTXAS.finditer(log):
            usage = gpu_code.Usage(int(entry[3]), int(entry[4]) + int(entry[5]), int(entry[6]), 0)
            found.usage[entry[2], named(entry[1])] = usage
        for a in architectures:
            parts = re.split(r"^[^\n]*\.entry\s+", (folder / unit / f"{unit}.compute_{a}.ptx").read_text(), flags=re.M)
            found.ptx.update({(a, named(part.partition("(")[0].strip())): part for part in parts[1:]})
    return found


@pytest.fixture(scope="module")
def compiled() -> Read:
    gpu_code.compile_units(UNITS)
    return read(gpu_code.FOLDER, UNITS, ARCHITECTURES)


def forbidden(compiled: Read, architecture: str, name: Name, most_registers: int) -> set[str]:
    """Every broken rule that all kernels have, by a short name."""
    usage, ptx = compiled.usage[architecture, name], compiled.ptx[architecture, name]
    ops = opcodes(ptx)
    found = set()
    if usage.stack_bytes or usage.spill_bytes or usage.registers > most_registers:
        found.add("stack or registers")
    if any(re.fullmatch(ORDERED, op) for op in ops) or count(ops, r"bar(rier)?\..*"):
        found.add("waits")
    if count(ops, r"ld(\.\w+)*\.nc(\.\w+)*|ldu\..*|tex\..*"):
        found.add("read-only cache")
    if count(ops, r"(fma|mad)\.r[nzmp]\..*|.*\.(ftz|approx|full)\b.*"):
        found.add("arithmetic")
    if count(ops, r"trap|brkpt|call(\..*)?|(ld|st)\.local.*") or ".local" in ptx:
        found.add("trap, call or local memory")
    if any(other in ptx for other in HARDWARE_NAN):
        found.add("NaN")
    return found


def faults(compiled: Read, architecture: str, kernel: Kernel) -> set[str]:
    """Of a kernel of steps, or of what ranks of a host do."""
    found = forbidden(compiled, architecture, kernel, MOST_REGISTERS)
    ops = opcodes(compiled.ptx[architecture, kernel])
    inside = kernel.algorithm == "inside"
    sites: Sites = INSIDE_SITES[kernel.codec] if inside else SITES[kernel.codec, kernel.algorithm]
    user, slot = kernel.element_bytes * 8 // 16, kernel.code_bytes * 8 // 16
    if whole(ops, "ld") < sites.user_loads * user + sites.slot_loads * slot:
        found.add("narrow ld")
    if whole(ops, "st") < sites.user_stores * user + sites.slot_stores * slot:
        found.add("narrow st")
    if kernel.codec == "fp16" and not ops["redux.sync.max.s32"]:
        found.add("shuffles")
    return found


def native_faults(compiled: Read, architecture: str, kernel: Pass) -> set[str]:
    """Of a pass around NCCL's all-reduce: values on one side, eight codes at once on the other."""
    found = forbidden(compiled, architecture, kernel, MOST_OF_NATIVE)
    ops = opcodes(compiled.ptx[architecture, kernel])
    casts = kernel.name == "cast_values"
    values = 2 if kernel.dtype == "float32" else 1
    if whole(ops, "ld") < (values if casts else 1):
        found.add("narrow ld")
    if whole(ops, "st") < (1 if casts else values):
        found.add("narrow st")
    if casts and not ops["redux.sync.max.s32"]:
        found.add("shuffles")
    return found


@pytest.mark.parametrize("kernel", [*KERNELS, *INSIDE_KERNELS], ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_steps_keep_the_rules(compiled: Read, architecture: str, kernel: Kernel) -> None:
    assert faults(compiled, architecture, kernel) == set(), compiled.usage[architecture, kernel]


@pytest.mark.parametrize("kernel", NATIVE, ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_passes_around_nccl_keep_the_rules(compiled: Read, architecture: str, kernel: Pass) -> None:
    assert native_faults(compiled, architecture, kernel) == set(), compiled.usage[architecture, kernel]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_ends_of_a_call_talk_to_the_host(compiled: Read, architecture: str) -> None:
    """`begin` and `end` release what they count at system scope; `end` acquires what the host says."""
    begin, end = (opcodes(compiled.ptx[architecture, name]) for name in ("begin", "end"))
    assert begin["st.release.sys.global.u64"] == 1
    assert end["st.release.sys.global.u64"] == 2
    assert end["ld.acquire.sys.global.u64"] >= 3
    for name in ("begin", "end"):
        usage = compiled.usage[architecture, name]
        assert (usage.stack_bytes, usage.spill_bytes) == (0, 0)


def test_every_kernel_is_read(compiled: Read) -> None:
    wanted = {(a, k) for a in ARCHITECTURES for k in (*KERNELS, *INSIDE_KERNELS, *NATIVE, "begin", "end")}
    assert compiled.usage.keys() == wanted
    assert compiled.ptx.keys() == wanted
    assert {path.stem for folder in ("gpu", "nccl") for path in (CSRC / folder).glob("*.cu")} == set(UNITS)


# --- negative controls -----------------------------------------------------------------------------------------------

PLANTED = Kernel("none", "float32", "oneshot")  # the quickest to compile
UNIT = """#include "step_kernels.cuh"
namespace dpcomm {
template __global__ void steps<None<Float32>, Algorithm::oneshot>(const __grid_constant__ StepLaunch);
}
"""
FAULTS = {
    "spills": Fault(
        "nccl/step_kernels.cuh", "__launch_bounds__(kCtaThreads, 1)", "__launch_bounds__(512, 4)", "stack or registers"
    ),
    "narrow": Fault("core/portable.h", "struct alignas(16) Vec", "struct Vec", "narrow ld", "narrow st"),
    "waits": Fault(
        "gpu/grid_lanes.cuh",
        "sync(bool ok) const { return ok; }",
        "sync(bool ok) const { return __syncthreads_and(ok); }",
        "waits",
    ),
    "fma": Fault("core/element.h", "return x + y;", "return x * y + x;", "arithmetic", without="--fmad=false"),
}


def compile_planted(folder: Path, fault: Fault | None) -> Read:
    """One kernel of a copy of the sources with a fault, for sm_90 only."""
    command = gpu_code.build_commands(folder / "configure")["step_float"]
    copy, out = folder / "csrc", folder / "planted"
    shutil.copytree(CSRC, copy)
    out.mkdir()
    if fault is not None:
        fault.plant(copy)
    source = copy / "nccl" / "planted.cu"
    source.write_text(UNIT)
    words = [w.replace(str(CSRC), str(copy)) for w in command[:-1] if not w.startswith("--generate-code")]
    words = ["-cubin" if w == "-c" else w for w in words if fault is None or w != fault.without]
    output = ["-o", str(out / "planted.cubin"), "--keep", "--keep-dir", str(out), "-Xptxas=-v"]
    (out / "log").write_text(gpu_code.run([*words, str(source), "-arch=sm_90", *output], folder))
    (out / "planted.ptx").rename(out / "planted.compute_90.ptx")
    return read(folder, ("planted",), ("90",))


def test_without_a_fault_nothing_is_found(tmp_path: Path) -> None:
    assert faults(compile_planted(tmp_path, None), "90", PLANTED) == set()


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_found(tmp_path: Path, name: str) -> None:
    assert faults(compile_planted(tmp_path, FAULTS[name]), "90", PLANTED) >= set(FAULTS[name].names)
