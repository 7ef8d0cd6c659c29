"""Where a measurement was taken: processor, system, software, commit, command. It does not know what was measured."""

import datetime
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import torch


def describe_environment() -> dict[str, object]:
    """Facts without which a time means nothing; fit for json.dump. Unknown facts are empty strings, never left out."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "commit": git_commit(),
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def cpu_model() -> str:
    """The processor's name as the kernel gives it; the architecture where it gives none (as on many Arm systems)."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.machine()


def git_commit() -> str:
    """The commit of this checkout, with "+changes" where the working tree differs; empty outside a checkout."""
    commit = _git("rev-parse", "HEAD")
    return commit + "+changes" if commit and _git("status", "--porcelain", "--untracked-files=no") else commit


def _git(*arguments: str) -> str:
    folder = Path(__file__).resolve().parent
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=30, check=False)
    except FileNotFoundError:  # git is not installed
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
