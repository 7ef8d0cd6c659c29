"""What nvcc makes of the p2p kernels, without a GPU: compiled as the build compiles them, then read.

One compilation of csrc/cuda/p2p_*.cu for all architectures, kept under build/gpu-code until a source, the command or
the compiler changes, serves tests/test_cuda_static.py and gpu_static.py. It imports no dpcomm.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
FOLDER = ROOT / "build" / "gpu-code"
DEADLINE_S = 300  # of one compilation; on idle processors it takes a tenth of that
AT_ONCE = 2  # compilations; each uses one processor and 200 MiB

ARCHITECTURES = ("80", "90", "100", "120")
UNITS = ("p2p_fp16", "p2p_half", "p2p_float", "p2p_whole")  # the slowest first
CODINGS = {
    "none": ("float32", "float64", "float16", "bfloat16", "int32", "int64"),
    "fp16": ("float32", "float16", "bfloat16"),
}
ALGORITHMS = ("direct", "oneshot", "ring")  # enum class Algorithm counts from 1
ELEMENT_BYTES = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2, "int32": 4, "int64": 8}

MANGLED = re.compile(
    r"\w*?3p2pI\w*?\d(None|Fp16)I\w*?(Float32|Float64|Float16|Bfloat16|5WholeI[il])\w*?AlgorithmE([123])E\w*"
)
ELEMENTS = {"5WholeIi": "int32", "5WholeIl": "int64"}
PTXAS = re.compile(
    r"Compiling entry function '(\w+)' for 'sm_(\d+)\w?'.*?"
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)",
    re.DOTALL,
)
INCLUDE = re.compile(r'^#include "([^"]+)"', re.MULTILINE)
SHARED = re.compile(r"(\d+) bytes smem")
OPCODE = re.compile(r"^\s*(?:@!?%p\d+\s+)?([a-z][a-z0-9_]*(?:[.:][a-z0-9_:]+)*)[ \t;]", re.MULTILINE)

WHOLE = r"{direction}(\.global)?\.(v4\.[{kinds}]32|v2\.[{kinds}]64)"
TWICE = r"{direction}(\.global)?\.(v8\.[{kinds}]32|v4\.[{kinds}]64)"


class CompilerError(Exception):
    """A command of the build failed; the text is its output."""


class Kernel(NamedTuple):
    """One of the kernels. str() is what tables and tests call it."""

    codec: str
    dtype: str
    algorithm: str

    def __str__(self) -> str:
        return f"{self.codec}-{self.dtype}-{self.algorithm}"

    @property
    def element_bytes(self) -> int:
        """In user memory."""
        return ELEMENT_BYTES[self.dtype]

    @property
    def code_bytes(self) -> int:
        """Of an element in a slot; codec fp16 has one byte more for each group of 256."""
        return 2 if self.codec == "fp16" else self.element_bytes

    @property
    def threads(self) -> int:
        """Lanes of a CTA; the PTX is asked whether that is so."""
        return 256 if self.element_bytes == 8 else 512


KERNELS = tuple(Kernel(codec, dtype, a) for codec, dtypes in CODINGS.items() for dtype in dtypes for a in ALGORITHMS)


class Usage(NamedTuple):
    """What ptxas says of one kernel."""

    stack_bytes: int
    spill_bytes: int
    registers: int
    shared_bytes: int


class Compiled(NamedTuple):
    """What was read of each (architecture, kernel), where the machine code lies, and what each unit took."""

    usage: dict[tuple[str, Kernel], Usage]
    ptx: dict[tuple[str, Kernel], str]
    cubins: dict[tuple[str, str], Path]  # (architecture, unit)
    seconds: dict[str, float]  # by the clock, as it was compiled; other compilations ran beside it


def find_nvcc() -> str | None:
    """The compiler csrc/CMakeLists.txt would find."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    path = os.pathsep.join([*(f"{home}/bin" for home in homes), os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
    return shutil.which("nvcc", path=path)


def run(command: list[str], cwd: Path) -> str:
    """Runs a command to its end and returns its output.

    Raises:
        CompilerError: it failed.
    """
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
    if done.returncode != 0:
        raise CompilerError(f"{shlex.join(command)} exited with {done.returncode}:\n{done.stdout[-6000:]}")
    return done.stdout


def build_commands(folder: Path) -> dict[str, list[str]]:
    """How the build compiles each CUDA source: what CMake writes down in the folder, up to "-x cu -c SOURCE"."""
    folder.mkdir(parents=True, exist_ok=True)
    options = ["-DDPCOMM_CUDA=ON", "-DDPCOMM_EXTENSION=OFF"]
    run(["cmake", "-S", str(CSRC), "-B", str(folder), "-G", "Ninja", *options], folder)
    commands = {}
    for entry in json.loads((folder / "compile_commands.json").read_text()):
        if entry["file"].endswith(".cu"):
            words = shlex.split(entry["command"])
            if words[-2] != "-o":
                raise CompilerError(f"a command of another form than expected: {entry['command']}")
            commands[Path(entry["file"]).stem] = words[:-2]
    return commands


