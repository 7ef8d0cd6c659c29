"""Where a measurement was taken: processor, system, software, commit, command. It does not know what was measured."""

import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import torch

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_PROC_BIND", "OMP_PLACES")


def describe_environment() -> dict[str, object]:
    """Facts without which a time means nothing; fit for json.dump. Unknown facts are empty strings, never left out."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "commit": git_commit(),
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "caches": caches(),
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "huge_pages": _read("/sys/kernel/mm/transparent_hugepage/enabled"),
        "load_average": os.getloadavg()[0],
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
        "libc": " ".join(platform.libc_ver()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "mpi4py": _version("mpi4py"),
        "compiler": extension_compiler(),
        "threads": {name: os.environ.get(name, "") for name in THREAD_VARIABLES},
    }


def cpu_model() -> str:
    """The processor's name as the kernel gives it; the architecture where it gives none (as on many Arm systems)."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.machine()


def caches() -> dict[str, str]:
    """What lscpu says: "L3": "32 MiB (1 instance)". What a virtual machine reports need not be what it has."""
    try:
        fields = json.loads(_output("lscpu", "--json"))["lscpu"]
    except (ValueError, KeyError):
        return {}
    while nested := [child for field in fields for child in field.pop("children", [])]:
        fields += nested
    return {f["field"].split()[0]: f["data"] for f in fields if f["field"].startswith("L") and "cache" in f["field"]}


def extension_compiler() -> str:
    """What the compiler left in dpcomm's extension: "GCC: (Debian 12.2.0-14) 12.2.0"."""
    found = importlib.util.find_spec("dpcomm")
    for file in Path(found.origin).parent.glob("_native*.so") if found and found.origin else []:
        lines = _output("readelf", "--string-dump", ".comment", str(file)).splitlines()
        return ", ".join(
            dict.fromkeys(line.partition("]")[2].strip() for line in lines if line.lstrip().startswith("["))
        )
    return ""


def git_commit() -> str:
    """The commit of this checkout, with "+changes" where the working tree differs; empty outside a checkout."""
    commit = _git("rev-parse", "HEAD")
    return commit + "+changes" if commit and _git("status", "--porcelain", "--untracked-files=no") else commit


def _git(*arguments: str) -> str:
    return _output("git", "-C", str(Path(__file__).resolve().parent), *arguments)


def _output(*command: str) -> str:
    """What a command prints; empty where it fails or is not installed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _read(file: str) -> str:
    """A file's text; empty where there is none."""
    path = Path(file)
    return path.read_text().strip() if path.is_file() else ""


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
