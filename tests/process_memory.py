"""The memory of this process: how much there is, and a limit to how much it may become."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def status_kib(field: str) -> int:
    """One line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


@contextmanager
def memory_limit(extra: int) -> Iterator[None]:
    """Lets private writable memory grow by `extra` bytes; allocations beyond that fail."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (status_kib("VmData") * 1024 + extra, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
