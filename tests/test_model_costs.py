"""docs/model.md: what is counted for it agrees with the sources' own formulas, and the page with what is computed."""

from __future__ import annotations

import itertools
import re
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
import model
import model_costs as costs
from loopback_plan import traffic
from model_costs import BEST, CASES, CODED, LIKELY, MACHINES, MIB, PLAIN, WORST, Machine

from dpcomm import _native

SIZES = [64 << 10, 512 << 10, 2 * MIB, 8 * MIB, 16 * MIB, 25 * MIB, 32 * MIB, 128 * MIB, 1024 * MIB]
NVLINK, PCIE, ONE_NIC, EIGHT_NICS, LONE = MACHINES
by_machine = pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.name)


# --- the page --------------------------------------------------------------------------------------------------------


def test_the_page_says_what_the_script_computes() -> None:
    text = model.PAGE.read_text()
    assert model.page(text) == text, "run `python benchmarks/model.py`"
    assert model.PICTURE.read_bytes().startswith(b"\x89PNG")


def test_a_page_that_is_out_of_date_is_noticed() -> None:
    text = model.PAGE.read_text()
    stale = text.replace("modelled, 512 KiB | 24", "modelled, 512 KiB | 23", 1)
    assert stale != text
    assert model.page(stale) == text


def test_a_page_without_a_marker_is_an_error() -> None:
    text = model.PAGE.read_text().replace("<!-- model: halves -->", "")
    with pytest.raises(ValueError, match="model: halves"):
        model.page(text)


def test_every_computed_row_is_labelled() -> None:
    for name, content in model.blocks().items():
        rows = [line for line in content.splitlines() if line.startswith("| ") and not line.startswith("| ---")]
        heads = len(re.findall("^### ", content, re.MULTILINE)) or 1
        assert len(rows) > heads
        if name != "assumptions":
            assert sum(row.startswith("| modelled, ") for row in rows) == len(rows) - heads, name


def test_the_first_advice_has_the_figures_of_the_model() -> None:
    """For a GB of tensors: ncclAllReduce, coded messages, kernels; in ms."""
    gb = 10**9
    stock = costs.us(2 * 7 / 8 * gb, NVLINK.stock[LIKELY]) / 1e3
    wire = costs.us(2 * 7 / 8 * gb * CODED / PLAIN, NVLINK.peers[LIKELY]) / 1e3
    kernels = costs.us((2 + 3 * CODED / PLAIN) * gb, NVLINK.memory[LIKELY]) / 1e3
    text = " ".join(model.PAGE.read_text().split())
    assert f"takes {stock:.1f} ms. Half of the bytes take {wire:.1f} ms" in text
    assert f"our kernels {kernels:.1f} ms" in text


@pytest.mark.parametrize("size", [size for size in SIZES if size >= 8 * MIB])
def test_the_advice_follows_from_the_likely_times(size: int) -> None:
    def faster(machine: Machine, one: model.Model, other: model.Model) -> bool:
        return one(machine, size, LIKELY) < other(machine, size, LIKELY)

    assert not faster(NVLINK, costs.direct_us, costs.stock_us)
    assert faster(NVLINK, costs.bfloat16_us, costs.stock_us)
    assert faster(PCIE, costs.direct_us, costs.stock_us)
    assert faster(PCIE, costs.p2p_us, costs.direct_us)
    assert faster(PCIE, costs.bfloat16_us, costs.direct_us)
    assert not faster(ONE_NIC, costs.direct_us, costs.stock_us)
    assert not faster(EIGHT_NICS, costs.direct_us, costs.stock_us)
    assert faster(LONE, costs.direct_us, costs.stock_us)
    for machine in MACHINES:
        assert faster(machine, costs.direct_us, costs.ring_us) or machine is ONE_NIC


def test_small_calls_on_pcie_lose_in_the_worst_case() -> None:
    assert costs.direct_us(PCIE, 25 * MIB, WORST) > costs.stock_us(PCIE, 25 * MIB, WORST)


# --- counted ---------------------------------------------------------------------------------------------------------


def test_a_group_takes_what_the_core_says() -> None:
    float32 = _native.DTYPES["float32"]
    assert _native.wire_bytes(256, float32, _native.CODECS["fp16"]) == CODED
    assert _native.wire_bytes(256, float32, _native.CODECS["none"]) == PLAIN


