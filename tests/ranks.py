"""Ranks as processes, for tests: a pool that stays for many tests, or fresh ranks that may die.

    pool(2).run(function, *args)     function(rank, nranks, *args) on every rank, returns the results in rank order
    fresh(3, function, *args)        new processes; returns what became of each, death included
    placement=Placement(net, (0, 0, 1))   of both: on hosts of networks.py instead of this one

`function` is a module-level function, called with a gloo process group initialised. Nothing here waits without an end:
after `deadline_s` a rank writes all its stacks and exits, and the caller gets them in a DeadlineError.
"""

from __future__ import annotations

import atexit
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from rank_process import Failure, Place, Report

if TYPE_CHECKING:
    from hosts import Hosts

START_S = 50.0  # ranks import torch, several at a time on few cores
DEADLINE_S = 45.0  # below the deadline of a test, which ends the whole run
GRACE_S = 5.0  # for the others once a rank of a pool has failed, and for writing stacks
WORKER = "import json, sys; from rank_process import Place, main; main(Place(**json.loads(sys.argv[1])))"
DEFAULT_ENV = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
PLACED_ENV = {"GLOO_SOCKET_IFNAME": "eth0", "TORCH_CPP_LOG_LEVEL": "ERROR"}  # addresses there have no names: c10d warns

Environment = Mapping[str, str] | Sequence[Mapping[str, str]]  # of all ranks, or one for each


class RankError(RuntimeError):
    """A rank failed; the text carries its traceback."""


class DeadlineError(RankError, TimeoutError):
    """Ranks did not finish in time; the text carries the stacks of all of them."""


@dataclass(frozen=True)
class Placement:
    """On which of these hosts each rank is."""

    net: Hosts
    hosts: tuple[int, ...]


@dataclass(frozen=True)
class Outcome:
    """What became of one rank. Times are of the monotonic clock, comparable between ranks."""

    rank: int
    pid: int
    value: Any
    error: Failure | None
    exitcode: int | None  # as of the shell's wait: -9 for SIGKILL; None: lives on (pool)
    began: float | None
    ended: float

    @property
    def signal(self) -> int | None:
        return -self.exitcode if self.exitcode is not None and self.exitcode < 0 else None

    @property
    def seconds(self) -> float | None:
        return None if self.began is None else self.ended - self.began


class Member:
    """One process, leader of a session of its own so that its forked children can be ended with it."""

    def __init__(self, place: Place, parent: Connection, child: Connection, prefix: Sequence[str] = ()) -> None:
        env = {**os.environ, **DEFAULT_ENV, **place.env, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [*prefix, sys.executable, "-c", WORKER, json.dumps(asdict(place))]
        self.process = subprocess.Popen(command, env=env, pass_fds=[child.fileno()], start_new_session=True)
        child.close()
        self.rank, self.log, self.pipe = place.rank, Path(place.log), parent
        self.pid = self.process.pid
        self.exited = os.pidfd_open(self.pid)  # the pipe is no sign: children of the rank hold it open, too

    def exitcode(self) -> int | None:
        """Without reaping: the number stays ours until `end`, so that no stranger can be hit by its signal."""
        status = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        if status is None:
            return None
        return status.si_status if status.si_code == os.CLD_EXITED else -status.si_status

    def end(self) -> None:
        if self.process.returncode is None:
            os.killpg(self.pid, signal.SIGKILL)
            self.process.wait()
            self.pipe.close()
            os.close(self.exited)

    def timed_out(self) -> bool:
        return "Timeout (" in self.log.read_text()  # the first line that faulthandler writes

    def last_words(self) -> str:
        return f"--- rank {self.rank} (pid {self.pid}, exit {self.exitcode()})\n{self.log.read_text() or '(no stacks)'}"


def serve_store(net: Hosts | None = None) -> Any:
    """The rendezvous of a process group. It lives in the parent, so no rank's death takes it away."""
    if net is not None:
        return net.inside(lambda: listen(net.store_host))
    return listen(Place.store_host)


def listen(host: str) -> Any:
    return dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]


