"""What can be known of the CUDA kernels without a GPU: they are compiled as the build compiles them, then read.

One compilation of csrc/cuda/loopback.cu serves all assertions. Their negative controls are faults planted into copies
of the sources (or of the command), which the same reading must report.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from test_build import find_nvcc

CSRC = Path(__file__).resolve().parent.parent / "csrc"
DEADLINE_S = 240
pytestmark = [
    pytest.mark.timeout(DEADLINE_S + 20),
    pytest.mark.skipif(find_nvcc() is None, reason="no nvcc: CUDA sources cannot be compiled here"),
]

ARCHITECTURES = ("80", "90", "100", "120")
KERNELS = (
    "float32-direct",
    "float32-oneshot",
    "float32-ring",
    "bfloat16-direct",
    "fp16-direct",
    "fp16-oneshot",
    "fp16-ring",
)
ALGORITHMS = {"1": "direct", "2": "oneshot", "3": "ring"}
MAX_REGISTERS = 128  # times 512 threads is the register file: one CTA always fits on an SM
MANGLED = re.compile(r"\w*8loopback\w*?(Float32|Bfloat16|Fp16)\w*?AlgorithmE([123])E\w*")
PTXAS = re.compile(
    r"Compiling entry function '(\w+)' for 'sm_(\d+)'.*?"
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
    re.DOTALL,
)


class Usage(NamedTuple):
    """What ptxas says of one kernel."""

    stack_bytes: int
    spill_bytes: int
    registers: int


class Fault:
    """One replacement in one file, perhaps a flag left out of the command, and the names it must be found by."""

    def __init__(self, file: str, old: str, new: str, *names: str, without: str = "") -> None:
        self.file, self.old, self.new, self.names, self.without = file, old, new, names, without

    def plant(self, csrc: Path) -> None:
        source = csrc / self.file
        text = source.read_text()
        assert text.count(self.old) == 1, f"{self.file} no longer has one {self.old!r}: plant it anew"
        source.write_text(text.replace(self.old, self.new))


class Compiled(NamedTuple):
    """Per architecture and kernel: ptxas' figures (empty where only PTX was made) and the PTX."""

    usage: dict[tuple[str, str], Usage]
    ptx: dict[tuple[str, str], str]


def run(command: list[str], cwd: Path) -> str:
    """Runs a command to its end and returns its output, which a failure shows."""
    scripts = sysconfig.get_path("scripts")  # cmake and ninja of this environment
    environment = {name: value for name, value in os.environ.items() if name != "CUDAARCHS"}  # as it is shipped
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**environment, "PATH": os.pathsep.join([scripts, environment.get("PATH", "")])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, f"{shlex.join(command)} exited with {done.returncode}:\n{done.stdout[-6000:]}"
    return done.stdout


def kernel_name(mangled: str) -> str:
    match = MANGLED.fullmatch(mangled)
    assert match is not None, f"not a loopback kernel: {mangled}"
    return f"{match[1].lower()}-{ALGORITHMS[match[2]]}"


def read(log: str, ptx: dict[str, Path]) -> Compiled:
    """What ptxas printed, and each kernel's instructions in the PTX of each architecture."""
    usage = {(m[2], kernel_name(m[1])): Usage(int(m[3]), int(m[4]) + int(m[5]), int(m[6])) for m in PTXAS.finditer(log)}
    bodies = {}
    for architecture, path in ptx.items():
        for part in re.split(r"^[^\n]*\.entry\s+", path.read_text(), flags=re.MULTILINE)[1:]:
            bodies[architecture, kernel_name(part.partition("(")[0].strip())] = part
    return Compiled(usage, bodies)


class Compiler:
    """nvcc with the command of the build, as CMake wrote it down."""

    def __init__(self, folder: Path) -> None:
        options = ["-DDPCOMM_CUDA=ON", "-DDPCOMM_EXTENSION=OFF"]
        run(["cmake", "-S", str(CSRC), "-B", str(folder), "-G", "Ninja", *options], folder)
        entries = json.loads((folder / "compile_commands.json").read_text())
        (command,) = (entry["command"] for entry in entries if entry["file"].endswith("loopback.cu"))
        words = shlex.split(command)
        assert words[-2] == "-o"
        self.command = words[:-2]

    def build(self, folder: Path) -> Compiled:
        """The object file as it is shipped: all architectures, host code included, warnings are errors."""
        output = ["-o", str(folder / "loopback.o"), "--keep", "--keep-dir", str(folder), "-Xptxas=-v"]
        log = run([*self.command, *output], folder)
        return read(log, {a: folder / f"loopback.compute_{a}.ptx" for a in ARCHITECTURES})

    def build_copy(self, folder: Path, fault: Fault) -> Compiled:
        """A copy of the sources with a fault, for sm_90 only."""
        copy = folder / "csrc"
        shutil.copytree(CSRC, copy)
        fault.plant(copy)
        command = [w.replace(str(CSRC), str(copy)) for w in self.command if not w.startswith("--generate-code")]
        command = ["-cubin" if w == "-c" else w for w in command if w != fault.without]
        output = ["-o", str(folder / "loopback.cubin"), "--keep", "--keep-dir", str(folder), "-Xptxas=-v"]
        return read(run([*command, "-arch=sm_90", *output], folder), {"90": folder / "loopback.ptx"})


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Compiler:
    return Compiler(tmp_path_factory.mktemp("configure"))


