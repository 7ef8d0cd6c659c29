"""Algorithm two_level of engine nccl, through Python, on the stand-ins: bits, what it says, what is refused.

Ranks are threads of one process, so they do share a host: who is where is made up, where dpcomm asks who has reached
whom. tests/cpp/test_nccl_two_level.cpp has more placements, lists, graphs, bytes, and ranks that do not come.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import nccl_threads
import pytest
from cases import Case, digest
from faulty import Caught, catch
from heard import heard
from nccl_threads import Member, Process, construct, good, nccl_process, ranks, together
from test_nccl_engine import run_on

import dpcomm
from dpcomm import options, reach

__all__ = ["nccl_process"]  # the fixture `nccl`
pytestmark = nccl_threads.marks

Hosts = list[list[int]]
PLACES: list[Hosts] = [[[0, 1], [2, 3]], [[0, 2], [1, 3]], [[0, 1, 2], [3]], [[0, 1], [2], [3, 4, 5]]]
SIZES = (0, 1, 257, 7001)
CODECS = ("none", "fp16")
CASES = [
    replace(case, algorithm="two_level")
    for case in (
        *[Case((n,), op=op, codec=c, special=True) for c in CODECS for op in ("sum", "mean") for n in SIZES],
        *[Case(((1 << 18) + 3,), op="mean", codec=c) for c in CODECS],
        *[Case((1021,), "int32", op) for op in ("sum", "min", "max")],
        *[Case((300, 0, 7, 1021), op="mean", codec=c, special=True) for c in CODECS],
    )
]


@contextmanager
def placed(hosts: Hosts) -> Iterator[None]:
    """As if these ranks were on these hosts."""
    with mock.patch.object(reach, "hosts_of", return_value=hosts):
        yield


@contextmanager
def apart(hosts: Hosts, **wanted: Any) -> Iterator[list[Member]]:
    """Ranks on these hosts, with two levels."""
    with placed(hosts), ranks(sum(map(len, hosts)), **{"algorithm": "two_level", **wanted}) as members:
        yield members


def run_cases(_: int, __: int, hosts: Hosts, wanted: dict[str, Any]) -> list[list[str]]:
    with apart(hosts, **wanted) as members:
        return good(together(members, lambda m: run_on(m, CASES)))


@pytest.mark.parametrize("intra_codec", ["none", "fp16"])
@pytest.mark.parametrize("hosts", PLACES, ids=str)
def test_bits_equal_the_reference(nccl: Process, hosts: Hosts, intra_codec: str) -> None:
    results = nccl.run(run_cases, hosts, {"intra_codec": intra_codec})
    for i, case in enumerate(CASES):
        want = case.expected_between(hosts, intra_codec)
        assert {per_rank[i] for per_rank in results} == {digest(want)}, case


def test_another_placement_has_other_bits() -> None:
    """The negative control: the reference tells placements apart."""
    case = Case((7001,), codec="fp16", algorithm="two_level")
    assert len({digest(case.expected_between(hosts)) for hosts in PLACES[:3]}) == 3


def say(_: int, __: int, engine: str) -> tuple[dict[str, Any], str]:
    options = {"engine": engine, "intra_codec": "fp16", "codec": "fp16"}
    with heard(logging.INFO) as said, apart([[0, 1], [2]], **options) as members:
        return members[2].comm.describe(), said[0]


@pytest.mark.parametrize(("engine", "why"), [("auto", "algorithm two_level"), ("nccl", "asked for")])
def test_it_says_who_is_where(nccl: Process, engine: str, why: str) -> None:
    said, line = nccl.run(say, engine)
    assert (said["engine"], said["why"], said["intra_codec"]) == ("nccl", why, "fp16")
    assert said["hosts"] == [[0, 1], [2]]
    assert [row["bit_class"] for row in said["bit_classes"]] == ["two_level([[0, 1], [2]])"]
    # Proven hosts, though all these threads have one name and one network namespace.
    places = r"\(\S+ in network namespace (\d+): ranks 0 1; \S+ in network namespace \1: rank 2\)"
    assert re.match(rf"communicator #\d+ of 3 ranks: engine nccl between 2 hosts {places}: {why}; ", line), line


def sums(members: list[Member], **choice: Any) -> list[float]:
    return [float(x.x[0]) for x in good(together(members, lambda m: m.reduce(**choice)))]


def mixed(_: int, __: int) -> list[list[float]]:
    """Calls that choose otherwise, between those of two levels."""
    with apart(PLACES[0]) as members:
        choices: list[dict[str, Any]] = [{}, {"algorithm": "auto"}, {"algorithm": "direct", "codec": "fp16"}]
        return [sums(members, **choice) for choice in [*choices, {"codec": "fp16"}]]


def test_calls_may_choose_another_algorithm(nccl: Process) -> None:
    assert nccl.run(mixed) == [[10.0] * 4] * 4


def refused(_: int, __: int, hosts: Hosts, wanted: dict[str, Any]) -> list[tuple[str, str]]:
    """What the constructions raise; and whether the same ranks can make another communicator then."""
    with placed(hosts):
        made = construct(sum(map(len, hosts)), **wanted)
    assert all(isinstance(one, Caught) for one in made)
    with ranks(2) as members:
        assert sums(members) == [3.0, 3.0]
    return [(one.failure.name, one.text) for one in made]


ASKED = {"algorithm": "two_level"}


@pytest.mark.parametrize(
    ("hosts", "wanted", "kind", "words"),
    [
        ([[0, 1]], ASKED, "UnsupportedError", "two levels are for several hosts, but all ranks share one"),
        ([[0], [1]], ASKED, "UnsupportedError", "two levels need ranks that share a host, but the 2 ranks are on a"),
        (PLACES[0], {**ASKED, "algorithm": ["two_level"] * 3 + ["auto"]}, "MismatchError", "algorithm"),
        (PLACES[0], {**ASKED, "intra_codec": ["none"] * 3 + ["fp16"]}, "MismatchError", "intra_codec"),
        (PLACES[0], {"intra_codec": "fp16"}, "ArgumentError", "on GPUs of algorithm='two_level'"),
        (PLACES[0], {**ASKED, "engine": "p2p"}, "UnsupportedError", "of engine='nccl' on GPUs"),
    ],
    ids=["one-host", "one-rank-each", "mixed", "intra-codec-differs", "intra-codec-alone", "p2p"],
)
def test_what_cannot_work_is_refused_on_all(
    nccl: Process, hosts: Hosts, wanted: dict[str, Any], kind: str, words: str
) -> None:
    results: Sequence[tuple[str, str]] = nccl.run(refused, hosts, wanted)
    assert {name for name, _ in results} == {kind}
    assert all(words in text for _, text in results), results


def ask_flat(_: int, __: int) -> tuple[str, str]:
    with ranks(2) as members:
        caught = catch(lambda: members[0].comm.allreduce(members[0].full(1.0), algorithm="two_level"))
        assert sums(members) == [3.0, 3.0]
        return caught.failure.name, caught.text


def test_a_communicator_made_without_it_says_so(nccl: Process) -> None:
    kind, text = nccl.run(ask_flat)
    assert kind == "UnsupportedError"
    assert "of engine nccl where the communicator was made with it" in text


def test_engines_of_two_levels_are_those_that_have_it() -> None:
    for engine in options.TWO_LEVEL:
        options.check_two_level(engine)
    for engine in set(options.ENGINES) - set(options.TWO_LEVEL):
        with pytest.raises(dpcomm.UnsupportedError):
            options.check_two_level(engine)
