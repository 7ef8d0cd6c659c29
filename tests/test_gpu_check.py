"""benchmarks/gpu_check.py where there is no GPU: refusal, shares of time, probes, crashes, table, JSON, exit status."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
from conftest import why_no_gpu

from dpcomm import _native

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu_check.py"
sys.path.append(str(SCRIPT.parent))
import gpu_check  # noqa: E402
import gpu_probe  # noqa: E402
import gpu_steps  # noqa: E402
import nccl_plan  # noqa: E402
from gpu_driver import Gpu  # noqa: E402
from gpu_steps import FAILED, NOT_RUN, OK, OUT_OF_TIME, REFUSED, Budget, Done, Result, Share  # noqa: E402

GPU = Gpu(name="Made Up 1000", driver="1.2.3", driver_cuda="13.0", capability="9.0", count=1)


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def make_check(tmp_path: Path, budget_s: float = 480.0, gpu: Gpu = GPU) -> gpu_check.Check:
    return gpu_check.Check(gpu, tmp_path / "out", tmp_path / "log", budget_s)


def step(outcome: str, share: Share | None = None, needs: tuple[str, ...] = ()) -> gpu_check.Step:
    return gpu_check.Step(lambda check, seconds: Result(outcome, data=seconds), share or Share(0.5, 0.1), needs)


# --- no GPU ----------------------------------------------------------------------------------------------------------


def test_without_a_gpu_it_stops_with_one_sentence() -> None:
    """CUDA_VISIBLE_DEVICES hides the devices of a machine that has some."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("gpu-check: there is no NVIDIA GPU to check on here (")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.timeout(180)
def test_gpu_tests_are_collected_and_skipped_where_there_is_no_gpu() -> None:
    """All of tests/gpu can be imported, carries the marker and says why it did not run."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu"]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    counts = []
    for marker in ("gpu", "not gpu"):
        done = subprocess.run(
            [*command, "-m", marker], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False
        )
        counts.append(done.stdout.splitlines()[-1])
        assert "error" not in counts[-1], done.stdout
    assert "passed" not in counts[0]
    assert int(counts[0].split()[0]) > 100
    assert "skipped" in counts[0]
    assert "skipped" not in counts[1]
    assert "passed" not in counts[1]


@pytest.mark.skipif(not _native.cuda_built, reason="the extension was built without CUDA")
def test_the_extension_agrees_with_the_driver() -> None:
    assert bool(_native.cuda_reason()) == bool(why_no_gpu())


# --- time ------------------------------------------------------------------------------------------------------------


def test_a_step_gets_its_share_and_leaves_later_ones_theirs() -> None:
    clock = Clock()
    budget = Budget(100.0, clock)
    later = [Share(0.5, 0.2), Share(0.5, 0.1)]
    assert budget.seconds(Share(0.4, 0.0), later) == pytest.approx(40)
    clock.now += 50
    assert budget.seconds(Share(0.4, 0.0), later) == pytest.approx(20)  # 50 are left, 30 are promised
    clock.now += 30
    assert budget.seconds(Share(0.4, 0.0), later) == 0
    assert budget.seconds(Share(0.4, 0.0), []) == pytest.approx(20)
    clock.now += 30
    assert budget.seconds(Share(0.4, 0.0), []) == 0
    assert budget.left_s() < 0


def test_shares_promise_no_more_than_there_is() -> None:
    assert sum(one.share.least for one in gpu_check.STEPS.values()) < 1
    assert all(0 < one.share.least <= one.share.most or one.share.least == 0 for one in gpu_check.STEPS.values())


def test_the_whole_check_ends_within_nine_and_a_half_minutes() -> None:
    """Machines are lent for ten. A command that does not end when it is told to takes its grace as well."""
    behind = gpu_steps.INTERRUPT_GRACE_S + gpu_check.DESCRIBE_S + gpu_steps.INTERRUPT_GRACE_S
    assert gpu_check.parse([]).budget_s + behind < 570


def test_a_command_that_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    code = f"import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); print('begun', flush=True); {child}"
    began = time.monotonic()
    done = gpu_steps.call([sys.executable, "-c", code], 3.0, tmp_path / "log")
    assert time.monotonic() - began < 3.0 + gpu_steps.INTERRUPT_GRACE_S + 10
    assert done.status is None
    assert done.outcome == OUT_OF_TIME
    assert done.output.startswith("begun\n")


def test_children_with_a_session_of_their_own_are_ended_too(tmp_path: Path) -> None:
    """torchrun's workers have one, and torchrun waits for them longer than there is time."""
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('begun', flush=True)"
    child = f"{deaf}; time.sleep(60)"
    start = (
        f"import os, subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {child!r}], start_new_session=True)"
    )
    done = gpu_steps.call([sys.executable, "-c", f"{start}; print(p.pid); {deaf}; p.wait()"], 3.0, tmp_path / "log")
    assert done.outcome == OUT_OF_TIME
    assert done.output.count("begun\n") == 2
    pid = next(int(line) for line in done.output.splitlines() if line.isdecimal())
    until = time.monotonic() + 10
    while is_alive(pid):
        assert time.monotonic() < until, "the child is still there"
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    """A zombie has ended: whoever takes over orphans may take its time."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def test_a_commands_output_and_status_are_kept(tmp_path: Path) -> None:
    code = "import os, sys; print(os.environ['WORD']); sys.exit(3)"
    gpu_steps.call([sys.executable, "-c", "print('before')"], 30.0, tmp_path / "log")
    done = gpu_steps.call([sys.executable, "-c", code], 30.0, tmp_path / "log", {"WORD": "seen"})
    assert (done.status, done.outcome, done.output) == (3, FAILED, "seen\n")
    assert (tmp_path / "log").read_text() == "before\nseen\n"


# --- steps -----------------------------------------------------------------------------------------------------------


def test_steps_run_in_order_and_a_failed_build_takes_others_along(tmp_path: Path) -> None:
    check = make_check(tmp_path)
    steps = {
        "probe": step(REFUSED),
        "build": step(FAILED),
        "tests": step(OK, needs=("build",)),
        "kernels": step(OK),
    }
    gpu_check.run_steps(check, [], steps)
    assert {name: r.outcome for name, r in check.results.items()} == {
        "probe": REFUSED,
        "build": FAILED,
        "tests": NOT_RUN,
        "kernels": OK,
    }
    assert check.results["tests"].remark == "needs build"
    assert gpu_check.exit_status(check.results) == 1


def test_one_step_alone_needs_no_other(tmp_path: Path) -> None:
    check = make_check(tmp_path)
    gpu_check.run_steps(check, ["tests"], {"build": step(FAILED), "tests": step(OK, needs=("build",))})
    assert {name: r.outcome for name, r in check.results.items()} == {"tests": OK}
    assert gpu_check.exit_status(check.results) == 0


def test_steps_behind_the_end_of_the_budget_are_named(tmp_path: Path) -> None:
    check = make_check(tmp_path, budget_s=0.05)

    def slow(check: gpu_check.Check, seconds: float) -> Result:
        time.sleep(0.1)
        return Result(OK)

    gpu_check.run_steps(check, [], {"slow": gpu_check.Step(slow, Share(1.0, 0.0)), "late": step(OK, Share(0.5, 0.0))})
    assert check.results["late"].outcome == OUT_OF_TIME
    assert check.results["late"].remark == "not begun"
    assert gpu_check.exit_status(check.results) == 1


def test_a_step_that_raises_has_failed_and_others_go_on(tmp_path: Path) -> None:
    def broken(check: gpu_check.Check, seconds: float) -> Result:
        raise KeyError("figures")

    check = make_check(tmp_path)
    gpu_check.run_steps(check, [], {"broken": gpu_check.Step(broken, Share(0.5, 0.1)), "next": step(OK)})
    assert check.results["broken"].outcome == FAILED
    assert "KeyError" in check.results["broken"].remark
    assert check.results["next"].outcome == OK


@pytest.mark.parametrize(
    ("outcomes", "status"),
    [((OK, OK), 0), ((OK, REFUSED), 0), ((OK, FAILED), 1), ((OUT_OF_TIME, OK), 1), ((OK, NOT_RUN), 1)],
    ids=lambda value: "-".join(value).replace(" ", "-") if isinstance(value, tuple) else None,
)
def test_exit_status(outcomes: tuple[str, ...], status: int) -> None:
    assert gpu_check.exit_status({str(i): Result(outcome) for i, outcome in enumerate(outcomes)}) == status


def with_call(check: gpu_check.Check, answer: Callable[[Sequence[str]], Done]) -> list[Sequence[str]]:
    """Lets a check's commands be answered; what was called is in the list."""
    called: list[Sequence[str]] = []

    def call(command: Sequence[str], seconds: float, env: Mapping[str, str] | None = None) -> Done:
        called.append(command)
        return answer(command)

    check.call = call  # type: ignore[method-assign]
    return called


def test_a_benchmarks_figures_are_embedded(tmp_path: Path) -> None:
    def write(command: Sequence[str]) -> Done:
        Path(command[-1]).write_text('{"rows": [1, 2]}')
        return Done(0, 1.0, "")

    check = make_check(tmp_path)
    called = with_call(check, write)
    result = gpu_check.allreduce(check, 30.0)
    assert (result.outcome, result.data) == (OK, {str(n): {"rows": [1, 2]} for n in gpu_check.RANKS})
    assert [command[command.index("--virtual-ranks") + 1] for command in called] == ["2", "4", "8"]
    assert gpu_check.kernels(check, 30.0).data == {"rows": [1, 2]}


@pytest.mark.parametrize(
    ("gpus", "before", "behind", "remark"),
    [
        (1, [], ["--virtual-ranks", "2"], "one GPU, virtual ranks: nothing crosses a link"),
        (4, ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"], [], "4 processes"),
    ],
    ids=["one-gpu", "four-gpus"],
)
def test_stock_nccl_is_compared_with_by_all_gpus(
    tmp_path: Path, gpus: int, before: list[str], behind: list[str], remark: str
) -> None:
    def write(command: Sequence[str]) -> Done:
        Path(command[-1]).write_text('{"rows": [3]}')
        return Done(0, 1.0, "")

    check = make_check(tmp_path, gpu=dataclasses.replace(GPU, count=gpus))
    called = with_call(check, write)
    assert gpu_check.beside_nccl(check, 30.0) == Result(OK, remark)
    (command,) = called
    at = command.index("benchmarks/nccl.py")
    assert list(command[:at]) == [sys.executable, *before]
    flags = nccl_plan.parse_arguments(command[at + 1 :])
    assert (flags.device, flags.check, str(flags.json)) == ("cuda", 1, command[-1])
    assert flags.sizes == [64 << 10, 2 << 20, 64 << 20]
    assert list(command[at + 1 + len(gpu_check.BESIDE_NCCL) : -2]) == behind


def test_figures_of_a_run_beside_nccl_that_ran_out_of_time_are_kept(tmp_path: Path) -> None:
    def write(command: Sequence[str]) -> Done:
        Path(command[-1]).write_text('{"rows": [3]}')
        return Done(None, 30.0, "")

    check = make_check(tmp_path)
    with_call(check, write)
    result = gpu_check.beside_nccl(check, 30.0)
    assert (result.outcome, result.data) == (OUT_OF_TIME, {"rows": [3]})
    assert result.remark == "one GPU, virtual ranks: nothing crosses a link; ended after 30 s"


@pytest.mark.parametrize(
    ("done", "outcome"),
    [(Done(0, 1.0, ""), FAILED), (Done(1, 1.0, "wrong bits"), FAILED), (Done(None, 9.0, ""), OUT_OF_TIME)],
    ids=["no-figures", "status-1", "deadline"],
)
def test_a_benchmark_without_figures_is_no_success(tmp_path: Path, done: Done, outcome: str) -> None:
    check = make_check(tmp_path)
    with_call(check, lambda command: done)
    assert gpu_check.kernels(check, 30.0).outcome == outcome
    assert gpu_check.allreduce(check, 30.0).outcome == outcome
    assert gpu_check.beside_nccl(check, 30.0).outcome == outcome


@pytest.mark.parametrize(
    ("done", "outcome"),
    [
        (Done(0, 1.0, "= ERROR SUMMARY: 0 errors\n1 passed in 9s"), OK),
        (Done(gpu_probe.SANITIZER_STATUS, 1.0, "Invalid __global__ write\n1 passed"), FAILED),
        (Done(0, 1.0, "1 skipped"), FAILED),
        (Done(1, 1.0, "1 failed"), FAILED),
        (Done(None, 9.0, ""), OUT_OF_TIME),
    ],
    ids=["clean", "errors", "none-ran", "test-failed", "deadline"],
)
def test_memcheck_is_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: Done, outcome: str) -> None:
    check = make_check(tmp_path)
    monkeypatch.setattr(gpu_probe, "find_tool", lambda name: f"/somewhere/{name}")
    called = with_call(check, lambda command: done)
    assert gpu_check.memcheck(check, 30.0).outcome == outcome
    assert called[0][0] == "/somewhere/compute-sanitizer"


def test_a_refused_sanitizer_is_no_failure(tmp_path: Path) -> None:
    check = make_check(tmp_path)
    check.refusals["sanitizer"] = "not installed"
    assert gpu_check.memcheck(check, 30.0) == Result(REFUSED, "not installed")


def test_what_memcheck_runs_exists() -> None:
    assert f"def {gpu_check.MEMCHECK_TESTS}(" in (ROOT / gpu_check.MEMCHECK_FILE).read_text()


def test_the_build_is_for_this_gpu_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDAARCHS", raising=False)
    seen: list[Mapping[str, str]] = []

    def call(command: Sequence[str], seconds: float, env: Mapping[str, str] | None = None) -> Done:
        seen.append(env or {})
        return Done(0, 1.0, "")

    check = make_check(tmp_path)
    check.call = call  # type: ignore[method-assign]
    assert gpu_check.build(check, 100.0).outcome == OK
    assert seen[0] == {"DPCOMM_CUDA": "ON", "CUDAARCHS": "90-real"}


# --- probes ----------------------------------------------------------------------------------------------------------


def test_probes_of_a_machine_without_a_driver_are_refusals() -> None:
    """Real processes, real answers; compute-sanitizer and ncu are asked for by name."""
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PATH": ""}
    for name in ("mode", "ipc", "cooperative", "memfd"):
        done = subprocess.run(
            [*gpu_probe.PYTHON, name], env=env, capture_output=True, text=True, timeout=30, check=False
        )
        answer = gpu_probe.read_answer(done.stdout, done.returncode)
        assert answer["allowed"] is False
        assert "libcuda" in answer["reason"] or "CUDA_ERROR" in answer["reason"], answer


def test_probes_are_reported_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = {
        "mode": Done(0, 0.1, '{"allowed": true, "reason": "no MPS"}\n'),
        "ipc": Done(1, 0.1, 'noise\n{"allowed": false, "reason": "cuIpcOpenMemHandle answers X"}\n'),
        "memfd": Done(-11, 0.1, "Segmentation fault\n"),
        "counters": Done(None, 25.0, ""),
    }
    check = make_check(tmp_path)
    with_call(check, lambda command: answers.get(command[-1], Done(0, 0.1, '{"allowed": true, "reason": ""}')))
    result = gpu_check.probe(check, 60.0)
    assert result.outcome == REFUSED
    assert check.refusals == {
        "ipc": "cuIpcOpenMemHandle answers X",
        "memfd": "the probe ended with status -11: Segmentation fault",
        "counters": "no answer within 25 s",
    }
    printed = capsys.readouterr().out
    assert "# environment refuses CUDA IPC between two processes: cuIpcOpenMemHandle answers X\n" in printed
    assert "# cooperative launch: allowed\n" in printed
    assert json.dumps(result.data)


def test_probes_behind_the_deadline_are_not_asked() -> None:
    def call(command: Sequence[str], seconds: float) -> Done:
        raise AssertionError("there is no time")

    probes = gpu_probe.probe_all(call, lambda: 0.0)
    assert [one.name for one in probes] == list(gpu_probe.PROBES)
    assert not any(one.allowed for one in probes)


# --- the report ------------------------------------------------------------------------------------------------------


def test_table_has_a_line_for_each_step() -> None:
    lines = gpu_steps.table({"probe": Result(REFUSED, "4 allowed, 2 refused", 3.21), "build": Result(OK, "", 100.0)})
    assert lines == [
        "step       outcome       seconds remark",
        "probe      refused           3.2 4 allowed, 2 refused",
        "build      ok              100.0",
    ]


def test_the_report_holds_every_figure(tmp_path: Path) -> None:
    check = make_check(tmp_path)
    gpu_check.run_steps(check, [], {"build": step(OK), "kernels": step(FAILED)})
    path = gpu_check.write(check, {"gpu": GPU.name})
    assert path.parent == tmp_path / "out"
    assert path.name.startswith("gpu-check-Made-Up-1000-")
    report = json.loads(path.read_text())
    assert set(report) == {"schema", "environment", "steps", "figures"}
    assert [set(row) for row in report["steps"]] == [{"name", "outcome", "remark", "seconds"}] * 2
    assert [row["outcome"] for row in report["steps"]] == [OK, FAILED]
    assert set(report["figures"]) == {"build", "kernels"}
    assert report["figures"]["build"] > 0


@pytest.mark.parametrize("output", ["", "Traceback\nImportError: no dpcomm\n"])
def test_an_environment_that_cannot_be_asked_keeps_what_the_driver_said(tmp_path: Path, output: str) -> None:
    check = make_check(tmp_path)
    with_call(check, lambda command: Done(1, 1.0, output))
    facts = gpu_check.describe(check)
    assert (facts["gpu"], facts["driver"], facts["capability"]) == ("Made Up 1000", "1.2.3", "9.0")
    assert facts["unknown"] == output


def test_options() -> None:
    options = gpu_check.parse(["--only", "build", "--only", "tests", "--budget-s", "60", "--out", "x"])
    assert (options.only, options.budget_s, options.out) == (["build", "tests"], 60.0, Path("x"))
    assert gpu_check.parse([]).budget_s == 480
    for wrong in (["--only", "nothing"], ["--budget-s", "0"]):
        with pytest.raises(SystemExit):
            gpu_check.parse(wrong)
