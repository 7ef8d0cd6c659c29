"""Our declarations of NCCL (csrc/nccl/api.h) against the wheel's own nccl.h and library.

The comparison is tests/cpp/nccl_declarations.cpp: it compiles or does not. Each kind of fault is planted once.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from cpp_build import COMPILER, call, must
from nccl_copies import API, CPP, DEADLINE_S, FUNCTIONS, LIBRARY, ROOT, include_folder, named, needs_wheel

CUDA_RUNTIME = """#include <stddef.h>
typedef struct CUstream_st* cudaStream_t;
typedef struct CUevent_st* cudaEvent_t;
#define __CUDA_BF16_TYPES_EXIST__ 1
"""
SOURCES = ("csrc/nccl/library.cpp", "csrc/error.cpp", "tests/cpp/nccl_alone.cpp")


def compare(folder: Path, api: str) -> subprocess.CompletedProcess[str]:
    """Compiles the comparison of the wheel's nccl.h with the given text of api.h."""
    ours, cuda = folder / "ours" / "nccl", folder / "cuda"
    ours.mkdir(parents=True)
    cuda.mkdir()
    (ours / "api.h").write_text(api)
    (cuda / "cuda_runtime.h").write_text(CUDA_RUNTIME)
    for name in ("cuda_fp16.h", "cuda_bf16.h", "cuda_fp8.h"):
        (cuda / name).write_text("")
    folders = [f"-I{folder}" for folder in (ours.parent, cuda, include_folder())]
    source = str(CPP / "nccl_declarations.cpp")
    return call([COMPILER, "-std=c++20", "-Wall", "-Werror", "-fsyntax-only", *folders, source], DEADLINE_S)


@needs_wheel
def test_declarations_are_those_of_nccl_h(tmp_path: Path) -> None:
    done = compare(tmp_path, API)
    assert done.returncode == 0, done.stdout


FAULTS = [
    ("remote_error = 6", "remote_error = 5"),
    ("bfloat16 = 9", "bfloat16 = 10"),
    ("max = 2, min = 3", "max = 3, min = 2"),
    ("enum class DataType : int", "enum class DataType : short"),
    ("internal[128]", "internal[64]"),
    ("0xcafebeef", "0xcafebeee"),
    ("version = 21400", "version = 2140"),
    ("kLeastVersion = 21800", "kLeastVersion = 2180"),
    ("blocking = INT_MIN", "blocking = 0"),
    ("size_t size = sizeof(Config)", "unsigned size = 24"),
    ("unsigned magic = 0xcafebeef;", "unsigned before = 0, magic = 0xcafebeef;"),
    ("// NCCL_CONFIG_UNDEF_INT", "\n  void* more = nullptr;"),
    ("(*Send)(const void* from, size_t count", "(*Send)(const void* from, int count"),
    ("(*Recv)(void* to,", "(*Recv)(const void* to,"),
    ("DataType type, RedOp op,", "RedOp op, DataType type,"),
    ("UniqueId id, int rank", "UniqueId* id, int rank"),
    ("Result (*CommAbort)(Comm comm)", "void (*CommAbort)(Comm comm)"),
    ("(*GroupEnd)()", "(*GroupEnd)(Comm comm)"),
]


@needs_wheel
@pytest.mark.parametrize(("right", "wrong"), FAULTS, ids=[wrong.strip() for _, wrong in FAULTS])
def test_a_planted_fault_does_not_compile(tmp_path: Path, right: str, wrong: str) -> None:
    assert API.count(right) == 1
    done = compare(tmp_path, API.replace(right, wrong))
    assert done.returncode != 0
    assert re.search(r"static.assert\w* failed", done.stdout), done.stdout


def test_every_declaration_is_compared_and_resolved() -> None:
    """What is added to api.h must be added to the comparison, and to what is taken from the library, by its name."""
    compared = (CPP / "nccl_declarations.cpp").read_text()
    for name, body in re.findall(r"enum class (\w+) : int \{(.*?)\}", API, re.S):
        for enumerator in re.findall(r"(\w+) = \d+", body):
            assert f"int({name}::{enumerator}) == " in compared
    assert re.findall(r"kSame<&nccl(\w+), decltype\(Api::\1\)>", compared) == FUNCTIONS
    assert len(FUNCTIONS) == 14
    resolved = re.findall(r'resolve\("nccl(\w+)", (?:library\.)?api\.(\w+)\)', library_source())
    assert sorted(resolved) == sorted((name, name) for name in FUNCTIONS)


def library_source() -> str:
    return (ROOT / "csrc" / "nccl" / "library.cpp").read_text()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program tests/cpp/nccl_alone.cpp."""
    program = tmp_path_factory.mktemp("alone") / "nccl_alone"
    sources = [str(ROOT / name) for name in SOURCES]
    must([COMPILER, "-std=c++20", f"-I{ROOT / 'csrc'}", *sources, "-o", str(program), "-ldl", "-lpthread"], DEADLINE_S)
    return program


@needs_wheel
def test_a_refusal_without_a_gpu_carries_the_reason(alone: Path) -> None:
    """The real library. Where the machine has a GPU, it is hidden."""
    hidden = [str(shutil.which("env")), "CUDA_VISIBLE_DEVICES=", str(alone), str(LIBRARY)]
    done = call(hidden, DEADLINE_S)
    assert done.returncode == 0, done.stdout
    assert done.stdout.startswith("CUDA: ncclCommInitRankConfig: unhandled cuda error")
    assert re.search(r"Cuda failure.*(driver version is insufficient|no CUDA-capable device)", done.stdout)


@pytest.mark.parametrize(
    ("result", "said"),
    [
        (0, "made"),
        (1, "CUDA: ncclGetUniqueId: its word: its reason"),
        (2, "RESOURCE: ncclGetUniqueId: its word"),
        (3, "INTERNAL: ncclGetUniqueId: its word: its reason"),
        (6, "PEER_LOST: ncclGetUniqueId: its word: its reason"),
        (99, "INTERNAL: ncclGetUniqueId: its word: its reason"),
    ],
)
def test_results_become_errors(alone: Path, tmp_path: Path, result: int, said: str) -> None:
    done = call([str(alone), str(named(tmp_path, result=result))], DEADLINE_S)
    assert (done.returncode, done.stdout.strip()) == (0, said)