class Crew:
    """The processes of one communicator's ranks, from start to end."""

    def __init__(
        self,
        nranks: int,
        *,
        process_group: bool = True,
        env: Environment | None = None,
        placement: Placement | None = None,
    ) -> None:
        assert placement is None or len(placement.hosts) == nranks, f"{nranks} ranks, but {placement}"
        self.nranks, self.placement = nranks, placement
        self.folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self.store = serve_store(placement.net if placement else None) if process_group else None
        self.members: list[Member] = []
        try:
            for rank in range(nranks):
                own = env or {} if env is None or isinstance(env, Mapping) else env[rank]
                self.members.append(self._member(rank, dict(own)))
            self._await_ready()
        except BaseException:
            self.end()
            raise

    def _member(self, rank: int, env: dict[str, str]) -> Member:
        parent, child = Pipe()
        log = Path(self.folder.name, f"rank{rank}.log")
        log.touch()
        place = Place(
            rank, self.nranks, child.fileno(), str(log), self.store.port if self.store is not None else 0, env
        )
        if self.placement is None:
            return Member(place, parent, child)
        net = self.placement.net
        place = replace(place, store_host=net.store_host, env={**PLACED_ENV, **env})
        return Member(place, parent, child, net.command(self.placement.hosts[rank]))

    def _await_ready(self) -> None:
        deadline = time.monotonic() + START_S
        for m in self.members:
            if m.pipe not in wait([m.pipe, m.exited], max(0.0, deadline - time.monotonic())):
                raise DeadlineError(f"rank {m.rank} did not start within {START_S:g} s\n{m.last_words()}")
            m.pipe.recv_bytes()

    def give(self, function: Callable[..., Any], args: tuple[Any, ...], deadline_s: float, *, last: bool) -> None:
        task = pickle.dumps((function, args))
        for m in self.members:
            m.pipe.send_bytes(pickle.dumps((deadline_s, last, task)))

    def collect(self, deadline_s: float, *, until_exit: bool) -> dict[int, Outcome]:
        """What became of each rank; those that are missing were still at work at the deadline.

        Fresh ranks are waited for until they exit. A pool's ranks only report, and once one has failed the others have
        GRACE_S left: they may wait for it.
        """
        end = time.monotonic() + deadline_s + GRACE_S  # ranks end themselves at deadline_s, stacks written
        reports: dict[int, Report] = {}
        outcomes: dict[int, Outcome] = {}
        while waiting := [m for m in self.members if m.rank not in outcomes]:
            sources: list[Any] = [m.exited for m in waiting] + [m.pipe for m in waiting if m.rank not in reports]
            ready = wait(sources, max(0.0, end - time.monotonic()))
            if not ready:
                break
            for m in waiting:
                if m.pipe in ready or m.exited in ready:
                    self._read(m, reports)
                if m.exited in ready or (m.rank in reports and not until_exit):
                    outcomes[m.rank] = self._outcome(m, reports.get(m.rank))
            if not until_exit and any(failed(o) for o in outcomes.values()):
                end = min(end, time.monotonic() + GRACE_S)
        return {r: o for r, o in outcomes.items() if not self.members[r].timed_out()}

    def _read(self, m: Member, reports: dict[int, Report]) -> None:
        """A rank's report, if there is one; a closed pipe is followed by the exit that `collect` waits for."""
        if m.rank in reports or not m.pipe.poll():
            return
        try:
            reports[m.rank] = pickle.loads(m.pipe.recv_bytes())
        except (EOFError, ConnectionResetError):
            wait([m.exited], GRACE_S)

    def _outcome(self, m: Member, report: Report | None) -> Outcome:
        if report is None:
            return Outcome(m.rank, m.pid, None, None, m.exitcode(), None, time.monotonic())
        return Outcome(m.rank, m.pid, report.value, report.failure, m.exitcode(), report.began, report.ended)

    def too_late(self, outcomes: Mapping[int, Outcome]) -> DeadlineError:
        late = [r for r in range(self.nranks) if r not in outcomes]
        words = "\n".join(m.last_words() for m in self.members)
        return DeadlineError(f"ranks {late} of {self.nranks} did not finish in time\n{words}")

    def end(self) -> None:
        for m in self.members:
            m.end()
        self.folder.cleanup()
        self.store = None


