"""Hosts on one machine: network namespaces joined by a switch, with links that can be shaped and cut.

    dp<pid>n<k>s     the switch: a bridge with an address of its own, and a port p<i> for each host
    dp<pid>n<k>h<i>  host i: lo, and eth0, which is the other end of p<i>

All interfaces lie in these namespaces: nothing is seen or routed outside, so addresses are the same in every set, and
removing the names removes everything. Knows nothing of dpcomm, torch or tests.
"""

import ctypes
import itertools
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

NAMES = Path("/run/netns")  # where iproute2 keeps them
NAME = re.compile(r"dp(\d+)n\d+(s|h\d+)")
MOST = 4
NETWORK, STORE_HOST = "198.18.0.0/24", "198.18.0.254"  # 198.18.0.0/15 is for benchmarks of networks
COMMAND_S = 10
CLONE_NEWNET = 0x40000000
# What Linux takes unless told otherwise. BBR, as some machines are told, measures a line by itself: a bucket that lets
# bursts pass misleads it, and a connection then stays 5 to 15 % below the line for seconds.
CONGESTION_CONTROL = "cubic"

_numbers = itertools.count()


class HostsError(RuntimeError):
    """The system refused; the text has the command and what it said."""


class Hosts:
    """A set of hosts, made by `hosts`.

    Attributes:
        count: How many.
        store_host: The switch's address: what `inside` makes there can listen at it, and all hosts reach it.
        gbit: Gb/s that the links carry each way; None where nothing limits them.
    """

    def __init__(self, count: int) -> None:
        if not 1 <= count <= MOST:
            raise ValueError(f"{count} hosts: expected 1 to {MOST}")
        stem = f"dp{os.getpid()}n{next(_numbers)}"
        self.count, self.store_host = count, STORE_HOST
        self.gbit: float | None = None
        self._switch = f"{stem}s"
        self._names = [f"{stem}h{host}" for host in range(count)]

    def address(self, host: int) -> str:
        """Of its eth0."""
        return f"198.18.0.{host + 1}"

    def command(self, host: int) -> list[str]:
        """What to put in front of a command that is to run there: it replaces itself, so the process is the command's.

        Only the network is another one: what `ip netns exec` does to /sys would hide control groups.
        """
        return ["nsenter", f"--net={NAMES / self._names[host]}", "--"]

    def inside(self, function: Callable[[], T], host: int | None = None) -> T:
        """Calls function on the switch, or on a host, in a thread of its own: sockets that it makes stay there."""
        name = self._switch if host is None else self._names[host]
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(_in_namespace, name, function).result()

    def shape(self, gbit: float | None) -> None:
        """Limits what each host sends and what it receives, from now on."""
        if gbit is None and self.gbit is None:
            return
        verb = ("del",) if gbit is None else ("replace",)
        how = () if gbit is None else _bucket(gbit)
        for host, name in enumerate(self._names):
            _run("tc", "-n", name, "qdisc", *verb, "dev", "eth0", "root", *how)
            _run("tc", "-n", self._switch, "qdisc", *verb, "dev", f"p{host}", "root", *how)
        self.gbit = gbit

    def link_down(self, host: int) -> None:
        """As if its cable were pulled: packets vanish, connections stay."""
        _run("ip", "-n", self._switch, "link", "set", f"p{host}", "down")

    def link_up(self, host: int) -> None:
        _run("ip", "-n", self._switch, "link", "set", f"p{host}", "up")

    def pids(self, host: int) -> list[int]:
        """Who runs there."""
        return [int(pid) for pid in _run("ip", "netns", "pids", self._names[host]).split()]

    def _make(self) -> None:
        for name in (self._switch, *self._names):
            _run("ip", "netns", "add", name)
        ports = "".join(
            f"link add p{host} type veth peer name eth0 netns {name}\n"
            f"link set p{host} master br0\nlink set p{host} up\n"
            for host, name in enumerate(self._names)
        )
        own = f"link set lo up\nlink add br0 type bridge\naddr add {STORE_HOST}/24 dev br0\nlink set br0 up\n"
        _run("ip", "-n", self._switch, "-batch", "-", script=own + ports)
        for host, name in enumerate(self._names):
            address = self.address(host)
            script = (
                f"link set lo up\naddr add {address}/24 dev eth0\nlink set eth0 up\n"
                f"route change {NETWORK} dev eth0 proto kernel scope link src {address} congctl {CONGESTION_CONTROL}\n"
            )
            _run("ip", "-n", name, "-batch", "-", script=script)

    def _remove(self) -> None:
        for name in (self._switch, *self._names):
            if (NAMES / name).exists():
                _run("ip", "netns", "del", name)


