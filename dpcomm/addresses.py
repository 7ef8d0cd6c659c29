"""Which address of this host the ranks of other hosts should use. Knows interfaces and routes; not torch, nor what for.

GLOO_SOCKET_IFNAME, which users of torch's gloo know, decides where it is set; nothing here sends a packet, except
that host names are looked up.
"""

from __future__ import annotations

import fcntl
import ipaddress
import os
import socket
import struct
from pathlib import Path
from typing import NamedTuple

from dpcomm.errors import ArgumentError

LOOPBACK = "127.0.0.1"
# linux/sockios.h, linux/if.h
SIOCGIFFLAGS, SIOCGIFADDR = 0x8913, 0x8915
# A bridge without members is up, but does not run.
IFF_UP_AND_RUNNING, IFF_LOOPBACK = 0x1 | 0x40, 0x8
IFNAME_BYTES = 16  # with the zero byte that ends it
DISCARD_PORT = 9  # any will do: it is never sent to


class Address(NamedTuple):
    """An address of this host.

    Attributes:
        host: IPv4 or IPv6, in digits.
        why: Where it comes from, for messages: "the route to the store at node0".
    """

    host: str
    why: str


class Interface(NamedTuple):
    """A network interface that has an address."""

    name: str
    host: str
    usable: bool  # running, and no loopback


def own_address(store_host: str | None) -> Address:
    """Chooses the address at which this host is reached.

    That of GLOO_SOCKET_IFNAME; else the one from which the route to the store's host leaves; else the host name's; else
    that of the only interface. Where all that leads to the loopback, the loopback: the ranks may share this host.

    Args:
        store_host: Name or address of the host that all ranks reach, None where there is none (a file).

    Raises:
        ArgumentError: GLOO_SOCKET_IFNAME names an interface that this host does not have, or that has no address.
    """
    name = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0].strip()
    if name:
        return Address(_named(name), f"GLOO_SOCKET_IFNAME={name}")
    for host in _resolved(store_host) if store_host else []:
        local = _route_from(host)
        if local and _travels(local):
            return Address(local, f"the route to the store at {store_host}")
    hostname = socket.gethostname()
    for host in _resolved(hostname):
        if _travels(host) and _is_own(host):
            return Address(host, f"the host name {hostname}")
    usable = [interface for interface in interfaces() if interface.usable]
    if len(usable) == 1:
        return Address(usable[0].host, f"the only interface {usable[0].name}")
    return Address(LOOPBACK, "no other address of this host was found; GLOO_SOCKET_IFNAME can name its interface")


def interfaces() -> list[Interface]:
    """All interfaces with an address that other hosts could use, and the loopback."""
    found = []
    for _, name in socket.if_nameindex():
        host = _address_of(name)
        if host:
            flags = struct.unpack_from("<H", _ask(SIOCGIFFLAGS, name) or bytes(2))[0]
            running = flags & IFF_UP_AND_RUNNING == IFF_UP_AND_RUNNING
            found.append(Interface(name, host, running and not flags & IFF_LOOPBACK))
    return found


def _named(name: str) -> str:
    host = _address_of(name)
    if host:
        return host
    there = ", ".join(f"{interface.name} ({interface.host})" for interface in interfaces()) or "none"
    raise ArgumentError(
        f"GLOO_SOCKET_IFNAME={name!r}: this host has no interface of that name with an address; it has {there}"
    )


def _address_of(name: str) -> str:
    """An interface's IPv4 address, else its first IPv6 address that is valid beyond its link; else empty."""
    answer = _ask(SIOCGIFADDR, name)
    if answer:
        return socket.inet_ntop(socket.AF_INET, answer[4:8])  # of a sockaddr_in: family, port, address
    table = Path("/proc/net/if_inet6")
    for line in table.read_text().splitlines() if table.exists() else []:
        digits, *_, interface = line.split()
        host = str(ipaddress.IPv6Address(bytes.fromhex(digits)))
        if interface == name and not ipaddress.ip_address(host).is_link_local:
            return host
    return ""


def _ask(request: int, name: str) -> bytes:
    """The union in an `ifreq`, after the name; empty where there is no such interface, or nothing of that kind."""
    encoded = os.fsencode(name)
    if len(encoded) >= IFNAME_BYTES:
        return b""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        try:
            return fcntl.ioctl(any_socket, request, encoded.ljust(40, b"\0"))[IFNAME_BYTES:]
        except OSError:
            return b""


def _resolved(host: str) -> list[str]:
    """The addresses of a host name, in the resolver's order; none where it knows no such name."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError):
        return []
    return [str(address[0]) for *_, address in found]


def _route_from(host: str) -> str:
    """The own address that packets to a host would bear; empty where no route leads there."""
    try:
        with _udp(host) as sender:
            sender.connect((host, DISCARD_PORT))  # of UDP: looks up the route, sends nothing
            return str(sender.getsockname()[0])
    except OSError:
        return ""


def _is_own(host: str) -> bool:
    try:
        with _udp(host) as probe:
            probe.bind((host, 0))
    except OSError:
        return False
    return True


def _udp(host: str) -> socket.socket:
    return socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)


def _travels(host: str) -> bool:
    """Whether an address means the same host to others. A link-local one needs a scope that each host numbers anew."""
    address = ipaddress.ip_address(host.partition("%")[0])
    return not (address.is_loopback or address.is_unspecified or address.is_link_local)
