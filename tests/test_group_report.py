"""How `python -m dpcomm info --group` reads, for up to 64 ranks, and the line that says which engine was chosen."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest

from dpcomm import chosen, group_info, group_report
from dpcomm.group_report import Rank, Report
from dpcomm.options import ENGINES, Options
from dpcomm.rendezvous import Site, hello_of

# --- how it reads ----------------------------------------------------------------------------------------------------


def made_up(nhosts: int, per_host: int, how: str, versions: dict[int, str] | None = None) -> Report:
    """A group of GPUs."""
    nranks = nhosts * per_host
    hosts = [list(range(per_host * host, per_host * (host + 1))) for host in range(nhosts)]
    ranks = []
    for rank in range(nranks):
        host, at = divmod(rank, per_host)
        hows = [how if peer // per_host == host else "network" for peer in range(nranks)]
        hows[rank] = "own"
        device = f"cuda:{at} NVIDIA H100 80GB HBM3 0000:{0x1B + 0x10 * at:02X}:00.0"
        found = {"dpcomm": "0.1.0", "torch": (versions or {}).get(rank, "2.13.0"), "NCCL": "2.29.7"}
        ranks.append(
            Rank(rank, f"node{host}", 4000 + rank, device, list(range(16 * at, 16 * at + 16)), found, {}, hows)
        )
    return Report(
        nranks, "cuda", ranks, hosts, "nccl", "no shared memory: and so on", "communicator #1: and so on", "ok"
    )


def test_sixteen_ranks_on_two_hosts_of_eight_gpus() -> None:
    report = made_up(2, 8, "ipc", versions={12: "2.12.1"})
    report.engines = group_info._verdicts(report)
    page = group_report.text(report)
    lines = page.splitlines()
    assert lines[0] == "16 ranks on 2 hosts, data on cuda; dpcomm 0.1.0, NCCL 2.29.7"
    assert lines[1] == "torch differs: 2.13.0 on ranks 0-11 13-15; 2.12.1 on ranks 12"
    (row,) = [line for line in lines if line.startswith("   9  node1  4009  ")]
    assert row.endswith("  cuda:1 NVIDIA H100 80GB HBM3 0000:2B:00.0  16 (16-31)    ipc: 8 10-15; network: 0-7"), row
    at = lines.index(" " * 20 + "111111")
    assert lines[at + 1] == "         01234567 89012345"
    for rank in range(16):
        near = "".join("-" if peer == rank % 8 else "P" for peer in range(8))
        expected = f"{near} NNNNNNNN" if rank < 8 else f"NNNNNNNN {near}"
        assert lines[at + 2 + rank] == f"rank {rank:>2}  {expected}"
    assert lines[at + 18] == "P: memory of the other GPU; N: network"
    assert "  nccl       in use" in lines
    for engine in ("p2p  ", "shm  "):
        assert f"  {engine}      no: needs one host, and these are 2" in lines
    for engine in ("gloo     ", "two_level"):
        assert f"  {engine}  usable for data on the other device: see --device cpu" in lines


def test_64_ranks_stay_readable() -> None:
    page = group_report.text(made_up(8, 8, "pinned host memory"))
    lines = page.splitlines()
    assert max(map(len, lines)) <= 130
    assert len(lines) < 150
    (row,) = [line for line in lines if line.startswith("rank 63  ")]
    assert row == "rank 63  " + " ".join(["NNNNNNNN"] * 7 + ["HHHHHHH-"])
    assert "H: pinned host memory; N: network" in lines


def test_an_error_leaves_what_was_found_before_it() -> None:
    whole = made_up(2, 1, "ipc")
    ranks = [dataclasses.replace(rank, how=[]) for rank in whole.ranks]
    page = group_report.text(Report(2, "cuda", ranks, whole.hosts))
    assert page.startswith("2 ranks on 2 hosts, data on cuda; ")
    assert "links" not in page
    assert group_report.text(Report(2)) == ""


def test_engines_that_some_ranks_lack_are_said_with_those_ranks() -> None:
    report = made_up(1, 4, "ipc")
    report.engine = "p2p"
    report.ranks[2] = dataclasses.replace(report.ranks[2], refuses={"nccl": "no NCCL"})
    assert group_info._verdicts(report) == {
        "shm": "usable for data on the other device: see --device cpu",
        "p2p": "in use",
        "gloo": "usable for data on the other device: see --device cpu",
        "two_level": "no: needs several hosts, and this is one",
        "torch": "usable for data on the other device: see --device cpu",
        "nccl": "no: no NCCL (ranks 2)",
    }


@pytest.mark.parametrize(
    ("nhosts", "per_host", "verdict"),
    [
        (1, 4, "no: needs several hosts, and this is one"),
        (4, 1, "no: needs ranks that share a host, and here each has its own"),
        (2, 2, "usable where asked for: engine='two_level'"),
    ],
)
def test_what_engine_two_level_needs_is_said(nhosts: int, per_host: int, verdict: str) -> None:
    report = dataclasses.replace(made_up(nhosts, per_host, "shared memory"), device="cpu", engine="gloo")
    assert group_info._verdicts(report)["two_level"] == verdict
    report.ranks[0] = dataclasses.replace(report.ranks[0], refuses={"two_level": "no gloo"})
    assert group_info._verdicts(report)["two_level"].startswith("no: no gloo")


@pytest.mark.parametrize(
    ("numbers", "text"), [([], ""), ([3], "3"), ([0, 1], "0 1"), ([0, 1, 2, 5, 7, 8, 9], "0-2 5 7-9")]
)
def test_spans(numbers: list[int], text: str) -> None:
    assert chosen.spans(numbers) == text


# --- the line that is logged -----------------------------------------------------------------------------------------


def chosen_line(
    names: list[str],
    engine: str,
    asked_for: str = "auto",
    algorithm: str = "auto",
    apart: tuple[int, int] | None = None,
    hosts: Sequence[Sequence[int]] = (),
) -> str:
    options = Options("none", asked_for, algorithm, 300.0, 25.0, 64 << 20, "", 0)
    hellos = []
    for rank, name in enumerate(names):
        hello = hello_of(Site(None, rank, len(names), "own", ""), options)
        hellos.append(hello._replace(hostname=name.rstrip("+"), net_namespace=7 + name.count("+")))
    return chosen.line(3, hellos, engine, "the reason", apart, hosts)


def test_the_line_says_what_was_chosen_and_why_not_the_others() -> None:
    assert chosen_line(["a", "a", "b", "b"], "gloo", apart=(2, 0)) == (
        "communicator #3 of 4 ranks: engine gloo between 2 hosts (a: ranks 0 1; b: ranks 2 3): no shared memory "
        "between rank 0 on a and rank 2 on b; shm and p2p need one host, two_level ranks that share one, nccl GPUs, "
        "torch is only where asked for"
    )
    assert chosen_line(["a", "a", "b", "b"], "two_level", apart=(0, 2)).endswith(
        "between rank 0 on a and rank 2 on b; shm and p2p need one host, gloo is for hosts with one rank each, nccl "
        "needs GPUs, torch is only where asked for"
    )
    assert chosen_line(["a", "a"], "shm") == (
        "communicator #3 of 2 ranks: engine shm on a: the reason; gloo and two_level are for several hosts, torch only "
        "where asked for, p2p and nccl need GPUs"
    )
    assert chosen_line(["a", "a+"], "gloo", "gloo").endswith(
        "between 2 hosts (a in network namespace 7: rank 0; a in network namespace 8: rank 1): the reason; no other "
        "was considered"
    )
    assert "shm and torch have no all-reduce of a library" in chosen_line(["a", "b"], "gloo", algorithm="native")
    assert chosen_line(["a", "a", "b"], "two_level", algorithm="two_level").endswith("the reason; no other has it")
    assert chosen_line(["a", "a", "b"], "two_level", "two_level", "two_level").endswith("; no other was considered")


def test_the_line_counts_hosts_as_they_were_proven_not_as_they_are_called() -> None:
    """Names decide only where nothing was proven."""
    assert " between 2 hosts (a: ranks 0 2; b: rank 1): " in chosen_line(["a", "b", "a"], "gloo")
    one_of_two_names = chosen_line(["a", "b"], "shm", hosts=[range(2)])
    assert "engine shm on a: the reason" in one_of_two_names
    cut_off = chosen_line(["a", "a", "b", "b"], "two_level", hosts=[[0], [1], [2, 3]])
    assert (
        " between 3 hosts (a in network namespace 7: rank 0; a in network namespace 7: rank 1; b: ranks 2 3): "
        in cut_off
    )


def test_the_line_names_every_other_engine() -> None:
    """Whatever auto takes: where only some engines have the algorithm, "no other" may stand for the rest."""
    for (engine, algorithm), others in chosen.OTHERS.items():
        missing = [e for e in ENGINES[1:] if e != engine and e not in others]
        assert not missing or (algorithm and "no other" in others), (engine, algorithm, missing)


def test_the_line_names_eight_hosts_at_most() -> None:
    line = chosen_line([f"n{rank}" for rank in range(64)], "nccl", apart=(1, 0))
    assert "between 64 hosts (n0: rank 0; " in line
    assert "n7: rank 7; and 56 more)" in line
    assert "n8" not in line
