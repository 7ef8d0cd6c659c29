"""What surrounds the calls: verify, info, the command line, environment variables, and an import that does nothing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Pool

import dpcomm

Pools = Callable[[int], Pool]
ROOT = Path(__file__).resolve().parent.parent


def verify_several(rank: int, nranks: int) -> list[str]:
    torch.manual_seed(0)
    last = torch.nn.Linear(4, 2)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), last)
    same = [torch.arange(5), torch.ones(3, dtype=torch.bfloat16), torch.zeros(0)]
    dpcomm.verify(model)
    dpcomm.verify(same)
    dpcomm.verify(same[0])
    messages = []
    with torch.no_grad():
        last.weight[1, 3] += rank * 1e-3
    for value in (model, [same[0], torch.tensor([0.0 if rank == 0 else -0.0])]):
        try:
            dpcomm.verify(value)
        except dpcomm.MismatchError as error:
            messages.append(str(error))
    dpcomm.verify(same)  # still usable
    return messages


def test_verify_names_the_first_tensor_that_differs(pool: Pools) -> None:
    for module, tensors in pool(2).run(verify_several):
        assert "2.weight" in module
        assert "2.bias" not in module
        assert "tensor 1" in tensors  # equal numbers, other bytes


def test_info_says_what_is_usable_and_why() -> None:
    facts = dpcomm.info()
    assert {"version", "cuda_built", "simd", "engines"} <= set(facts)
    assert facts["version"] == dpcomm.__version__
    assert facts["simd"][-1] == "portable"
    assert facts["engines"]["shm"]["usable"] is True
    for engine in facts["engines"].values():
        assert set(engine) == {"usable", "reason"}
        assert engine["reason"]


def test_command_line_prints_info() -> None:
    command = [sys.executable, "-m", "dpcomm", "info"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, cwd=ROOT, check=True)
    assert dpcomm.__version__ in done.stdout
    for name in (*dpcomm.info()["engines"], *dpcomm.info()["simd"]):
        assert name in done.stdout
    assert done.stderr == ""


def threads_after(imports: str) -> int:
    script = f"import os, {imports}; print(len(os.listdir('/proc/self/task')))"
    command = [sys.executable, "-c", script]
    return int(subprocess.run(command, capture_output=True, text=True, timeout=50, cwd=ROOT, check=True).stdout)


def test_importing_starts_nothing() -> None:
    assert threads_after("torch, dpcomm") == threads_after("torch")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DPCOMM_TIMEOUT_S", "5 min"),
        ("DPCOMM_TIMEOUT_S", "-1"),
        ("DPCOMM_TIMEOUT_S", "nan"),
        ("DPCOMM_SIMD", "mmx"),
        ("DPCOMM_ARENA_MB", "much"),
    ],
)
def test_bad_environment_variables_are_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(dpcomm.ArgumentError, match=f"{name}='{value}'"):
        dpcomm.init_local(["cpu"] * 2)


def test_environment_gives_defaults_that_arguments_override(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPCOMM_TIMEOUT_S", "7.5")
    assert dpcomm.init_local(["cpu"] * 2)[0].timeout_s == 7.5
    assert dpcomm.init_local(["cpu"] * 2, timeout_s=3)[0].timeout_s == 3.0


def test_unknown_environment_variables_are_warned_of_once(monkeypatch: pytest.MonkeyPatch, recwarn: Any) -> None:
    monkeypatch.setenv("DPCOMM_TIMEOUTS", "5")
    for _ in range(2):
        dpcomm.init_local(["cpu"])
    said = [str(w.message) for w in recwarn if "DPCOMM_TIMEOUTS" in str(w.message)]
    assert len(said) == 1
    assert "DPCOMM_TIMEOUT_S" in said[0]
