"""Who takes part in the comparison, how it is built and started, and why somebody is absent.

How to get the rivals (each is left out, and named, where it is missing):

    Open MPI   apt-get install openmpi-bin libopenmpi-dev     (mpicxx.openmpi and mpirun.openmpi on PATH)
    MPICH      apt-get install mpich libmpich-dev             (mpicxx.mpich and mpirun.mpich)
    oneCCL     pip install oneccl-devel                       into this Python's environment, or into another one
                                                              whose folder --oneccl or CCL_ROOT names
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from cpp.group import Contender

SOURCE = Path(__file__).resolve().parent
BUILD = SOURCE.parent.parent / "build" / "benchmarks"
BUILD_TIMEOUT_S = 900
# Slots of 64 KiB stay in cache, which streaming stores have no use for.
STORES = ("plain/64", "plain/1024", "streaming/1024")
PROBES = tuple(f"{wire}/{store}" for wire in ("fp32", "fp16") for store in STORES)
VARIANTS = {
    "floor": ("copy",),
    "dpcomm": ("none/auto", "fp16/auto"),
    "openmpi": ("default",),
    "mpich": ("default",),
    "oneccl": ("default",),
    "probe": PROBES,
}
RIVALS = ("openmpi", "mpich", "oneccl")


def select(specifications: list[str]) -> dict[str, tuple[str, ...]]:
    """Variants by contender, of NAME (its usual variants) and NAME:VARIANT. The floor always takes part.

    Raises:
        ValueError: A name that is not a contender's.
    """
    selected: dict[str, tuple[str, ...]] = {"floor": VARIANTS["floor"]}
    for specification in specifications:
        name, _, variant = specification.partition(":")
        if name not in VARIANTS:
            raise ValueError(f"unknown contender {name!r}: expected {', '.join(VARIANTS)}")
        added = (variant,) if variant else VARIANTS[name]
        selected[name] = tuple(dict.fromkeys([*selected.get(name, ()), *added]))
    return selected


def oneccl_root(option: str | None) -> Path:
    """Where oneCCL's wheel should be."""
    return Path(option or os.environ.get("CCL_ROOT") or sys.prefix)


def build(selected: dict[str, tuple[str, ...]], oneccl: Path, ranks: int) -> tuple[list[Contender], dict[str, str]]:
    """Builds the programs. Returns the contenders that there are, and the reason for each that there is not.

    Raises:
        RuntimeError: CMake cannot configure the folder at all.
    """
    error = _call(["cmake", "-S", str(SOURCE), "-B", str(BUILD), "-G", "Ninja", f"-DONECCL_ROOT={oneccl}"])
    if error:
        raise RuntimeError(f"CMake could not configure {SOURCE}:\n{error}")
    present, absent = [], {}
    for name, variants in selected.items():
        reason = why_missing(name, oneccl) or _compile(name)
        if reason:
            absent[name] = reason
        else:
            present.append(contender(name, variants, oneccl, ranks))
    return present, absent


def why_missing(name: str, oneccl: Path) -> str:
    """Empty where what the contender needs is installed; else what to install."""
    if name in ("openmpi", "mpich"):
        tools = [f"mpicxx.{name}", f"mpirun.{name}"]
        missing = [tool for tool in tools if shutil.which(tool) is None]
        package = "openmpi-bin libopenmpi-dev" if name == "openmpi" else "mpich libmpich-dev"
        return f"no {' and no '.join(missing)} on PATH: apt-get install {package}" if missing else ""
    if name == "oneccl":
        needed = [oneccl / "include" / "oneapi" / "ccl.hpp", oneccl / "bin" / "mpiexec"]
        if not all(file.exists() for file in needed):
            return f"no oneCCL in {oneccl}: pip install oneccl-devel, or name its environment with --oneccl"
    return ""


def contender(name: str, variants: tuple[str, ...], oneccl: Path, ranks: int) -> Contender:
    """How to start a program that has been built.

    Open MPI's own binding is off, since every rank pins itself (turns.h). oneCCL keeps its own: without it a call of
    two ranks on two processors takes milliseconds. With more ranks than processors it is the reverse, and it has to be
    told to yield: 256 bytes among four ranks then take 0.3 ms instead of 16.
    """
    program = str(BUILD / name)
    if name == "openmpi":
        options = ["--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-np", "{ranks}"]
        return Contender(name, variants, ("mpirun.openmpi", *options, program, "{folder}"), launcher=True)
    if name == "mpich":
        return Contender(name, variants, ("mpirun.mpich", "-np", "{ranks}", program, "{folder}"), launcher=True)
    if name == "oneccl":
        folders = [str(oneccl / "lib"), str(oneccl / "opt" / "mpi" / "libfabric" / "lib")]
        env = {
            "LD_LIBRARY_PATH": os.pathsep.join([*folders, os.environ.get("LD_LIBRARY_PATH", "")]).rstrip(os.pathsep),
            "CCL_ATL_TRANSPORT": "mpi",
        }
        if ranks > len(os.sched_getaffinity(0)):
            env |= {"CCL_YIELD": "sched_yield", "I_MPI_PIN": "0"}
        command = (str(oneccl / "bin" / "mpiexec"), "-np", "{ranks}", program, "{folder}", "{ranks}")
        return Contender(name, variants, command, launcher=True, env=env)
    return Contender(name, variants, (program, "{folder}", "{rank}", "{ranks}"), sums=name != "floor")


def _compile(name: str) -> str:
    error = _call(["cmake", "--build", str(BUILD), "--target", f"{name}_contender"])
    return f"did not compile: {error[-1500:]}" if error else ""


def _call(command: list[str]) -> str:
    """Empty where the command succeeds, else what it printed. cmake and ninja of this Python's wheels come first."""
    env = {**os.environ, "PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])}
    try:
        done = subprocess.run(
            command, env=env, capture_output=True, text=True, errors="replace", timeout=BUILD_TIMEOUT_S, check=False
        )
    except FileNotFoundError:
        return f"no {command[0]}: run this with the Python of `make venv`"
    except subprocess.TimeoutExpired:
        return f"{command[0]} took more than {BUILD_TIMEOUT_S} s"
    return "" if done.returncode == 0 else (done.stdout + done.stderr).strip() or f"status {done.returncode}"
