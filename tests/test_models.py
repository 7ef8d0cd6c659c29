"""Two protocols of csrc, model-checked: sleeping and waking (model_wait.py), the reuse of slots (model_slots.py)."""

from __future__ import annotations

from itertools import product

import model_slots
import model_wait
import pytest

# What the reader waits for, one after the other, and how many posts there are.
WAITS = {
    "1of1": ((1,), 1),
    "1-2of2": ((1, 2), 2),
    "2of2": ((2,), 2),
    "1-3of3": ((1, 3), 3),
    "1-2-3of3": ((1, 2, 3), 3),
    "3of3": ((3,), 3),
}
DRAINS = pytest.mark.parametrize("kernel_drains", [False, True], ids=["kernel_promises_nothing", "kernel_drains"])


def wait_faults(mutant: str, kernel_drains: bool) -> set[str]:
    return {model_wait.Model(*waits, mutant, kernel_drains).fault() for waits in WAITS.values()}


@DRAINS
@pytest.mark.parametrize("waits", WAITS.values(), ids=WAITS.keys())
def test_no_wakeup_is_lost_and_no_exit_is_wrong(waits: tuple[tuple[int, ...], int], kernel_drains: bool) -> None:
    assert model_wait.Model(*waits, kernel_drains=kernel_drains).fault() == ""


@DRAINS
@pytest.mark.parametrize(
    ("mutant", "fault"),
    [
        ("plain post", "lost wake-up"),  # no barrier at W1
        ("look before post", "lost wake-up"),  # W2 before W1
        ("no second look", "lost wake-up"),  # sleeps on a value that is already enough
        ("cleared before sleep", "lost wake-up"),
        ("kernel does not compare", "lost wake-up"),
        ("post before message", "wrong exit"),
    ],
)
def test_wait_mutant_is_refuted(mutant: str, fault: str, kernel_drains: bool) -> None:
    assert wait_faults(mutant, kernel_drains) == {fault}


@DRAINS
def test_clearing_the_announcement_late_is_refuted(kernel_drains: bool) -> None:
    """It takes two waits: the second loses its announcement to the clear of the first."""
    assert wait_faults("cleared late", kernel_drains) == {"", "lost wake-up"}
    assert model_wait.Model((1, 2), 2, "cleared late", kernel_drains).fault() == "lost wake-up"


def test_plain_announcement_relies_on_the_kernel() -> None:
    """No barrier at R1: Linux on x86 takes a lock before FUTEX_WAIT compares, and that drains the store buffer.

    Nothing promises it, so the code has its own barrier.
    """
    assert wait_faults("plain announcement", kernel_drains=False) == {"lost wake-up"}
    assert wait_faults("plain announcement", kernel_drains=True) == {""}


@DRAINS
@pytest.mark.parametrize("mutant", ["first look only", "look before announcement", "never cleared"])
def test_harmless_wait_mutant_is_not_refuted(mutant: str, kernel_drains: bool) -> None:
    """FUTEX_WAIT compares with the first look and is itself a second one; a stale announcement costs a system call.

    So the model tells harmless from harmful, and does not merely refute all change.
    """
    assert wait_faults(mutant, kernel_drains) == {""}


KINDS = [(algorithm, slices) for algorithm in ("direct", "oneshot") for slices in (1, 2, 3)]
LONG: list[list[model_slots.Call]] = [
    [("direct", 6), ("oneshot", 5), ("direct", 6)],
    [("direct", 2), ("oneshot", 1), ("direct", 3), ("oneshot", 4), ("oneshot", 1), ("direct", 1), ("oneshot", 2)],
]


@pytest.mark.parametrize(("nranks", "calls"), [(2, 3), (3, 2)], ids=["2ranks_3calls", "3ranks_2calls"])
def test_four_slots_are_enough_for_any_sequence(nranks: int, calls: int) -> None:
    for sequence in product(KINDS, repeat=calls):
        assert model_slots.fault(sequence, nranks, slots=4) == "", sequence


@pytest.mark.parametrize("sequence", LONG, ids=["long_calls", "many_calls"])
def test_three_slots_would_do(sequence: list[model_slots.Call]) -> None:
    """As the comments of direct.h and oneshot.h say: four is a power of two, not a need."""
    assert model_slots.fault(sequence, 2, slots=3) == ""
    assert model_slots.fault(sequence, 3, slots=3) == ""
    for short in product(KINDS, repeat=2):
        assert model_slots.fault(short, 3, slots=3) == "", short


@pytest.mark.parametrize("nranks", [2, 3])
@pytest.mark.parametrize(
    "sequence",
    [[("direct", 3)], [("direct", 2), ("oneshot", 1)], [("oneshot", 1), ("direct", 3)]],
    ids=["direct", "direct_then_oneshot", "oneshot_then_direct"],
)
def test_two_slots_are_refuted(sequence: list[model_slots.Call], nranks: int) -> None:
    assert "overwrites" in model_slots.fault(sequence, nranks, slots=2)


def test_two_slots_carry_oneshot_alone() -> None:
    """So it is the mix with direct that asks for three."""
    assert model_slots.fault([("oneshot", 4)] * 3, 3, slots=2) == ""
    assert "overwrites result" in model_slots.fault([("oneshot", 2)], 2, slots=1)


def test_one_header_page_is_refuted() -> None:
    """A peer may begin the next call while I still compare headers of this one: after oneshot, not after direct."""
    assert "overwrites header" in model_slots.fault([("oneshot", 1), ("direct", 1)], 2, slots=4, pages=1)
    assert model_slots.fault([("direct", 1), ("oneshot", 1)], 2, slots=4, pages=1) == ""