def failed(outcome: Outcome) -> bool:
    return outcome.error is not None or outcome.exitcode is not None


class Pool:
    """Ranks that serve many calls. A failure of any rank ends them all: `pool` starts new ones for the next test."""

    def __init__(self, nranks: int, *, env: Environment | None = None, placement: Placement | None = None) -> None:
        self.crew = Crew(nranks, env=env, placement=placement)
        self.broken = False

    def run(self, function: Callable[..., Any], *args: Any, deadline_s: float = DEADLINE_S) -> list[Any]:
        """Calls function(rank, nranks, *args) on every rank and returns their results in rank order.

        Raises:
            DeadlineError: not all ranks returned within `deadline_s`; the text carries their stacks.
            Exception: what the first rank to fail raised, its traceback in the cause; RankError if the rank died.
        """
        if self.broken:
            raise RankError("this pool has failed before; ask pool() for a new one")
        self.broken = True  # until all ranks have returned: whatever leaves this function leaves ranks at work
        try:
            self.crew.give(function, args, deadline_s, last=False)
            outcomes = self.crew.collect(deadline_s, until_exit=False)
            failures = sorted((o for o in outcomes.values() if failed(o)), key=lambda o: o.ended)
            if failures:
                self._raise(failures[0])
            if len(outcomes) < self.crew.nranks:
                raise self.crew.too_late(outcomes)
            self.broken = False
        finally:
            if self.broken:
                self.crew.end()
        return [outcomes[r].value for r in range(self.crew.nranks)]

    def _raise(self, o: Outcome) -> None:
        if o.error is None:
            raise RankError(f"rank {o.rank} died\n{self.crew.members[o.rank].last_words()}")
        cause = RankError(f"in rank {o.rank} of {self.crew.nranks}:\n{o.error.trace}")
        if o.error.pickled is None:
            raise cause
        error = pickle.loads(o.error.pickled)
        if isinstance(error, KeyboardInterrupt | SystemExit):  # a rank's are none of this process
            raise cause
        raise error from cause

    def close(self) -> None:
        self.broken = True
        self.crew.end()


_pools: dict[tuple[int, Placement | None], Pool] = {}


def pool(nranks: int, placement: Placement | None = None) -> Pool:
    """The pool of this many ranks at these places, started at its first use and after a failure."""
    key = nranks, placement
    if key not in _pools or _pools[key].broken:
        _pools[key] = Pool(nranks, placement=placement)
    return _pools[key]


@atexit.register
def close_pools(net: Hosts | None = None) -> None:
    """All, or those that are on these hosts."""
    for key in [k for k in _pools if net is None or (k[1] is not None and k[1].net is net)]:
        _pools.pop(key).close()


def fresh(
    nranks: int,
    function: Callable[..., Any],
    *args: Any,
    deadline_s: float = DEADLINE_S,
    process_group: bool = True,
    env: Environment | None = None,
    placement: Placement | None = None,
) -> list[Outcome]:
    """Calls function(rank, nranks, *args) in new processes, waits for their exit and says what became of each.

    Raises:
        DeadlineError: a rank was still at work at the deadline; the text carries the stacks of all.
    """
    crew = Crew(nranks, process_group=process_group, env=env, placement=placement)
    try:
        crew.give(function, args, deadline_s, last=True)
        outcomes = crew.collect(deadline_s, until_exit=True)
        if len(outcomes) < nranks:
            raise crew.too_late(outcomes)
        return [outcomes[r] for r in range(nranks)]
    finally:
        crew.end()
