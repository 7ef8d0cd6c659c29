"""The layers of the source tree (docs/design.md), enforced by reading includes and imports.

Every rule has a negative control: a violation planted into a tree of its own must be reported.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

CORE_SYSTEM = {"cstdint", "cstring", "cmath", "type_traits"}
PORTABLE_SYSTEM = CORE_SYSTEM | {"immintrin.h", "cuda_fp16.h"}  # intrinsics are verbs of core/portable.h
ENGINE_MAY = ("core/", "host/", "carried/", "engine.h", "error.h")
# What a layer above the core may include beyond itself and the system, from the root of csrc.
MAY = {
    "host": ("core/", "engine.h", "error.h"),
    "carried": ("core/",),
    "cpu": ENGINE_MAY,
    "gpu": ("core/", "error.h"),
    "cuda": (*ENGINE_MAY, "gpu/"),
    "nccl": (*ENGINE_MAY, "gpu/"),
}
BINDINGS = ("bindings.h", "bindings.cpp", "bindings_carried.cpp", "bindings_nccl.cpp")
PYTHON = re.compile(r"(pybind11|torch|ATen|c10|nanobind)/|Python\.h$")
# System headers that a layer must not include. `carried` needs the C++ library only, whose names are plain words.
FOREIGN = {
    "host": re.compile(r"cuda|nccl"),
    "carried": re.compile(r"[./]"),
    "cpu": re.compile(r"cuda|nccl"),
    "gpu": re.compile(r"nccl"),
    "cuda": re.compile(r"nccl"),
}
# The core is pure arithmetic and flags: it never allocates, locks, throws or prints.
CORE_NEVER = re.compile(r"\b(new|delete|malloc|calloc|realloc|free|throw|printf|fprintf|cout|cerr|mutex|abort|exit)\b")
COMPILER_MACRO = re.compile(
    r"\b(__CUDA\w*|__NVCC__|__AVX\w*|__SSE\w*|__F16C__|__x86_64__|__GNUC__|__clang__|_MSC_VER)\b"
)

# How the bytes of a tensor or an array are reached.
TENSOR_INTERNALS = {
    "data_ptr",
    "untyped_storage",
    "storage_offset",
    "ctypes",
    "cuda_stream",
    "from_dlpack",
    "__dlpack__",
    "__dlpack_device__",
    "__array_interface__",
    "__cuda_array_interface__",
}

# The Python modules that may use those: of memory on CPU, and on GPUs.
LOOK_INSIDE = ("dpcomm/arrays.py", "dpcomm/cuda_arrays.py")

COMMENT_OR_STRING = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', re.DOTALL)
INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*(<([^>]+)>|"([^"]+)")', re.MULTILINE)


def includes(path: Path, csrc: Path) -> Iterator[tuple[bool, str]]:
    """Yields (is ours, name) per include; the name of one of our files is its path from csrc."""
    for match in INCLUDE.finditer(path.read_text()):
        system, quoted = match.group(2), match.group(3)
        if system is not None:
            yield False, system
            continue
        here, top = (path.parent / quoted).resolve(), (csrc / quoted).resolve()
        found = here if here.exists() else top
        ours = found.exists() and found.is_relative_to(csrc)
        yield ours, found.relative_to(csrc).as_posix() if ours else quoted


def core_violations(path: Path, csrc: Path) -> Iterator[str]:
    """The rules of csrc/core."""
    portable = path.name == "portable.h"
    allowed = PORTABLE_SYSTEM if portable else CORE_SYSTEM
    for ours, name in includes(path, csrc):
        if not (name.startswith("core/") if ours else name in allowed):
            yield f"core includes {name}"
    code = COMMENT_OR_STRING.sub(" ", path.read_text())
    for word in sorted({match.group(1) for match in CORE_NEVER.finditer(code)}):
        yield f"core uses {word}"
    if not portable:
        for macro in sorted({match.group(1) for match in COMPILER_MACRO.finditer(code)}):
            yield f"core asks for {macro} outside portable.h"


def layer_violations(path: Path, csrc: Path, layer: str) -> Iterator[str]:
    """The rules of csrc/host, csrc/carried, csrc/cpu, csrc/gpu, csrc/cuda and csrc/nccl."""
    for ours, name in includes(path, csrc):
        if ours and not name.startswith((f"{layer}/", *MAY[layer])):
            yield f"{layer} includes {name}"
        if not ours and layer in FOREIGN and FOREIGN[layer].search(name):
            yield f"{layer} includes {name}"


def native_violations(root: Path) -> Iterator[str]:
    """Every broken rule of csrc, as "file: rule"."""
    csrc = (root / "csrc").resolve()
    for path in sorted(p for p in csrc.rglob("*") if p.suffix in {".h", ".cuh", ".cpp", ".cu"}):
        where = path.relative_to(csrc)
        layer = where.parts[0]
        if layer == "core":
            yield from (f"{where}: {what}" for what in core_violations(path, csrc))
        elif layer in MAY:
            yield from (f"{where}: {what}" for what in layer_violations(path, csrc, layer))
        for ours, name in includes(path, csrc):
            if PYTHON.search(name) and not (where.as_posix() in BINDINGS and name.startswith("pybind11/")):
                yield f"{where}: includes {name}"
            if ours and name in BINDINGS and where.as_posix() not in BINDINGS:
                yield f"{where}: includes {name}"


def python_violations(root: Path) -> Iterator[str]:
    """Every use of a tensor's internals outside of the modules that may, as "file:line: name"."""
    for path in sorted((root / "dpcomm").rglob("*.py")):
        if path.relative_to(root).as_posix() in LOOK_INSIDE:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            used = None
            if isinstance(node, ast.Attribute):
                used = node.attr
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):  # getattr(x, "data_ptr")
                used = node.value
            elif isinstance(node, ast.ImportFrom):
                used = next((alias.name for alias in node.names if alias.name in TENSOR_INTERNALS), None)
            if used in TENSOR_INTERNALS:
                yield f"{path.relative_to(root)}:{getattr(node, 'lineno', 0)}: {used}"


