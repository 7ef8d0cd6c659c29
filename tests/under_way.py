"""What tests ask for one by one and what takes long to make: all of it under way from the start, two at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import pytest

AT_ONCE = 2  # compilers, or programs that mostly wait
Job = TypeVar("Job")
Result = TypeVar("Result")


@contextmanager
def under_way(run: Callable[[Job], Result], jobs: Iterable[Job]) -> Iterator[dict[Job, Future[Result]]]:
    """What each job comes to; those that have not begun when the tests are through never will."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield {job: pool.submit(run, job) for job in jobs}
        pool.shutdown(cancel_futures=True)


def asked_for(request: pytest.FixtureRequest, jobs: Iterable[Job], ids: Callable[[Job], str]) -> list[Job]:
    """Those that are a parameter of a test of this run."""
    selected = {item.name for item in request.session.items}
    return [job for job in jobs if any(f"[{ids(job)}]" in name for name in selected)]
