"""Fixtures of all tests: pools of ranks, and GPU tests that are skipped with their reason where there is no GPU.

The hard deadline of each test is `timeout` in pyproject.toml (pytest-timeout): it dumps all stacks and ends the run.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from functools import cache

import cases
import pytest
import ranks

import dpcomm


@cache
def why_no_gpu() -> str:
    """Empty where a CUDA device can be used. Asks the driver itself: torch may be a build without CUDA."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return f"no GPU: {error}"
    count = ctypes.c_int(0)
    status = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if status != 0:
        return f"no GPU: the CUDA driver answers error {status}"
    return "" if count.value > 0 else "no GPU: the CUDA driver finds no device"


def pytest_configure(config: pytest.Config) -> None:
    if not config.getini("timeout"):
        raise pytest.UsageError("tests wait for other processes: set `timeout` in pyproject.toml")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and why_no_gpu():
        pytest.skip(why_no_gpu())


@pytest.fixture(scope="session")
def pool() -> Iterator[Callable[[int], ranks.Pool]]:
    """pool(n).run(function, *args): see ranks.py."""
    yield ranks.pool
    ranks.close_pools()


@pytest.fixture(scope="module")
def pair() -> Iterator[list[dpcomm.Communicator]]:
    """Two ranks that are threads of this process."""
    comms = cases.local(2)
    yield comms
    for comm in comms:
        comm.close()
