"""Finding NCCL: which copy serves the process, what is refused and why, and what info() says of it.

Most cases run in a process of their own, where dpcomm's parts are imported without torch: a CUDA build of torch loads
an NCCL. tests/test_nccl_api.py compares our declarations with the real library's.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import textwrap
import types
from pathlib import Path

import pytest
from cpp_build import call
from nccl_copies import DEADLINE_S, FUNCTIONS, LIBRARY, answers, named, needs_wheel, no_library, wheel_version

import dpcomm
from dpcomm import environment, nccl_library

# A torch that only says which NCCL it has.
TORCH = """
by_torch = json.loads(arguments[0])
def version():
    if by_torch:
        return tuple(by_torch)
    raise AttributeError("_nccl_version")
torch = types.ModuleType("torch")
torch.cuda = types.SimpleNamespace(nccl=types.SimpleNamespace(version=version))
sys.modules["torch"] = torch
from dpcomm import nccl_library
"""


@pytest.fixture
def first(tmp_path: Path) -> Path:
    return named(tmp_path / "first", version=22001)


@pytest.fixture
def second(tmp_path: Path) -> Path:
    return named(tmp_path / "second", version=22002)


# ---- which copy ----


@needs_wheel
def test_the_wheel_is_found_and_says_its_version() -> None:
    script = """
        said = find("", *arguments)
        ids = [_native.nccl_unique_id() for _ in range(2)]
        say([said, [len(one) for one in ids], ids[0] != ids[1]])
    """
    said, sizes, differ = answers(textwrap.dedent(script), LIBRARY)
    assert said == [wheel_version(), str(LIBRARY), "wheel"]
    assert sizes == [128, 128]
    assert differ


def test_an_id_before_a_library_is_an_internal_error() -> None:
    code, text = answers("say(answer(_native.nccl_unique_id))")
    assert code == "INTERNAL"
    assert "after find_nccl()" in text


def test_what_is_loaded_wins_over_wheels_and_the_system(first: Path, second: Path) -> None:
    script = "ctypes.CDLL(arguments[0]); say(find('', arguments[1]))"
    assert answers(script, first, second, LD_LIBRARY_PATH=second.parent) == ["2.20.1", str(first), "loaded already"]


def test_a_wheel_wins_over_the_system_and_the_first_wheel_that_loads(first: Path, second: Path, tmp_path: Path) -> None:
    broken, absent = no_library(tmp_path / "broken"), tmp_path / "absent"
    script = "say(find('', '', *arguments))"
    assert answers(script, broken, absent, first, second, LD_LIBRARY_PATH=second.parent) == [
        "2.20.1",
        str(first),
        "wheel",
    ]


def test_the_system_is_asked_last(first: Path) -> None:
    assert answers("say(find(''))", LD_LIBRARY_PATH=first.parent) == ["2.20.1", str(first), "system"]


def test_what_is_asked_for_wins_over_wheels(first: Path, second: Path) -> None:
    said = answers("say(find(*arguments))", first, second, LD_LIBRARY_PATH=second.parent)
    assert said == ["2.20.1", str(first), "DPCOMM_NCCL_LIBRARY"]


def test_another_copy_than_the_loaded_one_is_refused(first: Path, second: Path) -> None:
    code, text = answers("ctypes.CDLL(arguments[0]); say(find(arguments[1]))", first, second)
    assert code == "VERSION"
    for part in ("two different copies", f"DPCOMM_NCCL_LIBRARY={second}", f"has loaded {first}"):
        assert part in text


def test_another_name_of_the_loaded_file_is_no_other_copy(first: Path, tmp_path: Path) -> None:
    symbolic, hard = tmp_path / "symbolic.so", tmp_path / "hard.so"
    symbolic.symlink_to(first)
    hard.hardlink_to(first)
    for name in (symbolic, hard):
        said = answers("ctypes.CDLL(arguments[0]); say(find(arguments[1]))", first, name)
        assert said == ["2.20.1", str(first), "DPCOMM_NCCL_LIBRARY"]


def test_a_copied_file_is_another_copy(first: Path, tmp_path: Path) -> None:
    """The negative control of the test above: equal bytes, another inode."""
    copied = tmp_path / "copied.so"
    copied.write_bytes(first.read_bytes())
    code, text = answers("ctypes.CDLL(arguments[0]); say(find(arguments[1]))", first, copied)
    assert (code, "two different copies" in text) == ("VERSION", True)


def test_a_success_is_for_the_process_and_a_failure_is_not(first: Path, second: Path, tmp_path: Path) -> None:
    broken = no_library(tmp_path / "broken")
    script = """
        broken, first, second = arguments
        say([find("", broken), find("", first), find("", second), find(first), find(second)])
    """
    failed, *found, refused = answers(textwrap.dedent(script), broken, first, second, LD_LIBRARY_PATH=broken.parent)
    assert failed[0] == "VERSION"
    assert found == [["2.20.1", str(first), "wheel"]] * 3
    assert refused[0] == "VERSION"
    assert "two different copies" in refused[1]


def test_threads_that_look_at_once_find_one_copy(first: Path, second: Path) -> None:
    script = """
        said, barrier = [], threading.Barrier(8)
        def look(wheel):
            barrier.wait(10)
            said.append(find("", wheel))
        threads = [threading.Thread(target=look, args=(arguments[i % 2],), daemon=True) for i in range(8)]
        for thread in threads: thread.start()
        for thread in threads: thread.join(20)
        say(said)
    """
    said = answers(textwrap.dedent(script), first, second)
    assert len(said) == 8
    assert said == [said[0]] * 8
    assert said[0][2] == "wheel"


# ---- what is refused ----


def test_nothing_found_says_what_was_tried_and_what_to_do(tmp_path: Path) -> None:
    broken = no_library(tmp_path / "broken")
    for wheels, tried in (
        ([], "wheel: none is installed"),
        ([tmp_path / "absent.so"], "absent.so: cannot open shared"),
    ):
        code, text = answers("say(find('', *arguments))", *wheels, LD_LIBRARY_PATH=broken.parent)
        assert code == "VERSION"
        for part in ("no NCCL was found", "none is loaded", tried, f"system: {broken}", "Install dpcomm[nccl-cu13]"):
            assert part in text


def test_an_asked_file_that_is_missing_or_no_library_is_refused(first: Path, tmp_path: Path) -> None:
    """Whether or not a copy is loaded already."""
    absent, broken = tmp_path / "absent.so", no_library(tmp_path / "broken")
    for before in ("", "ctypes.CDLL(arguments[1]); "):
        code, text = answers(before + "say(find(arguments[0]))", absent, first)
        assert (code, text.startswith(f"[dpcomm:VERSION] DPCOMM_NCCL_LIBRARY={absent}: ")) == ("VERSION", True)
        assert "No such file" in text
    code, text = answers("say(find(arguments[0], arguments[1]))", broken, first)
    assert (code, f"DPCOMM_NCCL_LIBRARY={broken}: " in text) == ("VERSION", True)


def test_a_library_that_is_not_nccl_is_refused(tmp_path: Path) -> None:
    other = named(tmp_path, "-DncclGetVersion=other")
    code, text = answers("say(find(arguments[0]))", other)
    assert code == "VERSION"
    assert f"not NCCL ({other}, DPCOMM_NCCL_LIBRARY): it has no ncclGetVersion" in text


def test_a_library_that_fails_to_say_its_version_is_refused(tmp_path: Path) -> None:
    code, text = answers("say(find('', arguments[0]))", named(tmp_path, version=-1))
    assert (code, "does not say its version" in text) == ("VERSION", True)


@pytest.mark.parametrize(("version", "name"), [(21403, "2.14.3"), (2804, "2.8.4"), (21799, "2.17.99")])
def test_a_version_below_the_least_is_refused(tmp_path: Path, version: int, name: str) -> None:
    library = named(tmp_path, "-DncclCommInitRankConfig=other", version=version)
    code, text = answers("say(find('', arguments[0]))", library)
    assert code == "VERSION"
    assert f"NCCL {name} ({library}, wheel) < 2.18.0" in text
    assert "Install dpcomm[nccl-cu13]" in text


def test_the_least_version_is_accepted(tmp_path: Path) -> None:
    library = named(tmp_path, version=21800)
    script = "say([_native.NCCL_LEAST_VERSION, *find('', arguments[0])])"
    assert answers(script, library) == ["2.18.0", "2.18.0", str(library), "wheel"]


@pytest.mark.parametrize("function", [name for name in FUNCTIONS if name != "GetVersion"])
def test_a_missing_function_is_named(tmp_path: Path, function: str) -> None:
    library = named(tmp_path, f"-Dnccl{function}=other")
    code, text = answers("say(find('', arguments[0]))", library)
    assert code == "VERSION"
    assert f"NCCL 2.20.0 ({library}, wheel) lacks nccl{function}. Install" in text


# ---- the Python half ----


@pytest.mark.parametrize(
    ("by_torch", "ends"),
    [
        ([2, 27, 3], "torch reports 2.27.3: two NCCL installations?"),
        ([2, 14, 3], "to the path of a libnccl.so.2."),
        ([], "to the path of a libnccl.so.2."),
    ],
    ids=["another", "the-same", "none"],
)
def test_a_refusal_says_what_torch_reports(tmp_path: Path, by_torch: list[int], ends: str) -> None:
    library = named(tmp_path, version=21403)
    script = TORCH + "say([*answer(nccl_library.find), nccl_library.reason()])"
    code, text, reason = answers(script, by_torch, DPCOMM_NCCL_LIBRARY=library)
    assert code == "VERSION"
    assert text.startswith(f"[dpcomm:VERSION] NCCL 2.14.3 ({library}, DPCOMM_NCCL_LIBRARY) < 2.18.0, ")
    assert text.endswith(ends)
    assert text == f"[dpcomm:VERSION] {reason}"


def test_nothing_found_does_not_blame_torch(tmp_path: Path) -> None:
    broken = no_library(tmp_path / "broken")
    script = TORCH + "nccl_library.wheel_paths = list; say(answer(nccl_library.find))"
    code, text = answers(script, [2, 27, 3], LD_LIBRARY_PATH=broken.parent)
    assert (code, "no NCCL was found" in text, "torch reports" in text) == ("VERSION", True, False)


def test_what_is_found_is_a_named_tuple(first: Path) -> None:
    script = TORCH + "say([nccl_library.find()._asdict(), nccl_library.reason()])"
    said, reason = answers(script, [2, 27, 3], DPCOMM_NCCL_LIBRARY=first)
    assert said == {"version": "2.20.1", "path": str(first), "how": "DPCOMM_NCCL_LIBRARY"}
    assert reason == ""


def test_wheels_are_looked_for_in_every_folder_of_the_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    paths = []
    for name in ("one", "two"):
        library = tmp_path / name / "nvidia" / "nccl" / "lib" / "libnccl.so.2"
        library.parent.mkdir(parents=True)
        library.write_text("")
        paths.append(str(library))
    (tmp_path / "three" / "nvidia" / "nccl").mkdir(parents=True)  # a wheel without the library
    for name in ("three", "two", "one"):
        monkeypatch.syspath_prepend(str(tmp_path / name))
    assert nccl_library.wheel_paths()[:2] == paths


def test_no_wheel_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia", types.ModuleType("nvidia"))  # no package
    assert nccl_library.wheel_paths() == []
    monkeypatch.setitem(sys.modules, "nvidia", None)  # not importable
    assert nccl_library.wheel_paths() == []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert nccl_library.wheel_paths() == []


@pytest.mark.parametrize("value", ["", "no/such/libnccl.so.2", "/"])
def test_a_bad_variable_is_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("DPCOMM_NCCL_LIBRARY", value)
    text = f"DPCOMM_NCCL_LIBRARY={value!r}: expected the path of a libnccl.so.2"
    with pytest.raises(dpcomm.ArgumentError, match=text):
        dpcomm.init_local(["cpu"])
    assert dpcomm.info()["nccl"] == {"reason": text}


def test_a_relative_path_is_made_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """dlopen() would look for a bare name in the system's folders."""
    no_library(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DPCOMM_NCCL_LIBRARY", "libnccl.so.2")
    assert environment.read().nccl_library == str(tmp_path / "libnccl.so.2")


def test_info_and_the_command_line_say_which_nccl(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In processes of their own, with this machine's NCCL or none."""
    monkeypatch.delenv("DPCOMM_NCCL_LIBRARY", raising=False)
    command = [sys.executable, "-m", "dpcomm", "info"]
    facts = json.loads(call([*command, "--json"], DEADLINE_S).stdout)["nccl"]
    if "reason" not in facts:
        assert set(facts) == {"version", "path", "how", "least_version"}
        assert facts["least_version"] == "2.18.0"
        assert Path(facts["path"]).is_file()
        assert facts["how"] in ("loaded already", "wheel", "system")
    line = f"NCCL: {facts['reason']}" if "reason" in facts else f"NCCL: {facts['version']}, {facts['how']}: "
    assert line in call(command, DEADLINE_S).stdout
    assert LIBRARY is None or "reason" not in facts


@pytest.mark.skipif(nccl_library.torch_version() != "", reason="this torch has loaded an NCCL of its own")
def test_the_command_line_gives_the_reason_where_there_is_none(tmp_path: Path) -> None:
    library = named(tmp_path, version=21403)
    done = call(["env", f"DPCOMM_NCCL_LIBRARY={library}", sys.executable, "-m", "dpcomm", "info"], DEADLINE_S)
    assert done.returncode == 0
    assert f"NCCL: NCCL 2.14.3 ({library}, DPCOMM_NCCL_LIBRARY) < 2.18.0" in done.stdout