@contextmanager
def hosts(count: int, gbit: float | None = None) -> Iterator[Hosts]:
    """Makes hosts, and removes them however the block ends; those of processes that were killed are removed, too.

    Args:
        count: 1 to 4.
        gbit: Gb/s that each link carries each way; None: as much as the machine can.

    Raises:
        HostsError: The system does not permit it, or refuses `gbit`; see `why_no_hosts`.
    """
    sweep()
    made = Hosts(count)
    try:
        made._make()
        made.shape(gbit)
        yield made
    finally:
        made._remove()


@cache
def why_no_hosts() -> str:
    """Empty where `hosts` works; else what is missing. Asks by making some."""
    missing = [tool for tool in ("ip", "tc", "nsenter") if shutil.which(tool) is None]
    if missing:
        return f"no hosts to be made: {', '.join(missing)} not on PATH (apt-get install iproute2 util-linux)"
    try:
        with hosts(2, gbit=1) as net:
            net.inside(lambda: None)
            _run(*net.command(0), "true")
    except (HostsError, OSError) as error:
        return f"no hosts to be made: {error}"
    return ""


def sweep() -> None:
    """Removes what killed processes have left."""
    found = [match for path in NAMES.glob("dp*") if (match := NAME.fullmatch(path.name))]
    for match in found:
        if not Path(f"/proc/{match[1]}").exists():
            # Another process may sweep, too.
            subprocess.run(["ip", "netns", "del", match[0]], capture_output=True, timeout=COMMAND_S, check=False)


def _bucket(gbit: float) -> tuple[str, ...]:
    """The arguments of a token bucket.

    It holds what the line carries in 2 ms, in which a busy machine finds the time to empty it, but 128 KiB at least,
    two of the packets that TCP hands to a virtual link, and 256 KiB at most: what has been saved up passes at once.

    50 ms of queue, 6 MB at 1 Gb/s, are more than one TCP connection has under way (tcp_wmem, 4 MB), so that nothing is
    dropped between two hosts there.
    """
    held = min(max(2e-3 * gbit * 1e9 / 8, 128 << 10), 256 << 10)
    return ("tbf", "rate", f"{round(gbit * 1000)}mbit", "burst", str(round(held)), "latency", "50ms")


def _run(*command: str, script: str | None = None) -> str:
    """What it printed.

    Raises:
        HostsError: It failed, or did not end.
    """
    try:
        done = subprocess.run(command, input=script, capture_output=True, text=True, timeout=COMMAND_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise HostsError(f"{' '.join(command)}: no end after {COMMAND_S} s") from error
    if done.returncode != 0:
        raise HostsError(f"{' '.join(command)}: {' '.join(done.stderr.split())[-300:] or done.returncode}")
    return done.stdout


def _in_namespace(name: str, function: Callable[[], T]) -> T:
    """In a thread that ends with it: a namespace belongs to the thread. os.setns is newer than our oldest Python."""
    libc = ctypes.CDLL(None, use_errno=True)
    with (NAMES / name).open() as namespace:
        if libc.setns(namespace.fileno(), CLONE_NEWNET) != 0:
            number = ctypes.get_errno()
            raise HostsError(f"setns({name}): {os.strerror(number)}")
    return function()
