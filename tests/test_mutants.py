"""Each bug planted by mutants.py is noticed, and the code without one passes: the tests of the core and of the layer
`carried` can fail."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import cpp_build
import mutants
import pytest
from under_way import asked_for, under_way

pytestmark = pytest.mark.timeout(1500)  # the first test waits for the compiler

Outcomes = dict[mutants.Mutant, "Future[tuple[int, str]]"]


def ids(mutant: mutants.Mutant) -> str:
    return f"{mutant.kind}-{mutant.name}"


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Iterator[Outcomes]:
    wanted = asked_for(request, [*mutants.CONTROLS, *mutants.MUTANTS], ids)
    usable = {kind: not cpp_build.why_no(kind) for kind in ("plain", "tsan")}
    playable = [m for m in wanted if usable[m.kind]]
    mutants.prepare(playable)
    with under_way(mutants.outcome, playable) as outcomes:
        yield outcomes


def outcome(outcomes: Outcomes, mutant: mutants.Mutant) -> tuple[int, str]:
    if mutant not in outcomes:
        pytest.skip(cpp_build.why_no(mutant.kind))
    return outcomes[mutant].result()


@pytest.mark.parametrize("mutant", mutants.CONTROLS, ids=ids)
def test_code_without_a_bug_passes(mutant: mutants.Mutant, outcomes: Outcomes) -> None:
    status, output = outcome(outcomes, mutant)
    assert status == 0, output[-4000:]
    assert " passed, 0 failed" in output


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=ids)
def test_bug_is_noticed(mutant: mutants.Mutant, outcomes: Outcomes) -> None:
    status, output = outcome(outcomes, mutant)
    assert status != 0, f"{mutant.name} went unnoticed:\n{output[-2000:]}"
    crashed = status < 0  # a signal: this one reads or writes where there is nothing
    assert crashed or "failed:" in output or "ThreadSanitizer: data race" in output


@pytest.mark.parametrize("old", ["no such text", "DPCOMM_HD"], ids=["absent", "ambiguous"])
def test_a_mutant_must_match_exactly(old: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="found"):
        mutants.plant(mutants.Mutant("stale", "plain", "protocol.h", old, "x"), tmp_path / "copy")
