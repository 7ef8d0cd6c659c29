"""Hosts for tests (made by benchmarks/hosts.py), and ranks on them; where there can be none, a skip that says why.

with network(2, gbit=1) as net: across(net, 0, 1).run(function)     rank 0 on host 0, rank 1 on host 1
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import ranks

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
from hosts import NAMES, Hosts, HostsError, hosts, sweep, why_no_hosts

__all__ = ["NAMES", "Hosts", "HostsError", "across", "network", "sweep", "why_no_hosts"]


@contextmanager
def network(count: int, gbit: float | None = None) -> Iterator[Hosts]:
    """Hosts, for a fixture: its tests are skipped where there can be none. Pools on them end with them."""
    if why := why_no_hosts():
        pytest.skip(why)
    with hosts(count, gbit) as net:
        try:
            yield net
        finally:
            ranks.close_pools(net)


def across(net: Hosts, *places: int) -> ranks.Pool:
    """The pool whose rank r is on host places[r]."""
    return ranks.pool(len(places), ranks.Placement(net, places))
