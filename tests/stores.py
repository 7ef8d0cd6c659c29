"""Stores for tests of construction: one that looks at what a rank publishes, and changes or delays it.

Ranks may be threads: a HashStore serves all threads of a process, and a communicator's construction knows no better.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist
from faulty import in_threads

import dpcomm


class Spy(dist.Store):  # type: ignore[misc, name-defined]
    """One rank's view of a store. `publish(stage, record)` returns what is stored instead, or None for nothing."""

    def __init__(self, store: Any, publish: Callable[[str, bytes], bytes | None]) -> None:
        super().__init__()
        self._store, self._publish = store, publish

    def set(self, key: str, value: bytes) -> None:
        changed = self._publish(key.split("/")[-2], value)  # dpcomm/<group>/<n>/<stage>/<rank>
        if changed is not None:
            self._store.set(key, changed)

    def get(self, key: str) -> bytes:
        return bytes(self._store.get(key))

    def check(self, keys: list[str]) -> bool:
        return bool(self._store.check(keys))

    def add(self, key: str, amount: int) -> int:
        return int(self._store.add(key, amount))


def build(
    stores: Sequence[Any], options: Sequence[dict[str, Any]] | None = None, nranks: int | None = None
) -> list[Any]:
    """Communicators, or what their construction raised, of ranks that are threads with a store each."""
    asked = options or [{}] * len(stores)
    return in_threads(
        [
            lambda r=r, s=s, o=o: dpcomm.Communicator(  # type: ignore[misc]
                rank=r, nranks=nranks or len(stores), store=s, **{"timeout_s": 10.0, **o}
            )
            for r, (s, o) in enumerate(zip(stores, asked, strict=True))
        ]
    )


def with_spy_on_rank_1(nranks: int, publish: Callable[[str, bytes], bytes | None]) -> list[Any]:
    store = dist.HashStore()  # type: ignore[attr-defined]
    return [Spy(store, publish) if rank == 1 else store for rank in range(nranks)]


def at(stage: str, act: Callable[[bytes], bytes | None]) -> Callable[[str, bytes], bytes | None]:
    """A `publish` that acts at one stage only."""
    return lambda here, record: act(record) if here == stage else record
