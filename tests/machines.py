"""Two machines for tests, as a user meets them: hosts of networks.py that also have names, and know each other's.

Commands run in a folder of the user's, with programs of the test's own on PATH; what they print is read when they end.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from networks import Hosts

ROOT = Path(__file__).resolve().parent.parent
RUN_S = 200.0  # a torchrun of four processes that import torch; 10 s where nothing else runs
COMMAND_S = 30.0
GRACE_S = 15.0  # for the others, once one has failed
# As the start of a machine: its own /etc/hosts and name.
ENTER = 'mount --bind "$1" /etc/hosts && hostname "$2" && shift 2 && exec "$@"'
FILTERED = "5"  # place of a firewall's rules, before that of the table of local addresses


class Started(NamedTuple):
    """A process on a machine, and the file of what it prints."""

    process: subprocess.Popen[bytes]
    output: Path


class Machines:
    """Two of them, in whose folder the user works."""

    def __init__(self, net: Hosts, folder: Path) -> None:
        self.net, self.folder = net, folder
        self.numbers = itertools.count()
        (folder / "bin").mkdir()
        (folder / "examples").symlink_to(ROOT / "examples")
        self.names = folder / "hosts"
        lines = ["127.0.0.1 localhost", *(f"{net.address(node)} node{node}" for node in range(2))]
        self.names.write_text("\n".join(lines) + "\n")
        self.stand_in("sudo", 'exec "$@"')

    def stand_in(self, name: str, script: str) -> None:
        file = self.folder / "bin" / name
        file.write_text(f"#!/bin/bash\n{script}\n")
        file.chmod(0o755)

    def enter(self, node: int) -> list[str]:
        own = ["unshare", "--uts", "--mount", "sh", "-ec", ENTER, "sh", str(self.names), f"node{node}"]
        return [*self.net.command(node), *own]

    def start(self, node: int, script: str, **variables: str) -> Started:
        path = os.pathsep.join([str(self.folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
        given = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "TORCH_CPP_LOG_LEVEL": "ERROR", **variables}
        given.pop("GLOO_SOCKET_IFNAME", None)
        command = [*self.enter(node), "bash", "-euo", "pipefail", "-c", script]
        output = self.folder / f"output{next(self.numbers)}"
        with output.open("w") as file:
            process = subprocess.Popen(command, cwd=self.folder, env=given, stdout=file, stderr=subprocess.STDOUT)
        return Started(process, output)

    def finish(self, *started: Started) -> list[str]:
        """What each printed, once all have ended well; where one has not, others are not waited for much longer."""
        failed = time.monotonic()
        until = failed + RUN_S
        while any(one.process.poll() is None for one in started) and time.monotonic() < until:
            if any(one.process.returncode for one in started):
                until = min(until, failed + GRACE_S)
            else:
                failed = time.monotonic()
            time.sleep(0.05)
        outputs = [one.output.read_text() for one in started]
        assert [one.process.returncode for one in started] == [0] * len(started), "\n".join(outputs)
        return outputs

    @contextlib.contextmanager
    def nothing_left(self) -> Iterator[None]:
        """Ends what was started meanwhile and has not ended."""

        def pids() -> set[int]:
            return {pid for node in range(2) for pid in self.net.pids(node)}

        before = pids()
        try:
            yield
        finally:
            for pid in pids() - before:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def run(self, node: int, *command: str) -> None:
        subprocess.run([*self.net.command(node), *command], check=True, capture_output=True, timeout=COMMAND_S)

    @contextlib.contextmanager
    def firewall(self, closed: dict[int, list[str]]) -> Iterator[None]:
        """Drops what arrives for TCP ports, by machine."""
        rule = ("ip", "rule")
        try:
            for node, ports in closed.items():
                self.run(node, *rule, "add", "pref", "10", "lookup", "local")
                self.run(node, *rule, "del", "pref", "0")
                for span in ports:
                    what = ("iif", "eth0", "ipproto", "tcp", "dport", span)
                    self.run(node, *rule, "add", "pref", FILTERED, *what, "blackhole")
            yield
        finally:
            for node, ports in closed.items():
                self.run(node, *rule, "add", "pref", "0", "lookup", "local")
                self.run(node, *rule, "del", "pref", "10")
                for _ in ports:
                    self.run(node, *rule, "del", "pref", FILTERED)

    @contextlib.contextmanager
    def usual_ports(self) -> Iterator[None]:
        """Back to those that the system chooses, after a block that has changed them."""
        usual = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text()
        try:
            yield
        finally:
            for node in range(2):
                self.run(node, "sysctl", "-w", f"net.ipv4.ip_local_port_range={usual.strip()}")
