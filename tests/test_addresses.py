"""Which address of this host the others are told to use."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from faulty import catch, check

from dpcomm import addresses
from dpcomm.addresses import LOOPBACK, Interface, own_address

LO = Interface("lo", LOOPBACK, usable=False)


@pytest.fixture(autouse=True)
def bare_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host whose name leads nowhere, with a loopback only; each test gives it more."""
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(addresses, "interfaces", lambda: [LO])
    monkeypatch.setattr(socket, "gethostname", lambda: "no-such-name.invalid")


def external() -> str:
    """An address of this machine that is no loopback."""
    usable = [interface.host for interface in INTERFACES() if interface.usable]
    if not usable:
        pytest.skip("this machine has a loopback only")
    return usable[0]


INTERFACES = addresses.interfaces  # before the fixture replaces it


def test_loopback_is_among_the_interfaces() -> None:
    assert LO in INTERFACES()


@pytest.mark.parametrize("names", ["lo", "lo,eth7", " lo "])
def test_named_interface_wins(names: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", names)
    assert own_address("192.0.2.1") == (LOOPBACK, "GLOO_SOCKET_IFNAME=lo")


@pytest.mark.parametrize("name", ["eth77", "a-name-longer-than-any", "ä", "lo/.."])
def test_named_interface_that_is_not_there_is_an_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", name)
    text = (
        f"GLOO_SOCKET_IFNAME={name!r}: this host has no interface of that name with an address; it has lo (127.0.0.1)"
    )
    check(catch(own_address, None), "ArgumentError", text)


def test_empty_name_counts_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")
    assert own_address(None).host == LOOPBACK


@pytest.mark.parametrize("store", [None, "", "127.0.0.1", "localhost", "no-such-name.invalid", "a..b", "x" * 300])
def test_where_everything_leads_to_the_loopback_it_is_taken(store: str | None) -> None:
    address = own_address(store)
    assert address.host == LOOPBACK
    assert "GLOO_SOCKET_IFNAME" in address.why


def test_route_to_the_store_decides() -> None:
    host = external()
    assert own_address(host) == (host, f"the route to the store at {host}")


def test_host_name_decides_where_the_store_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    host = external()
    monkeypatch.setattr(socket, "gethostname", lambda: host)
    assert own_address("127.0.0.1") == (host, f"the host name {host}")


def test_host_name_of_another_host_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "198.51.100.77")
    assert own_address(None).host == LOOPBACK


def test_only_usable_interface_decides_and_two_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    usable = [Interface("eth0", "10.0.0.1", usable=True), Interface("eth1", "10.1.0.1", usable=True)]
    monkeypatch.setattr(addresses, "interfaces", lambda: [LO, usable[0], Interface("docker0", "172.17.0.1", False)])
    assert own_address(None) == ("10.0.0.1", "the only interface eth0")
    monkeypatch.setattr(addresses, "interfaces", lambda: [LO, *usable])
    assert own_address(None).host == LOOPBACK


def test_interface_without_ipv4_gives_ipv6(monkeypatch: pytest.MonkeyPatch) -> None:
    table = Path("/proc/net/if_inet6")
    if not table.exists() or not any(line.endswith(" lo") for line in table.read_text().splitlines()):
        pytest.skip("the loopback has no IPv6 address")
    monkeypatch.setattr(addresses, "_ask", lambda request, name: b"")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert own_address(None).host == "::1"
