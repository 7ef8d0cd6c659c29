"""Both builds of the extension, with and without CUDA: each imports without a GPU and links nothing it must not.

The installed extension serves for one of the two; the other is built by setup.py in a copy of the sources.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
BUILD_DEADLINE_S = 280

FORBIDDEN = re.compile(r"libtorch|libc10|libcudart|libcuda\.so|libnccl|libpython")
SONAMES = ("libtorch.so", "libc10.so", "libcudart.so.13", "libcuda.so.1", "libnccl.so.2")


class Facts(NamedTuple):
    """What a process of its own, in which no GPU is visible, reads from the extension."""

    version: str
    cuda_built: bool
    cuda_version: str


def find_nvcc() -> str | None:
    """The compiler csrc/CMakeLists.txt would find."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    path = os.pathsep.join([*(f"{home}/bin" for home in homes), os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
    return shutil.which("nvcc", path=path)


def run(command: list[str], cwd: Path, **environment: str) -> str:
    """Runs a command to its end and returns its output, which a failure shows."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=BUILD_DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, f"{command} exited with {done.returncode}:\n{done.stdout[-6000:]}"
    return done.stdout


def read_facts(extension: Path) -> Facts:
    """Imports the extension by itself: it needs neither torch nor the Python half of dpcomm."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import _native as n; "
        "assert n.__file__.startswith(sys.argv[1]) and 'torch' not in sys.modules; "
        "print(n.version, int(n.cuda_built), n.cuda_version)"
    )
    out = run([sys.executable, "-I", "-c", code, str(extension.parent)], extension.parent, CUDA_VISIBLE_DEVICES="")
    words = out.split()
    return Facts(words[0], words[1] == "1", words[2] if len(words) > 2 else "")


def installed_extension() -> Path | None:
    """The extension of the environment the tests run in; found without importing dpcomm."""
    package = importlib.util.find_spec("dpcomm")
    folders = package.submodule_search_locations or [] if package else []
    found = [path for folder in folders for path in Path(folder).glob("_native.*.so")]
    abi = f"cpython-{sys.version_info.major}{sys.version_info.minor}"
    return next((path for path in found if abi in path.name), None)


def build(folder: Path, cuda: str) -> Path:
    """Runs setup.py in a copy of the sources, as a fresh clone would.

    Without optimisation: what is asked here, importing and linking, does not depend on it, and time does.
    """
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    (folder / "dpcomm").mkdir()
    shutil.copy(ROOT / "dpcomm" / "__init__.py", folder / "dpcomm")
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    run(command, folder, DPCOMM_CUDA=cuda, CMAKE_ARGS="-DCMAKE_BUILD_TYPE=Debug")
    (extension,) = (folder / "dpcomm").glob("_native.*.so")
    return extension


@pytest.fixture(scope="module", params=["OFF", "ON"])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The extension without and with CUDA."""
    cuda: str = request.param
    if cuda == "ON" and find_nvcc() is None:
        pytest.skip("no nvcc: the build with CUDA cannot be made here")
    installed = installed_extension()
    if installed is not None and read_facts(installed).cuda_built == (cuda == "ON"):
        return cuda, installed
    return cuda, build(tmp_path_factory.mktemp(f"cuda-{cuda}"), cuda)


@pytest.mark.timeout(BUILD_DEADLINE_S + 20)
def test_extension_imports_without_gpu(built: tuple[str, Path]) -> None:
    cuda, extension = built
    facts = read_facts(extension)
    assert facts.cuda_built == (cuda == "ON")
    assert bool(re.fullmatch(r"\d+\.\d+", facts.cuda_version)) == (cuda == "ON")
    declared = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert declared is not None
    assert facts.version == declared.group(1)


@pytest.mark.timeout(BUILD_DEADLINE_S + 20)
def test_extension_links_only_the_system(built: tuple[str, Path]) -> None:
    _, extension = built
    assert FORBIDDEN.findall(run(["ldd", str(extension)], ROOT)) == []
    needed = re.findall(r"Shared library: \[(.+)\]", run(["readelf", "--dynamic", str(extension)], ROOT))
    assert any(name.startswith("libc.so") for name in needed), "readelf's output was not understood"
    assert [name for name in needed if FORBIDDEN.search(name)] == []


@pytest.mark.timeout(BUILD_DEADLINE_S + 20)
def test_extension_exports_nothing_of_the_cuda_runtime(built: tuple[str, Path]) -> None:
    """An exported cudaMalloc could answer for the one of torch's libcudart."""
    symbols = run(["nm", "--dynamic", "--defined-only", str(built[1])], ROOT)
    assert "PyInit__native" in symbols
    assert re.findall(r"\b(?:cuda|cu|nccl)[A-Z]\w*|\b_ZN6dpcomm\w*", symbols) == []


@pytest.mark.parametrize("soname", SONAMES)
def test_forbidden_library_would_be_found(tmp_path: Path, soname: str) -> None:
    """Negative control: a library that does link the forbidden one is recognised by the same reading."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    assert compiler is not None
    (tmp_path / "f.cpp").write_text("int f() { return 0; }\n")
    run([compiler, "-shared", "-fPIC", f"-Wl,-soname,{soname}", "-o", soname, "f.cpp"], tmp_path)
    run([compiler, "-shared", "-fPIC", "-Wl,--no-as-needed", "-o", "user.so", "f.cpp", f"./{soname}"], tmp_path)
    assert FORBIDDEN.search(run(["readelf", "--dynamic", "user.so"], tmp_path))


def test_bad_cuda_setting_is_refused(tmp_path: Path) -> None:
    """DPCOMM_CUDA is parsed strictly: a typo does not quietly leave CUDA out."""
    with pytest.raises(AssertionError, match="expected AUTO, ON or OFF"):
        build(tmp_path, "yes")
