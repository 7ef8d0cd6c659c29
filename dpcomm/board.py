"""Ranks tell each other small things through torchrun's store, step by step, and all learn the first error of a step.

For commands, before there is a communicator and without a process group. Every wait ends at one deadline.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, NamedTuple

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

from dpcomm.errors import ArgumentError, CommTimeoutError, Error, InternalError, PeerLostError, from_native
from dpcomm.store_calls import NoAnswerError, StoreCalls

FIRST_PAUSE_S, LAST_PAUSE_S = 0.001, 0.05
ANSWER_S = 0.5  # that the store has for an answer, the deadline past or not
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class Place(NamedTuple):
    """What torchrun tells a process.

    Attributes:
        local_rank: Among those of its host.
        hosted: Whether torchrun keeps the store; else rank 0 does.
        attempt: How often torchrun has started the ranks anew.
    """

    rank: int
    nranks: int
    local_rank: int
    host: str
    port: int
    hosted: bool
    attempt: str


def place(environment: Mapping[str, str]) -> Place:
    """Reads torchrun's environment.

    Raises:
        ArgumentError: It is not there, or makes no sense.
    """
    missing = [name for name in VARIABLES if not environment.get(name)]
    if missing:
        raise ArgumentError(f"{', '.join(missing)} not set, which torchrun sets")
    numbers = {name: environment[name] for name in VARIABLES if name != "MASTER_ADDR"}
    for name, text in numbers.items():
        if not text.isdecimal():
            raise ArgumentError(f"{name}={text!r}: expected a number, as torchrun sets it")
    rank, nranks, local_rank, port = (int(text) for text in numbers.values())
    if rank >= nranks:
        raise ArgumentError(f"RANK={rank}, WORLD_SIZE={nranks}: expected RANK < WORLD_SIZE, as torchrun sets them")
    hosted = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    return Place(rank, nranks, local_rank, environment["MASTER_ADDR"], port, hosted, attempt)


def connect(where: Place, timeout_s: float) -> Store:
    """The store, which rank 0 makes unless torchrun has. Keys are those of this start alone.

    Raises:
        CommTimeoutError: There is none, or it does not answer.
    """

    def make() -> Store:
        keeps = where.rank == 0 and not where.hosted
        limit = timedelta(seconds=timeout_s)
        return dist.TCPStore(  # type: ignore[attr-defined]
            where.host, where.port, where.nranks, is_master=keeps, timeout=limit, wait_for_workers=False
        )

    try:
        store = StoreCalls().make(make, (), timeout_s)  # which has pauses of its own that may take longer
    except (NoAnswerError, RuntimeError) as error:
        raise CommTimeoutError(
            f"rank {where.rank}: no store at {where.host}, port {where.port} (MASTER_ADDR, MASTER_PORT): "
            f"{str(error) or 'no answer'}. Has rank 0 started, and is the port open?"
        ) from error
    return PrefixStore(f"dpcomm-info/{where.attempt}", store)


class Board:
    """One rank's view."""

    def __init__(self, store: Any, rank: int, nranks: int, deadline: float) -> None:
        self.store, self.rank, self.nranks = store, rank, nranks
        self.step = "begin"
        self._deadline = deadline  # of time.monotonic()
        self._calls = StoreCalls()

    def left_s(self) -> float:
        """Seconds to the deadline, at least one millisecond."""
        return max(self._deadline - time.monotonic(), 0.001)

    def share(self, step: str, work: Callable[[], Any]) -> list[Any]:
        """Does this rank's part of a step and tells what came out, which JSON can say; the same steps on all ranks.

        Returns:
            What came out on each rank.

        Raises:
            Error: This rank's own, or that of the lowest rank that failed; CommTimeoutError for ranks that did not
                come.
        """
        self.step = step
        own: Error | None = None
        record: dict[str, Any] = {}
        try:
            record["value"] = work()
        except Error as error:
            own = error
        except (OSError, RuntimeError, ValueError, TypeError, MemoryError) as error:
            own = InternalError(f"rank {self.rank}: {type(error).__name__}: {error}")
        if own is not None:
            record = {"code": own.code, "message": str(own)}
        self._ask(self.store.set, f"{step}/{self.rank}", json.dumps(record))
        if own is not None:
            raise own
        records = [self._read(step, rank) for rank in range(self.nranks)]
        for other in records:
            if "code" in other:
                raise from_native(other["code"], other["message"])
        return [other["value"] for other in records]

    def first(self, name: str) -> bool:
        """Whether this rank is the first to ask, of all."""
        return int(self._ask(self.store.add, name, 1)) == 1

    def tell(self, name: str) -> None:
        """Lets those go on that `await_word` the same."""
        self._ask(self.store.set, name, "1")

    def await_word(self, name: str, timeout_s: float) -> None:
        """Waits until `tell(name)` was called, timeout_s at most."""
        until = time.monotonic() + timeout_s
        while not self._ask(self.store.check, [name]) and time.monotonic() < until:
            time.sleep(LAST_PAUSE_S)

    def leave(self, timeout_s: float) -> None:
        """The last call. Rank 0 stays until the others have made it, timeout_s at most: the store may be in it."""
        self._ask(self.store.set, f"leave/{self.rank}", "1")
        until = time.monotonic() + timeout_s
        keys = [f"leave/{rank}" for rank in range(self.nranks)]
        while self.rank == 0 and not self._ask(self.store.check, keys) and time.monotonic() < until:
            time.sleep(LAST_PAUSE_S)

    def _read(self, step: str, rank: int) -> dict[str, Any]:
        key, pause = f"{step}/{rank}", FIRST_PAUSE_S
        while not self._ask(self.store.check, [key]):
            if time.monotonic() >= self._deadline:
                raise self._late(step)
            time.sleep(min(pause, self.left_s()))
            pause = min(2 * pause, LAST_PAUSE_S)
        made: dict[str, Any] = json.loads(self._ask(self.store.get, key))
        return made

    def _late(self, step: str) -> CommTimeoutError:
        missing = [rank for rank in range(self.nranks) if not self._ask(self.store.check, [f"{step}/{rank}"])]
        return CommTimeoutError(
            f"ranks {missing} of {self.nranks} did not come to step '{step}' in time. Were they started, with the same "
            "MASTER_ADDR and MASTER_PORT?",
            waiting_for=tuple(missing),
        )

    def _ask(self, call: Callable[..., Any], *arguments: object) -> Any:
        try:
            return self._calls.make(call, arguments, max(self._deadline - time.monotonic(), ANSWER_S))
        except NoAnswerError:
            raise CommTimeoutError(f"rank {self.rank}: the torch store did not answer at step '{self.step}'") from None
        except RuntimeError as error:
            raise PeerLostError(
                f"rank {self.rank}: the torch store failed at step '{self.step}': {error}. Has the process that hosts "
                "it ended?"
            ) from error