def parse_name(mangled: str) -> Kernel:
    """Raises ValueError for what is no p2p kernel."""
    match = MANGLED.fullmatch(mangled)
    if match is None:
        raise ValueError(f"not a p2p kernel: {mangled}")
    element = ELEMENTS.get(match[2], match[2].lower())
    return Kernel(match[1].lower(), element, ALGORITHMS[int(match[3]) - 1])


def parse_usage(log: str) -> dict[tuple[str, Kernel], Usage]:
    """What `ptxas -v` printed, by architecture and kernel."""
    usage = {}
    for found in PTXAS.finditer(log):
        shared = SHARED.search(found[7])
        spill_bytes = int(found[4]) + int(found[5])
        usage[found[2], parse_name(found[1])] = Usage(
            int(found[3]), spill_bytes, int(found[6]), int(shared[1]) if shared else 0
        )
    return usage


def parse_ptx(text: str) -> dict[Kernel, str]:
    """The part of a PTX file that belongs to each kernel, from its name on."""
    parts = re.split(r"^[^\n]*\.entry\s+", text, flags=re.MULTILINE)[1:]
    return {parse_name(part.partition("(")[0].strip()): part for part in parts}


def opcodes(ptx: str) -> Counter[str]:
    """How often each instruction occurs, types and modifiers included."""
    return Counter(OPCODE.findall(ptx))


def count(ops: Counter[str], pattern: str) -> int:
    """Instructions whose whole name matches."""
    return sum(n for op, n in ops.items() if re.fullmatch(pattern, op))


def whole(ops: Counter[str], direction: str, kinds: str = "bfsu") -> int:
    """Accesses of 16 bytes; one of 32 counts as two."""
    names = {"direction": direction, "kinds": kinds}
    return count(ops, WHOLE.format(**names)) + 2 * count(ops, TWICE.format(**names))


def included_by(source: Path) -> set[Path]:
    """The source and every file of csrc that it includes, directly or not."""
    found, left = set[Path](), [source.resolve()]
    while left:
        path = left.pop()
        if path not in found:
            found.add(path)
            left += [(path.parent / name).resolve() for name in INCLUDE.findall(path.read_text())]
    return found


def fingerprint(command: list[str]) -> str:
    """Of all that decides what becomes of a unit."""
    digest = hashlib.sha256(f"{run([command[0], '--version'], ROOT)}{command}".encode())
    for path in sorted(included_by(Path(command[-1]))):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def compile_unit(command: list[str], folder: Path) -> None:
    """Leaves log, seconds, PTX and cubin of each architecture in the folder, unless they are there from before."""
    wanted, key = fingerprint(command), folder / "key"
    if key.exists() and key.read_text() == wanted:
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    begin = time.monotonic()
    log = run([*command, "-o", str(folder / "object.o"), "--keep", "--keep-dir", str(folder), "-Xptxas=-v"], folder)
    (folder / "seconds").write_text(f"{time.monotonic() - begin:.1f}")
    (folder / "log").write_text(log)
    for path in folder.iterdir():
        if path.suffix not in ("", ".ptx", ".cubin"):
            path.unlink()
    key.write_text(wanted)


def compile_units(units: Sequence[str], folder: Path = FOLDER) -> None:
    """Units by name, each into a folder of its own, as they are shipped: all architectures, warnings are errors.

    Raises:
        CompilerError: see there.
    """
    commands = build_commands(folder / "configure")
    with ThreadPoolExecutor(AT_ONCE) as pool:
        waiting = [pool.submit(compile_unit, commands[unit], folder / unit) for unit in units]
        for one in waiting:
            one.result()


def compile_all(folder: Path = FOLDER) -> Compiled:
    """All kernels of engine p2p.

    Raises:
        CompilerError: see there.
    """
    compile_units(UNITS, folder)
    made = Compiled({}, {}, {}, {})
    for unit in UNITS:
        made.usage.update(parse_usage((folder / unit / "log").read_text()))
        made.seconds[unit] = float((folder / unit / "seconds").read_text())
        for a in ARCHITECTURES:
            ptx = parse_ptx((folder / unit / f"{unit}.compute_{a}.ptx").read_text())
            made.ptx.update({(a, kernel): text for kernel, text in ptx.items()})
            # Named for the machine too, where PTX is kept for the virtual architecture beside it.
            (made.cubins[a, unit],) = (folder / unit).glob(f"{unit}.compute_{a}*.cubin")
    return made
