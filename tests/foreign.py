"""A backend of torch.distributed that is none of torch's: bytes go through its store. It can be told to fail.

Written in Python, as the interface allows; torch's documentation has it under `Backend.register_backend`.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, ClassVar

import torch
import torch.distributed as dist

NAME = "foreign"


class Started(dist._Work):  # type: ignore[misc, name-defined]
    """An operation under way."""

    def __init__(self) -> None:
        super().__init__()
        self.over = threading.Event()
        self.error: Exception | None = None

    def is_completed(self) -> bool:
        return self.over.is_set()

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        self.over.wait(timeout.total_seconds() or None)
        if self.error is not None:
            raise RuntimeError(str(self.error))
        return True


class Foreign(dist.ProcessGroup):
    """What a backend must have for engine torch: `alltoall_base` of uint8 tensors, in order, not blocking.

    Attributes:
        made: All that this process has made, the last one last.
        begun: How many exchanges.
        sent: Bytes that they have sent to other ranks.
        fails_at: The number of the exchange that fails on this rank; None: none.
        fails: How: "started" where it is asked for, "under-way", or "never-ends".
    """

    made: ClassVar[list[Foreign]] = []

    def __init__(self, store: Any, rank: int, nranks: int, timeout: timedelta) -> None:
        super().__init__(rank, nranks)  # type: ignore[call-arg]
        self._store, self._rank, self._nranks = store, rank, nranks
        self.sent = 0
        self.fails_at: int | None = None
        self.fails = "under-way"
        self.begun = 0
        self._todo: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._work, name="foreign", daemon=True).start()
        self.made.append(self)

    def getBackendName(self) -> str:
        return NAME

    # torch's own keeps the name in its backends, of which a ProcessGroup that is written in Python has none.
    def _set_group_name(self, name: str) -> None:
        self._name = name

    @property
    def group_name(self) -> Any:
        return self._name

    def alltoall_base(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        output_counts: Sequence[int],
        input_counts: Sequence[int],
        options: object = None,
    ) -> Started:
        assert output.dtype == input.dtype == torch.uint8
        work, number = Started(), self.begun
        self.begun += 1
        if number == self.fails_at and self.fails == "started":
            raise OSError(f"foreign wire cut at exchange {number}")
        self._todo.put((work, number, output, input, output_counts, input_counts))
        return work

    def _work(self) -> None:
        while True:
            work, *exchange = self._todo.get()
            try:
                self._exchange(*exchange)
            except Exception as error:  # noqa: BLE001 - told by the work
                work.error = error
            work.over.set()

    def _exchange(
        self,
        number: int,
        output: torch.Tensor,
        input: torch.Tensor,
        output_counts: Sequence[int],
        input_counts: Sequence[int],
    ) -> None:
        if number == self.fails_at and self.fails == "never-ends":
            threading.Event().wait()
        if number == self.fails_at:
            raise OSError(f"foreign wire cut at exchange {number}")
        for peer, part in enumerate(torch.split(input, list(input_counts))):
            if part.numel() and peer != self._rank:
                self._store.set(f"{number}/{self._rank}/{peer}", part.numpy().tobytes())
                self.sent += part.numel()
        for peer, part in enumerate(torch.split(output, list(output_counts))):
            if part.numel() and peer != self._rank:
                key = f"{number}/{peer}/{self._rank}"
                while not self._store.check([key]):  # a get() would keep the store to itself until it has come
                    threading.Event().wait(0.0005)
                part.copy_(torch.frombuffer(bytearray(self._store.get(key)), dtype=torch.uint8))
                self._store.delete_key(key)


def register() -> None:
    """Once a process."""
    if NAME not in dist.Backend.backend_list:
        dist.Backend.register_backend(NAME, Foreign, devices=["cpu"])
