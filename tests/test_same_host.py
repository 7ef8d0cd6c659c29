"""Which ranks share a host: those that pass each other a descriptor, whatever else is said or claimed."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from dpcomm import same_host


@pytest.fixture
def proofs() -> Iterator[list[same_host.Proof]]:
    made = [same_host.Proof(rank) for rank in range(4)]
    yield made
    for proof in made:
        proof.close()


def asked(proofs: list[same_host.Proof], offers: list[str]) -> list[list[int]]:
    for proof in proofs:
        proof.call(offers)
    return [proof.answers(offers) for proof in proofs]


def test_ranks_that_pass_a_descriptor_share_a_host(proofs: list[same_host.Proof]) -> None:
    assert asked(proofs, [proof.offer() for proof in proofs]) == [[1, 2, 3], [2, 3], [3], []]


def test_who_sends_another_file_or_is_not_there_does_not(proofs: list[same_host.Proof]) -> None:
    offers = [proof.offer() for proof in proofs]
    offers[2] = offers[2][: 2 * same_host.NAME_BYTES] + "00" * same_host.TOKEN_BYTES  # not what its file holds
    offers[0] = "11" * same_host.NAME_BYTES + offers[0][2 * same_host.NAME_BYTES :]  # nobody listens there
    assert asked(proofs, offers) == [[], [3], [3], []]


def test_strangers_who_call_are_no_ranks(proofs: list[same_host.Proof]) -> None:
    offers = [proof.offer() for proof in proofs]
    name = b"\0" + bytes.fromhex(offers[0])[: same_host.NAME_BYTES]
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as silent, silent.dup() as _:
        silent.connect(name)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as talker:
            talker.connect(name)
            talker.send(b"\1\0\0\0")  # the number of a rank, and no file
            assert proofs[0].answers(offers) == []


def test_hosts_are_sorted_by_their_lowest_rank() -> None:
    assert same_host.groups(5, [[3], [2, 4], [4], [], []]) == [[0, 3], [1, 2, 4]]
    assert same_host.groups(2, [[], []]) == [[0], [1]]