@pytest.mark.parametrize("nranks", [2, 4, 8, 16])
def test_passes_of_direct_are_those_of_the_schedule(nranks: int) -> None:
    """tests/test_loopback_benchmark.py plays the schedule step by step against traffic()."""
    one = traffic("direct", "fp16", nranks, nranks * PLAIN, nranks * CODED, True)  # a result is one message for all
    assert sum(costs.passes(nranks, 1)) == one.total / nranks
    assert sum(costs.passes(nranks, 1)) == nranks * (2 * PLAIN + 3 * CODED)


@pytest.mark.parametrize("nranks", [2, 3, 4, 8, 16, 64])
def test_lanes_are_at_least_what_a_rank_uses_and_little_more(nranks: int) -> None:
    used = (nranks + 2) + 3 + 2 * (nranks - 2)  # one's own copy, the next rank's, the others'
    assert used <= costs.lanes(nranks) <= used + 2


@by_machine
def test_one_slice_ends_where_a_slot_is_full(machine: Machine) -> None:
    limit = costs.one_slice_bytes(machine.ranks)
    assert costs.cut_of(limit, machine.ranks).slices == 1
    assert costs.cut_of(limit + 1, machine.ranks).slices == 2
    assert costs.cut_of(4 * limit, machine.ranks, arena=4 * costs.ARENA_BYTES + 16 * MIB).slices == 1


def test_launches_of_one_slice() -> None:
    """Begin, give, reduce, take, end and two exchanges; a ring of N has 2N - 1 turns between begin and end."""
    assert costs.launches_of("direct", 8, 1) == (5, 2, 14)
    assert costs.launches_of("direct", 8, 2) == (8, 4, 14)
    assert costs.launches_of("ring", 8, 1) == (17, 14, 2)


def test_what_crosses_between_hosts_is_what_the_page_says() -> None:
    """Two hosts of 8: every exchange sends 64 messages of a sixteenth of the bucket each way."""
    coded = 16 * 1000 * CODED
    slow = ONE_NIC._replace(peers=costs.Bar(1e9, 1e9, 1e9), group_us=costs.Bar(0, 0, 0))
    assert 2 * costs.exchange_us(slow, coded // 16, LIKELY) == pytest.approx(costs.us(8 * coded, 11.8))


# --- modelled --------------------------------------------------------------------------------------------------------


@by_machine
@pytest.mark.parametrize("name", list(model.CONTESTANTS))
def test_bars_are_in_order_and_times_grow_with_bytes(machine: Machine, name: str) -> None:
    if name not in model.contestants_of(machine):
        assert name == "p2p fp16"
        assert machine.hosts > 1
        return
    times = [[model.CONTESTANTS[name](machine, size, case) for case in CASES] for size in SIZES]
    for best, likely, worst in times:
        assert 0 < best <= likely <= worst
    for smaller, larger in itertools.pairwise(times):
        assert all(a <= b for a, b in zip(smaller, larger, strict=True))


def test_nccl_on_nvlink_goes_through_the_published_times() -> None:
    for size, published in NVLINK.published_us:
        assert costs.stock_us(NVLINK, size, LIKELY) == published
        assert costs.stock_us(NVLINK, size, BEST) == pytest.approx(0.9 * published)


@by_machine
def test_large_calls_of_nccl_have_the_published_bus_bandwidth(machine: Machine) -> None:
    """A GiB; the fixed part of a call is within two percent of it."""
    if machine.published_bus is None:
        assert machine.hosts == 2
        return
    size = 1024 * MIB
    bus = 2 * (machine.ranks - 1) / machine.ranks * size / costs.stock_us(machine, size, LIKELY) / 1e3
    least, most = machine.published_bus
    assert 0.98 * least <= bus <= 1.02 * most


@by_machine
def test_halves_lose_wherever_the_engine_takes_one_slice(machine: Machine) -> None:
    limit = costs.one_slice_bytes(machine.ranks)
    for size in (64 << 10, MIB, limit):
        for case in CASES:
            assert costs.halves_gain(machine, size, case) < 0


def test_halves_win_where_half_of_the_kernels_outlasts_what_they_cost() -> None:
    """Two exchanges and three launches more; where those cost nothing, halves always win."""
    assert costs.halves_gain(NVLINK, 128 * MIB) > 0.05
    free = NVLINK._replace(kernel_us=costs.Bar(0, 0, 0), group_us=costs.Bar(0, 0, 0))
    assert all(costs.halves_gain(free, size) > 0 for size in SIZES)
