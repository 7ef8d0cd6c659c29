"""Copies of NCCL for tests: the installed wheel, small libraries with its names, and processes that look for one."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cpp_build import COMPILER, must

import dpcomm
from dpcomm import nccl_library

ROOT = Path(__file__).resolve().parent.parent
CPP = ROOT / "tests" / "cpp"
PACKAGE = Path(dpcomm._native.__file__).parent
DEADLINE_S = 50

# What a script of `answers` may use. find() gives [version, path, how] or [code, text].
PREAMBLE = """
import ctypes, json, os, sys, threading, types
package = types.ModuleType("dpcomm")
package.__path__ = [sys.argv[1]]
sys.modules["dpcomm"] = package
arguments = sys.argv[2:]
from dpcomm import _native
from dpcomm.errors import Error

def answer(function, *given):
    try:
        return list(function(*given))
    except Error as error:
        return [error.code, str(error)]

def find(asked, *wheels):
    return answer(_native.find_nccl, asked, list(wheels))

def say(value):
    print(json.dumps(value))
"""
API = (ROOT / "csrc" / "nccl" / "api.h").read_text()
FUNCTIONS = re.findall(r"\(\*(\w+)\)\(", API)  # without the prefix "nccl"
LIBRARY = next(iter(nccl_library.wheel_paths()), None)

needs_wheel = pytest.mark.skipif(LIBRARY is None, reason="no wheel nvidia-nccl-cu12 or nvidia-nccl-cu13 is installed")


def wheel_version() -> str:
    """The version of the wheel, as its metadata say."""
    for name in ("nvidia-nccl-cu13", "nvidia-nccl-cu12"):
        try:
            return re.split(r"\.post|\+", importlib.metadata.version(name))[0]
        except importlib.metadata.PackageNotFoundError:
            continue
    raise AssertionError("a wheel's library without its metadata")


def include_folder() -> Path:
    """Where the wheel's nccl.h is."""
    assert LIBRARY is not None
    return Path(LIBRARY).parent.parent / "include"


def answers(script: str, *arguments: object, **variables: object) -> Any:
    """What the script says, in a process where only what it does loads an NCCL."""
    clean = {
        name: value for name, value in os.environ.items() if name not in ("DPCOMM_NCCL_LIBRARY", "LD_LIBRARY_PATH")
    }
    done = subprocess.run(
        [sys.executable, "-c", PREAMBLE + script, str(PACKAGE), *map(str, arguments)],
        env={**clean, **{name: str(value) for name, value in variables.items()}},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def named(folder: Path, *flags: str, version: int = 22000, result: int = 0) -> Path:
    """Builds a library with NCCL's names (tests/cpp/nccl_named.cpp) as libnccl.so.2 of the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "libnccl.so.2"
    values = [f"-DNAMED_VERSION={version}", f"-DNAMED_RESULT={result}", *flags]
    link = ["-shared", "-fPIC", "-Wl,-soname,libnccl.so.2", f"-I{ROOT / 'csrc'}", "-std=c++20"]
    must([COMPILER, *link, *values, str(CPP / "nccl_named.cpp"), "-o", str(library)], DEADLINE_S)
    return library


def no_library(folder: Path) -> Path:
    """A libnccl.so.2 that no linker takes. In LD_LIBRARY_PATH it hides the one that a machine may have."""
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "libnccl.so.2"
    library.write_text("no ELF file")
    return library
