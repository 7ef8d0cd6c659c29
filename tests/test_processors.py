"""How many processors a rank has to itself, what it asks the engine for, and the choice of channels at start."""

from __future__ import annotations

import itertools
import os

import pytest
import torch

import dpcomm
from dpcomm import _native, environment, options, processors

FIVE, TWO = (5, 111), (2, 222)


@pytest.mark.parametrize(
    ("sets", "own"),
    [
        ([(8, 1)], 8),
        ([(8, 1), (8, 1)], 4),  # one set for all, as torchrun leaves it
        ([(8, 1)] * 3, 2),
        ([(2, 1)] * 3, 0),  # more ranks than processors
        ([(1, 1), (1, 2)], 1),  # pinned to one each: not crowded
        ([FIVE, TWO, FIVE], 2),  # the rank that has least counts for all
        ([TWO, TWO, TWO, FIVE], 0),
    ],
)
def test_share(sets: list[tuple[int, int]], own: int) -> None:
    assert {processors.share(list(order)) for order in itertools.permutations(sets)} == {own}


def test_the_set_of_this_process() -> None:
    allowed = os.sched_getaffinity(0)
    count, number = processors.processor_set()
    assert count == len(allowed)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        fewer = processors.processor_set()
    finally:
        os.sched_setaffinity(0, allowed)
    assert fewer[0] == 1
    assert processors.processor_set() == (count, number)
    assert count == 1 or fewer[1] != number


def group(nranks: int, channels: int, measured: bool) -> list[_native.Comm]:
    wish = _native.ShmWish(64 << 20, channels=channels, fewer_channels=measured)
    return _native.local_group(nranks, wish, 20.0, "", "abcd")


def close(comms: list[_native.Comm]) -> None:
    for comm in comms:
        comm.close(1.0)


def test_all_ranks_choose_the_same_number_of_channels() -> None:
    for nranks in (2, 3):
        comms = group(nranks, 4, measured=True)
        chosen = {comm.describe()["channels"] for comm in comms}
        close(comms)
        assert len(chosen) == 1
        assert chosen <= {1, 2, 4}


def test_channels_that_are_asked_for_are_not_measured() -> None:
    comms = group(2, 3, measured=False)
    assert [comm.describe()["channels"] for comm in comms] == [3, 3]
    close(comms)


def test_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPCOMM_CHANNELS", "2")
    assert environment.read().channels == 2
    comms = dpcomm.init_local(["cpu"] * 2)
    assert [comm.describe()["channels"] for comm in comms] == [2, 2]
    xs = [torch.full((3_000_001,), float(rank + 1)) for rank in range(2)]
    dpcomm.allreduce_local(comms, xs)
    for x in xs:
        assert bool((x == 3).all())
    for comm in comms:
        comm.close()
    for wrong in ("0", "9", "two", ""):
        monkeypatch.setenv("DPCOMM_CHANNELS", wrong)
        with pytest.raises(dpcomm.ArgumentError, match="DPCOMM_CHANNELS="):
            options.resolve("none", "auto", "auto", 1.0, 1.0, None)