@pytest.fixture(scope="module")
def compiled(compiler: Compiler, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    return compiler.build(tmp_path_factory.mktemp("compile"))


# --- what is looked for ----------------------------------------------------------------------------------------------

ORDERED = (
    r"(ld|st|red|atom|fence|membar)\..*\b(relaxed|volatile|acquire|release|acq_rel|sc|weak|mmio|cta|cluster|gpu|gl)\b.*"
)
FLAG_READ, FLAG_WRITE = "ld.acquire.sys.global.u32", "st.release.sys.global.u32"


def opcodes(ptx: str) -> Counter[str]:
    """How often each instruction occurs, types and modifiers included."""
    return Counter(re.findall(r"^\s*(?:@!?%p\d+\s+)?([a-z][a-z0-9_]*(?:[.:][a-z0-9_:]+)*)[ \t;]", ptx, re.MULTILINE))


def count(ops: Counter[str], pattern: str) -> int:
    return sum(n for op, n in ops.items() if re.fullmatch(pattern, op))


def resource_faults(usage: Usage) -> Iterator[str]:
    if usage.stack_bytes or usage.spill_bytes:
        yield "stack"
    if usage.registers > MAX_REGISTERS:
        yield "registers"


def width_faults(kernel: str, ops: Counter[str], floats_only: Counter[str]) -> Iterator[str]:
    """Elements move as 16-byte accesses. `floats_only` is the float32 kernel: its 16-byte integers are headers."""
    for direction in ("ld", "st"):
        floats, halves = (rf"{direction}(\.global)?\.v4\.{kind}" for kind in ("f32", "[bu]32"))
        if not kernel.startswith("bfloat16") and count(ops, floats) < 2:
            yield f"narrow {direction}"
        if not kernel.startswith("float32") and count(ops, halves) <= count(floats_only, halves):
            yield f"narrow {direction}"


def ptx_faults(kernel: str, ptx: str) -> Iterator[str]:
    """Every broken rule in one kernel's PTX, by a short name."""
    ops = opcodes(ptx)
    if not (ops[FLAG_READ] and ops[FLAG_WRITE]):
        yield "flags"
    if {op for op in ops if re.fullmatch(ORDERED, op)} - {FLAG_READ, FLAG_WRITE, "ld.acquire.sys.global.u64"}:
        yield "order or scope"
    if count(ops, r"ld(\.\w+)*\.nc(\.\w+)*|ldu\..*|tex\..*"):
        yield "read-only cache"
    if count(ops, r"(fma|mad)\.r[nzmp]\..*|.*\.(ftz|approx|full)\b.*"):
        yield "arithmetic"
    if count(ops, r"trap|brkpt|call(\..*)?|(ld|st)\.local.*") or ".local" in ptx:
        yield "trap, call or local memory"
    if kernel.startswith("fp16") and not ops["redux.sync.max.s32"]:
        yield "shuffles"
    if "0f7FC00000" not in ptx or "0f7FFFFFFF" in ptx:
        yield "NaN"


def faults(compiled: Compiled, architecture: str, kernel: str) -> set[str]:
    ptx = compiled.ptx[architecture, kernel]
    floats_only = compiled.ptx[architecture, f"float32-{kernel.partition('-')[2]}"]
    return {
        *resource_faults(compiled.usage[architecture, kernel]),
        *width_faults(kernel, opcodes(ptx), opcodes(floats_only)),
        *ptx_faults(kernel, ptx),
    }


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernel_keeps_the_rules(compiled: Compiled, architecture: str, kernel: str) -> None:
    assert faults(compiled, architecture, kernel) == set(), compiled.usage[architecture, kernel]


def test_every_kernel_is_read(compiled: Compiled) -> None:
    """A kernel that is added, or an architecture that is dropped, does not go unnoticed."""
    expected = {(a, k) for a in ARCHITECTURES for k in KERNELS}
    assert compiled.usage.keys() == expected
    assert compiled.ptx.keys() == expected


FAULTS = {
    "spills": Fault("cuda/loopback.cu", "__launch_bounds__(kThreads, 1)", "__launch_bounds__(kThreads, 4)", "stack"),
    "narrow": Fault("core/portable.h", "struct alignas(16) Vec", "struct Vec", "narrow ld", "narrow st"),
    "relaxed-flag": Fault("core/portable.h", FLAG_WRITE, "st.relaxed.sys.global.u32", "flags", "order or scope"),
    "gpu-scope": Fault("core/portable.h", FLAG_READ, "ld.acquire.gpu.global.u32", "flags", "order or scope"),
    "ldg": Fault(
        "cuda/lanes.cuh",
        "load_acquire(failure)",
        "__ldg(reinterpret_cast<const unsigned long long*>(failure))",
        "read-only cache",
    ),
    "fma": Fault("core/element.h", "return x + y;", "return x * y + x;", "arithmetic", without="--fmad=false"),
    "trap": Fault("cuda/lanes.cuh", "set_once(failure,", "__trap(), set_once(failure,", "trap, call or local memory"),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_planted_fault_is_found(compiler: Compiler, tmp_path: Path, fault: Fault) -> None:
    copy = compiler.build_copy(tmp_path, fault)
    found = {name for kernel in KERNELS for name in faults(copy, "90", kernel)}
    assert found >= set(fault.names)


def test_warning_stops_the_build(compiler: Compiler, tmp_path: Path) -> None:
    """Device code that calls a host function, or leaves a variable unused, does not compile."""
    fault = Fault("cuda/lanes.cuh", "  __device__ int index() const {", "  __device__ int index() const { int unused;")
    with pytest.raises(AssertionError, match="unused"):
        compiler.build_copy(tmp_path, fault)
