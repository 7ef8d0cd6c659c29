"""The rank processes of one contender: started once, asked line by line (the words are in pipes.h and turns.h).

It knows neither what a contender is made of nor what is measured. Whoever does not answer in time is killed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import selectors
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

POLL_S = 0.2  # how long an answer is waited for before the processes are looked at
END_S = 3.0  # for a contender to end by itself
LOG_CHARS = 500


class ContenderError(Exception):
    """A contender that cannot go on, and why."""


@dataclasses.dataclass(frozen=True)
class Contender:
    """A program to start. In its command {folder}, {rank} and {ranks} are replaced."""

    name: str
    variants: tuple[str, ...]
    command: tuple[str, ...]
    launcher: bool = False  # the command starts all ranks itself; else it is run once for each
    env: dict[str, str] = dataclasses.field(default_factory=dict)
    sums: bool = True  # false for the floor, which has no result to check


class Group:
    """All ranks of a contender, from start to stop()."""

    def __init__(self, contender: Contender, ranks: int, pin: bool, deadline_s: float) -> None:
        """Starts them and waits until all are ready.

        Raises:
            ContenderError: They are not ready in time, or one says that it failed; all have been killed.
        """
        self.contender = contender
        self.version = ""
        self._pids: list[int] = []
        self._folder = Path(tempfile.mkdtemp(prefix=f"rivals-{contender.name}-"))
        self._to = [self._fifo(f"to.{rank}") for rank in range(ranks)]
        self._from = [self._fifo(f"from.{rank}") for rank in range(ranks)]
        self._unread = [b""] * ranks
        self._processes: list[subprocess.Popen[bytes]] = []
        try:
            self._start(ranks, pin)
            self._meet(time.monotonic() + deadline_s)
        except BaseException:
            self.kill()
            raise

    def ask(self, line: str, deadline_s: float) -> list[list[str]]:
        """Sends a line to all ranks and returns the words of each one's answer, without the first.

        Raises:
            ContenderError: A rank failed, ended, or did not answer in time; all have been killed.
        """
        try:
            self._send(line)
            return [words[1:] for words in self._answers(time.monotonic() + deadline_s)]
        except BaseException:
            self.kill()
            raise

    def stop(self) -> None:
        """Lets all ranks end, and kills those that do not. May be called again."""
        for fd in [*self._to, *self._from]:
            os.close(fd)
        self._to, self._from = [], []
        self._wait(END_S)
        self.kill()

    def kill(self) -> None:
        """Ends all processes at once. A launcher is asked first: it knows ranks that have not said their pid."""
        for process in self._processes:
            if process.poll() is None:
                process.terminate()
        self._wait(END_S if self.contender.launcher and any(p.poll() is None for p in self._processes) else 0)
        if any(process.poll() is None for process in self._processes) or self.contender.launcher:
            for pid in self._pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        self._processes = []
        for fd in [*self._to, *self._from]:
            os.close(fd)
        self._to, self._from, self._pids = [], [], []
        shutil.rmtree(self._folder, ignore_errors=True)

    def _fifo(self, name: str) -> int:
        path = self._folder / name
        os.mkfifo(path)
        # Both ways, so that neither side's open() waits for the other one.
        return os.open(path, os.O_RDWR)

    def _start(self, ranks: int, pin: bool) -> None:
        env = {**os.environ, **self.contender.env, **({"RIVALS_PIN": "1"} if pin else {})}
        with (self._folder / "log").open("wb") as log:
            for rank in range(1 if self.contender.launcher else ranks):
                words = {"{folder}": str(self._folder), "{rank}": str(rank), "{ranks}": str(ranks)}
                command = [words.get(word, word) for word in self.contender.command]
                try:
                    process = subprocess.Popen(
                        command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                    )
                except OSError as error:
                    raise ContenderError(f"cannot start {command[0]}: {error.strerror}") from None
                self._processes.append(process)

    def _meet(self, deadline: float) -> None:
        while True:
            answers = self._answers(deadline)
            if all(words[0] == "exchange" for words in answers):
                self._send(" ".join(["exchanged", *(words[1] for words in answers)]))
            elif all(words[0] == "ready" for words in answers):
                self._pids = [int(words[1]) for words in answers]
                self.version = " ".join(answers[0][2:])
                return
            else:
                raise ContenderError(f"ranks are out of step: {[words[0] for words in answers]}")

    def _send(self, line: str) -> None:
        for fd in self._to:
            os.write(fd, line.encode() + b"\n")

    def _answers(self, deadline: float) -> list[list[str]]:
        """One line of each rank, as words."""
        lines: dict[int, list[str]] = {}
        with selectors.DefaultSelector() as selector:
            for rank, fd in enumerate(self._from):
                selector.register(fd, selectors.EVENT_READ, rank)
            while len(lines) < len(self._from):
                ready = [key.data for key, _ in selector.select(POLL_S)]
                if not ready:
                    self._look(deadline, missing=set(range(len(self._from))) - set(lines))
                for rank in ready:
                    self._unread[rank] += os.read(self._from[rank], 1 << 16)
                for rank in set(range(len(self._from))) - set(lines):
                    line, newline, rest = self._unread[rank].partition(b"\n")
                    if newline:
                        self._unread[rank] = rest
                        lines[rank] = self._words(rank, line)
        return [lines[rank] for rank in range(len(self._from))]

    def _words(self, rank: int, line: bytes) -> list[str]:
        words = line.decode(errors="replace").split()
        if not words or words[0] == "failed":
            raise ContenderError(f"rank {rank}: {' '.join(words[1:])}")
        return words

    def _look(self, deadline: float, missing: set[int]) -> None:
        """Why is there no answer?"""
        for process in self._processes:
            status = process.poll()
            if status is not None:
                raise ContenderError(f"ended with status {status}. {self._log()}".strip())
        if time.monotonic() > deadline:
            raise ContenderError(f"no answer in time from ranks {sorted(missing)}. {self._log()}".strip())

    def _log(self) -> str:
        return " ".join((self._folder / "log").read_text(errors="replace").split())[-LOG_CHARS:]

    def _wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while any(process.poll() is None for process in self._processes) and time.monotonic() < deadline:
            time.sleep(0.01)