def test_native_layers_are_kept() -> None:
    assert list(native_violations(ROOT)) == []


def test_python_layers_are_kept() -> None:
    assert list(python_violations(ROOT)) == []


def test_layers_are_really_read() -> None:
    """The rules above see the files they are about (an empty tree would pass)."""
    csrc = ROOT / "csrc"
    ours = {name for path in (csrc / "core").glob("*.h") for is_ours, name in includes(path, csrc.resolve()) if is_ours}
    assert "core/portable.h" in ours
    assert (True, "core/steps.h") in set(includes(csrc / "carried" / "schedule.h", csrc.resolve()))
    assert ("pybind11/pybind11.h") in {name for _, name in includes(csrc / "bindings.cpp", csrc.resolve())}
    for name, word in zip(LOOK_INSIDE, ("data_ptr", "__cuda_array_interface__"), strict=True):
        assert word in (ROOT / name).read_text()


PLANTED = [
    ("csrc/core/tile.h", '#include "../engine.h"', "core/tile.h: core includes engine.h"),
    ("csrc/core/tile.h", '#include "../cpu/wait.h"', "core/tile.h: core includes cpu/wait.h"),
    ("csrc/core/tile.h", "#include <vector>", "core/tile.h: core includes vector"),
    ("csrc/core/tile.h", "#include <immintrin.h>", "core/tile.h: core includes immintrin.h"),
    ("csrc/core/tile.h", '#include "missing.h"', "core/tile.h: core includes missing.h"),
    ("csrc/core/portable.h", "#include <atomic>", "core/portable.h: core includes atomic"),
    ("csrc/core/tile.h", "int* p = new int;", "core/tile.h: core uses new"),
    ("csrc/core/tile.h", "void f() { throw 1; }", "core/tile.h: core uses throw"),
    ("csrc/core/tile.h", 'void f() { printf("x"); }', "core/tile.h: core uses printf"),
    ("csrc/core/tile.h", "#ifdef __CUDA_ARCH__\n#endif", "core/tile.h: core asks for __CUDA_ARCH__ outside portable.h"),
    ("csrc/host/arena.h", '#include "../cpu/wait.h"', "host/arena.h: host includes cpu/wait.h"),
    ("csrc/host/arena.h", "#include <cuda_runtime.h>", "host/arena.h: host includes cuda_runtime.h"),
    ("csrc/host/arena.h", '#include "carried/schedule.h"', "host/arena.h: host includes carried/schedule.h"),
    ("csrc/carried/schedule.h", '#include "../error.h"', "carried/schedule.h: carried includes error.h"),
    ("csrc/carried/schedule.h", '#include "../engine.h"', "carried/schedule.h: carried includes engine.h"),
    ("csrc/carried/schedule.h", '#include "host/arena.h"', "carried/schedule.h: carried includes host/arena.h"),
    ("csrc/carried/schedule.h", '#include "../cpu/wait.h"', "carried/schedule.h: carried includes cpu/wait.h"),
    ("csrc/carried/schedule.h", "#include <gloo/context.h>", "carried/schedule.h: carried includes gloo/context.h"),
    ("csrc/carried/schedule.h", "#include <sys/socket.h>", "carried/schedule.h: carried includes sys/socket.h"),
    ("csrc/carried/schedule.h", "#include <cuda_runtime.h>", "carried/schedule.h: carried includes cuda_runtime.h"),
    ("csrc/core/tile.h", '#include "../carried/schedule.h"', "core/tile.h: core includes carried/schedule.h"),
    ("csrc/cpu/wait.h", '#include "../queue.h"', "cpu/wait.h: cpu includes queue.h"),
    ("csrc/cpu/wait.h", '#include "cuda/lanes.cuh"', "cpu/wait.h: cpu includes cuda/lanes.cuh"),
    ("csrc/cpu/wait.h", "#include <cuda_runtime.h>", "cpu/wait.h: cpu includes cuda_runtime.h"),
    ("csrc/cuda/lanes.cuh", '#include "../cpu/wait.h"', "cuda/lanes.cuh: cuda includes cpu/wait.h"),
    ("csrc/gpu/events.h", '#include "../cuda/lanes.cuh"', "gpu/events.h: gpu includes cuda/lanes.cuh"),
    ("csrc/gpu/events.h", "#include <nccl.h>", "gpu/events.h: gpu includes nccl.h"),
    ("csrc/cuda/lanes.cuh", "#include <nccl.h>", "cuda/lanes.cuh: cuda includes nccl.h"),
    ("csrc/nccl/engine.cpp", '#include "../cuda/lanes.cuh"', "nccl/engine.cpp: nccl includes cuda/lanes.cuh"),
    ("csrc/cpu/wait.h", "#include <Python.h>", "cpu/wait.h: includes Python.h"),
    ("csrc/cpu/wait.h", "#include <pybind11/pybind11.h>", "cpu/wait.h: includes pybind11/pybind11.h"),
    ("csrc/carried/schedule.h", "#include <torch/all.h>", "carried/schedule.h: includes torch/all.h"),
    ("csrc/bindings_carried.cpp", "#include <Python.h>", "bindings_carried.cpp: includes Python.h"),
    ("csrc/cpu/wait.h", '#include "../bindings.h"', "cpu/wait.h: includes bindings.h"),
    ("csrc/queue.h", "#  include <pybind11/gil.h>", "queue.h: includes pybind11/gil.h"),
    ("csrc/bindings.cpp", "#include <torch/extension.h>", "bindings.cpp: includes torch/extension.h"),
    ("dpcomm/hook.py", "def f(x):\n    return x.data_ptr()", "dpcomm/hook.py:2: data_ptr"),
    ("dpcomm/hook.py", "p = x.untyped_storage()", "dpcomm/hook.py:1: untyped_storage"),
    ("dpcomm/hook.py", 'p = getattr(x, "__dlpack__")', "dpcomm/hook.py:1: __dlpack__"),
    ("dpcomm/hook.py", "from torch.utils.dlpack import from_dlpack", "dpcomm/hook.py:1: from_dlpack"),
    ("dpcomm/cuda_calls.py", "s = stream.cuda_stream", "dpcomm/cuda_calls.py:1: cuda_stream"),
    ("dpcomm/nested/cuda_arrays.py", "p = x.data_ptr()", "dpcomm/nested/cuda_arrays.py:1: data_ptr"),
]
CLEAN = {
    "csrc/core/portable.h": "#include <immintrin.h>\n#ifdef __CUDACC__\n#endif\n",
    "csrc/core/tile.h": '#include "portable.h"\n#include <cmath>\n// never new, throw or printf; __AVX2__ neither\n',
    "csrc/host/arena.h": '#include "../core/tile.h"\n#include "../error.h"\n',
    "csrc/carried/schedule.h": '#include "../core/tile.h"\n#include <vector>\n',
    "csrc/cpu/wait.h": '#include "../core/tile.h"\n#include "core/portable.h"\n#include <atomic>\n',
    "csrc/cpu/carried_engine.h": '#include "../carried/schedule.h"\n#include "../host/arena.h"\n',
    "csrc/cuda/lanes.cuh": '#include "../core/tile.h"\n#include <cuda_runtime.h>\n',
    "csrc/gpu/events.h": '#include "../error.h"\n#include <cuda_runtime_api.h>\n',
    "csrc/nccl/engine.cpp": '#include "engine.h"\n#include "../gpu/events.h"\n#include <nccl.h>\n',
    "csrc/engine.h": '#include "error.h"\n',
    "csrc/error.h": "#include <string>\n",
    "csrc/queue.h": '#include "engine.h"\n',
    "csrc/bindings.h": "#include <pybind11/pybind11.h>\n",
    "csrc/bindings.cpp": '#include "bindings.h"\n#include "cpu/wait.h"\n',
    "csrc/bindings_carried.cpp": '#include "bindings.h"\n#include "cpu/carried_engine.h"\n',
    "dpcomm/arrays.py": "address = x.data_ptr()\n",
    "dpcomm/cuda_arrays.py": "stream = torch.cuda.current_stream().cuda_stream\n",
    "dpcomm/hook.py": "# data_ptr is for arrays.py\nbuffer.storage = None\n",
}


def lay_tree(root: Path) -> None:
    for name, text in CLEAN.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_clean_tree_has_no_violation(tmp_path: Path) -> None:
    lay_tree(tmp_path)
    assert [*native_violations(tmp_path), *python_violations(tmp_path)] == []


@pytest.mark.parametrize(("name", "line", "expected"), PLANTED, ids=[case[2] for case in PLANTED])
def test_planted_violation_is_found(tmp_path: Path, name: str, line: str, expected: str) -> None:
    lay_tree(tmp_path)
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    old = "" if name.endswith(".py") else (tmp_path / name).read_text()
    (tmp_path / name).write_text(f"{old}{line}\n")
    assert expected in [*native_violations(tmp_path), *python_violations(tmp_path)]
