"""A model of who may write which slot when: core/direct.h and core/oneshot.h with numbers instead of data.

All ranks run the same program of writes, posts, waits and reads, so where each of them stands in it is the whole state:
a rank passes a wait once every peer has made that post. Every reachable combination is looked at. It is a fault if a
rank may write a slot whose earlier message some rank has yet to read, or may be reading; or if nobody can go on.

Whether ranks share one slot per message (shared memory) or have one each (GPUs) makes no difference here: a writer
must know that *all* readers are done in either case.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

GIVEN, RESULT, HEADER = "given", "result", "header"  # what is written; each has slots of its own
Call = tuple[str, int]  # algorithm, slices


@dataclass(frozen=True)
class Step:
    kind: str  # write read post wait
    stream: str
    number: int  # of the message
    peer: int = 0  # post: how many peers after me this one goes to


class Program:
    """What one rank does in a sequence of calls, in order."""

    def __init__(self, calls: Sequence[Call], nranks: int) -> None:
        self.nranks = nranks
        self.sent = {GIVEN: 0, RESULT: 0}
        self.steps: list[Step] = []
        for sequence, (algorithm, slices) in enumerate(calls):
            self.steps += [Step("write", HEADER, sequence), *self.post(HEADER, sequence)]  # announce
            self.steps += self.direct(sequence, slices) if algorithm == "direct" else self.oneshot(sequence, slices)

    def post(self, stream: str, number: int) -> Iterator[Step]:
        """One peer after the other: the first may run ahead before the last has heard."""
        for peer in range(1, self.nranks):
            yield Step("post", stream, number, peer)

    @staticmethod
    def agree(sequence: int) -> Iterator[Step]:
        yield Step("wait", HEADER, sequence)
        yield Step("read", HEADER, sequence)

    def direct(self, sequence: int, slices: int) -> Iterator[Step]:
        given, results = self.sent[GIVEN], self.sent[RESULT]
        for c in range(slices + 2):
            if c < slices:  # give(c)
                yield Step("write", GIVEN, given + c)
                yield from self.post(GIVEN, given + c)
            if c == 1:
                yield from self.agree(sequence)
            if 1 <= c <= slices:  # arrived(c - 1), reduce(c - 1)
                yield Step("wait", GIVEN, given + c - 1)
                yield Step("read", GIVEN, given + c - 1)
                yield Step("write", RESULT, results + c - 1)
                yield from self.post(RESULT, results + c - 1)
            if c >= 2:  # take(c - 2)
                yield Step("wait", RESULT, results + c - 2)
                yield Step("read", RESULT, results + c - 2)
        self.sent = {GIVEN: given + slices, RESULT: results + slices}

    def oneshot(self, sequence: int, slices: int) -> Iterator[Step]:
        results = self.sent[RESULT]
        for c in range(slices):
            yield Step("write", RESULT, results + c)
            yield from self.post(RESULT, results + c)
            if c == 0:
                yield from self.agree(sequence)
            yield Step("wait", RESULT, results + c)
            yield Step("read", RESULT, results + c)
        self.sent[RESULT] = results + slices


def fault(calls: Sequence[Call], nranks: int, slots: int, pages: int = 2) -> str:
    """ "": no interleaving of the ranks goes wrong; else what does."""
    steps = Program(calls, nranks).steps
    place = {(s.kind, s.stream, s.number, s.peer): i for i, s in enumerate(steps)}
    depth = {GIVEN: slots, RESULT: slots, HEADER: pages}

    def enabled(state: tuple[int, ...], rank: int) -> bool:
        step = steps[state[rank]]
        if step.kind != "wait":
            return True
        peers = ((rank - r) % nranks for r in range(nranks) if r != rank)
        writers = (r for r in range(nranks) if r != rank)
        return all(state[r] > place["post", step.stream, step.number, k] for r, k in zip(writers, peers, strict=True))

    def overwrites(state: tuple[int, ...], rank: int) -> bool:
        step = steps[state[rank]]
        old = step.number - depth[step.stream]
        if step.kind != "write" or old < 0:
            return False
        read = place["read", step.stream, old, 0]  # at or before it: has not read it, or is just reading
        return any(state[r] <= read for r in range(nranks))  # itself, too: a lossy codec sends to itself

    start = (0,) * nranks
    seen, todo = {start}, [start]
    while todo:
        state = todo.pop()
        running = [r for r in range(nranks) if state[r] < len(steps)]
        moves = [r for r in running if enabled(state, r)]
        if running and not moves:
            return f"deadlock at {state}"
        for r in moves:
            if overwrites(state, r):
                return f"rank {r} overwrites {steps[state[r]].stream} message at {state}"
            following = (*state[:r], state[r] + 1, *state[r + 1 :])
            if following not in seen:
                seen.add(following)
                todo.append(following)
    return ""
