"""The C++ tests (tests/cpp): plain, under ThreadSanitizer, and under AddressSanitizer with UBSan.

ThreadSanitizer sees one process only, so ranks are threads there; tests of the extension play them as processes.
"""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future

import cpp_build
import pytest
from test_build import find_nvcc
from under_way import asked_for, under_way

# The first test waits for the compiler: about eight minutes on two idle cores, more on busy ones.
pytestmark = pytest.mark.timeout(3000)

DEADLINE_S = 260  # each program ends itself earlier
ISAS = ["portable", "avx2", "avx512"] if platform.machine().lower() in ("x86_64", "amd64") else ["portable"]
# Kind -> program -> arguments. Sanitizers are slow: they play some calls only, and do not try all 2^32 floats.
PROGRAMS: dict[str, dict[str, list[str]]] = {
    "plain": {
        **{f"test_portable_{isa}": [] for isa in ISAS},
        "test_core": [],
        "test_shm": [],
        "test_os": [],
        "test_control_plane": [],
        "test_call_ledger": [],
        "test_carried": [],
        "test_carried_faults": [],
        "test_two_level": [],
        "test_queue": [],
        "test_stores": [],
    },
    "tsan": {
        "test_core": ["3", "2"],
        "test_shm": [],
        "test_os": [],
        "test_control_plane": [],
        "test_call_ledger": [],
        "test_carried": ["4"],
        "test_carried_faults": [],
        "test_two_level": ["6"],
        "test_queue": [],
    },
    "asan": {
        "test_portable_portable": ["251"],
        "test_core": ["0", "2"],
        "test_shm": [],
        "test_os": [],
        "test_control_plane": [],
        "test_call_ledger": [],
        "test_carried": ["4"],
        "test_carried_faults": [],
        "test_two_level": ["6"],
        "test_queue": [],
        "test_stores": [],
    },
}
# Engines p2p and nccl on the stand-in CUDA runtime, which needs CUDA's headers. Address checks of processes that are
# killed, and of a runtime that reserves address space, say nothing.
STAND_IN: dict[str, dict[str, list[str]]] = {
    "plain": {
        "test_stand_in": [],
        "test_stand_in_nccl": [],
        "test_nccl": [],
        "test_nccl_two_level": [],
        "test_nccl_faults": [],
        "test_p2p": [],
        "test_p2p_faults": [],
        "test_p2p_processes": [],
    },
    "tsan": {
        "test_stand_in_nccl": [],
        "test_nccl": ["4"],
        "test_nccl_two_level": ["6"],
        "test_nccl_faults": [],
        "test_p2p": ["4"],
        "test_p2p_faults": [],
    },
    "asan": {
        "test_stand_in_nccl": [],
        "test_nccl": ["4"],
        "test_nccl_two_level": ["6"],
        "test_nccl_faults": [],
        "test_p2p": ["4"],
        "test_p2p_faults": [],
    },
}
if find_nvcc() is not None:
    PROGRAMS = {kind: {**programs, **STAND_IN[kind]} for kind, programs in PROGRAMS.items()}


Program = tuple[str, str]  # kind, name
Outcomes = dict[Program, "Future[subprocess.CompletedProcess[str]]"]


def ids(program: Program) -> str:
    return "-".join(program)


ALL = [(kind, name) for kind, programs in PROGRAMS.items() for name in programs]


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Iterator[Outcomes]:
    wanted = [p for p in asked_for(request, ALL, ids) if not cpp_build.why_no(p[0])]
    folders = {kind: cpp_build.build(kind, tuple(PROGRAMS[kind])) for kind in dict.fromkeys(kind for kind, _ in wanted)}

    def run(program: Program) -> subprocess.CompletedProcess[str]:
        kind, name = program
        return cpp_build.call([str(folders[kind] / name), *PROGRAMS[kind][name]], DEADLINE_S)

    with under_way(run, wanted) as outcomes:
        yield outcomes


@pytest.mark.parametrize("program", ALL, ids=ids)
def test_program_passes(program: Program, outcomes: Outcomes) -> None:
    if program not in outcomes:
        pytest.skip(cpp_build.why_no(program[0]))
    done = outcomes[program].result()
    if done.returncode == cpp_build.SKIPPED:
        pytest.skip(f"this processor lacks the instructions of {program[1]}")
    assert done.returncode == 0, f"status {done.returncode}\n{done.stdout[-8000:]}"
    assert " passed, 0 failed" in done.stdout


RACE = """
#include <thread>
int main() {
  int x = 0;
  std::thread other([&x] { x = 1; });
  x = 2;
  other.join();
  return x == 3;
}
"""
OVERRUN = """
#include <vector>
int main(int argc, char**) {
  std::vector<int> v(4);
  return v.data()[argc + 3];
}
"""


@pytest.mark.parametrize(("kind", "source"), [("tsan", RACE), ("asan", OVERRUN)], ids=["tsan", "asan"])
def test_sanitizer_sees_a_planted_bug(kind: str, source: str) -> None:
    """The negative control: a sanitizer that is silently off would pass everything."""
    if cpp_build.why_no(kind):
        pytest.skip(cpp_build.why_no(kind))
    path = cpp_build.FOLDER / f"planted_{kind}.cpp"
    path.write_text(source)
    program = str(path.with_suffix(""))
    cpp_build.must([cpp_build.COMPILER, *cpp_build.KINDS[kind].split(), "-pthread", str(path), "-o", program], 120)
    done = cpp_build.call([program], 60)
    assert done.returncode != 0
    assert "Sanitizer" in done.stdout
