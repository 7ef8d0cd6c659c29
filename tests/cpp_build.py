"""Builds and runs the C++ tests: csrc/CMakeLists.txt with DPCOMM_TESTS=ON, once per kind, under build/tests.

Ninja compiles what changed and nothing else, so a second run starts at once.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from functools import cache
from pathlib import Path

import pybind11
from test_build import find_nvcc

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "tests"


def simd() -> str:
    """Flags for the vectors of this processor: what it does in one instruction takes the optimizer minutes to emulate,
    with a sanitizer most of all. test_portable and tests of the extension have the emulation, too."""
    path = Path("/proc/cpuinfo")
    flags = set(path.read_text().split()) if path.exists() else set()
    return "-mavx2 -mf16c" if {"avx2", "f16c"} <= flags else ""


KINDS = {
    "plain": f"-O2 -g1 {simd()}",
    "tsan": f"-O1 -g1 -fsanitize=thread {simd()}",
    "asan": f"-O0 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all {simd()}",
}
# cmake and ninja of this Python's wheels come first: an environment need not be activated to be used.
ENVIRONMENT = {
    **os.environ,
    "PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")]),
    "TSAN_OPTIONS": "halt_on_error=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}
COMPILER = os.environ.get("CXX", "c++")  # as CMake chooses
SKIPPED = 77  # exit status of a program whose instruction set this processor lacks


def call(command: list[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    """Runs a command and returns its status and all it printed, in `stdout`.

    Raises:
        subprocess.TimeoutExpired: it took longer.
    """
    return subprocess.run(
        command,
        env=ENVIRONMENT,
        timeout=timeout_s,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )


def must(command: list[str], timeout_s: float) -> None:
    """The same for what has to succeed: AssertionError with the end of what it printed."""
    done = call(command, timeout_s)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-6000:]}"


@cache
def why_no(kind: str) -> str:
    """Empty where this compiler builds and this kernel runs programs of the kind; else a reason to skip."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    source, program = FOLDER / f"try_{kind}.cpp", FOLDER / f"try_{kind}"
    source.write_text("int main() { return 0; }\n")
    built = call([COMPILER, *KINDS[kind].split(), str(source), "-o", str(program)], 60)
    if built.returncode != 0:
        return f"no {kind}: {built.stdout.strip().splitlines()[-1]}"
    ran = call([str(program)], 60)
    return "" if ran.returncode == 0 else f"no {kind}: {ran.stdout.strip() or ran.returncode}"


def cuda() -> str:
    """DPCOMM_CUDA: engine p2p on the stand-in CUDA runtime, which needs the headers that come with nvcc."""
    return "OFF" if find_nvcc() is None else "STAND_IN"


@cache
def configure(kind: str) -> Path:
    """Returns the build folder of the kind."""
    folder = FOLDER / kind
    options = {
        "DPCOMM_TESTS": "ON",
        "DPCOMM_EXTENSION": "OFF",
        "DPCOMM_CUDA": cuda(),
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
        "CMAKE_BUILD_TYPE": "Test",
        "CMAKE_CXX_FLAGS_TEST": KINDS[kind],
    }
    settings = [f"-D{name}={value}" for name, value in options.items()]
    must(["cmake", "-S", str(ROOT / "csrc"), "-B", str(folder), "-G", "Ninja", *settings], 120)
    return folder


@cache
def build(kind: str, targets: tuple[str, ...]) -> Path:
    """Builds the targets and returns the folder they are in."""
    folder = configure(kind)
    must(["cmake", "--build", str(folder), "--parallel", str(os.cpu_count() or 2), "--target", *targets], 1200)
    return folder / "tests"
