"""A model of csrc/cpu/wait.cpp: every interleaving of a reader (nap) and a writer (post_and_wake), store buffers too.

Each process has a first-in-first-out store buffer, as x86 processors have (TSO); a read-modify-write empties its own
first. The 100 ms limit of a nap is left out: a reader that only that would save counts as asleep for ever.

    reader   check: v = value; if v >= target: next target         writer   data = v
             seen = value                                                   value <- v          W1  exchange
             sleeping <- 1                      R1  exchange                s = sleeping        W2
             again = value                      R2                          if s: wake
             if again < target and again == seen: futex_wait(seen)
             sleeping <- 0; goto check
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

VALUE, SLEEPING, DATA = range(3)  # the words of memory
Regs = tuple[int, ...]
Buffer = tuple[tuple[int, int], ...]  # (word, value), oldest first


@dataclass(frozen=True)
class Step:
    """One instruction. `value` of a store and `when` of a jump look at the process's registers."""

    kind: str  # load store exchange jump futex_wait wake check_data
    word: int = VALUE
    reg: int = 0
    value: Callable[[Regs], int] = lambda regs: 0
    when: Callable[[Regs], bool] = lambda regs: True
    to: int = 0


SEEN, AGAIN, TARGET, LAST = range(4)  # registers of the reader
POST, SLEEPS, POSTS = range(3)  # registers of the writer


def reader_program(mutant: str) -> list[Step]:
    """nap() inside wait_long()'s loop; one step per access to memory."""

    def store_or_exchange(kind: str, value: int) -> Step:
        return Step(kind, SLEEPING, value=lambda regs: value)

    def wakes(regs: Regs) -> bool:
        return regs[AGAIN] >= regs[TARGET] or regs[AGAIN] != regs[SEEN]

    announce = store_or_exchange("store" if mutant == "plain announcement" else "exchange", 1)
    look = Step("load", VALUE, reg=AGAIN)
    clear = store_or_exchange("store", 0)
    nothing = Step("jump", when=lambda regs: False)
    if mutant == "no second look":
        wakes = lambda regs: False  # noqa: E731 - one line beside its siblings
    if mutant == "first look only":
        look, wakes = nothing, lambda regs: regs[SEEN] >= regs[TARGET]
    body = [announce, look]
    if mutant == "look before announcement":
        body = [look, announce]
    if mutant == "cleared before sleep":
        body, clear = [announce, look, clear], nothing
    if mutant == "cleared late":  # what the wait before left is cleared in this one
        first = Step("jump", when=lambda regs: regs[LAST] == 0, to=7)
        body, clear = [announce, first, clear, look], nothing
    if mutant == "never cleared":
        clear = nothing
    sleep = Step("sleep_anyway" if mutant == "kernel does not compare" else "futex_wait", reg=SEEN)
    at = 4 + len(body)  # of the jump over the sleep
    return [
        Step("load", VALUE, reg=AGAIN),
        Step("jump", when=lambda regs: regs[AGAIN] >= regs[TARGET], to=at + 4),
        Step("load", VALUE, reg=SEEN),
        nothing,
        *body,
        Step("jump", when=lambda regs: wakes(regs), to=at + 2),
        sleep,
        clear,
        Step("jump", to=0),
        Step("check_data"),  # what was written before the post is visible: then on to the next target
    ]


def writer_program(mutant: str) -> list[Step]:
    """post_and_wake() for each post, after the message itself."""
    message = Step("store", DATA, value=lambda regs: regs[POST])
    post = Step("store" if mutant == "plain post" else "exchange", VALUE, value=lambda regs: regs[POST])
    look = Step("load", SLEEPING, reg=SLEEPS)
    first = [post, message, look] if mutant == "post before message" else [message, post, look]
    if mutant == "look before post":
        first = [message, look, post]
    return [*first, Step("jump", when=lambda regs: regs[SLEEPS] == 0, to=5), Step("wake"), Step("next")]


@dataclass(frozen=True)
class State:
    memory: tuple[int, int, int] = (0, 0, 0)
    buffers: tuple[Buffer, Buffer] = ((), ())
    pcs: tuple[int, int] = (0, 0)  # -1: finished
    regs: tuple[Regs, Regs] = ((0, 0, 1, 1), (1, 0, 1))
    asleep: bool = False


def put(items: tuple, i: int, item: object) -> tuple:  # type: ignore[type-arg]
    return (*items[:i], item, *items[i + 1 :])


class WrongExit(Exception):
    """The reader went on without the message, or before its value."""


class Model:
    """All states of `posts` posts and a reader that waits for `targets` one after the other."""

    def __init__(self, targets: tuple[int, ...], posts: int, mutant: str = "", kernel_drains: bool = False) -> None:
        """kernel_drains: FUTEX_WAIT empties the store buffer before it compares. Linux does on x86; nobody promises."""
        self.programs = (reader_program(mutant), writer_program(mutant))
        self.targets, self.posts, self.kernel_drains = targets, posts, kernel_drains

    def fault(self) -> str:
        """Explores everything. "": nothing wrong; else what is."""
        start = State(regs=((0, 0, self.targets[0], 0), (1, 0, self.posts)))
        seen, todo = {start}, [start]
        while todo:
            state = todo.pop()
            try:
                following = self.successors(state)
            except WrongExit:
                return "wrong exit"
            if not following and state.pcs[0] != -1:
                return "lost wake-up"
            for s in following:
                if s not in seen:
                    seen.add(s)
                    todo.append(s)
        return ""

    def successors(self, state: State) -> list[State]:
        out = []
        for p in range(2):
            if state.buffers[p]:  # the oldest store reaches memory
                (word, value), *rest = state.buffers[p]
                memory, buffers = put(state.memory, word, value), put(state.buffers, p, tuple(rest))
                out.append(replace(state, memory=memory, buffers=buffers))
            if state.pcs[p] >= 0 and not (p == 0 and state.asleep):
                out += self.execute(state, p, self.programs[p][state.pcs[p]])
        return out

    def execute(self, state: State, p: int, step: Step) -> list[State]:
        regs = state.regs[p]
        on = replace(state, pcs=put(state.pcs, p, state.pcs[p] + 1))
        match step.kind:
            case "load":
                return [replace(on, regs=put(on.regs, p, put(regs, step.reg, self.read(state, p, step.word))))]
            case "store":
                return [replace(on, buffers=put(on.buffers, p, (*on.buffers[p], (step.word, step.value(regs)))))]
            case "exchange":
                return [] if state.buffers[p] else [replace(on, memory=put(on.memory, step.word, step.value(regs)))]
            case "jump":
                return [replace(state, pcs=put(state.pcs, p, step.to)) if step.when(regs) else on]
            case "futex_wait":
                if self.kernel_drains and state.buffers[p]:
                    return []
                return [replace(on, asleep=state.memory[VALUE] == regs[step.reg])]
            case "sleep_anyway":
                return [replace(on, asleep=True)]
            case "wake":
                return [replace(on, asleep=False)]
        return [self.advance(state, p, regs)]

    def advance(self, state: State, p: int, regs: Regs) -> State:
        """The reader's next target, the writer's next post, or the end of either."""
        if p == 0:
            if regs[AGAIN] < regs[TARGET] or self.read(state, p, DATA) < regs[TARGET]:
                raise WrongExit
            i = regs[LAST] + 1
            if i == len(self.targets):
                return replace(state, pcs=put(state.pcs, p, -1))
            return replace(state, pcs=put(state.pcs, p, 0), regs=put(state.regs, p, (0, 0, self.targets[i], i)))
        if regs[POST] == self.posts:
            return replace(state, pcs=put(state.pcs, p, -1))
        return replace(state, pcs=put(state.pcs, p, 0), regs=put(state.regs, p, (regs[POST] + 1, 0, self.posts)))

    @staticmethod
    def read(state: State, p: int, word: int) -> int:
        """A process sees its own latest store first."""
        for stored, value in reversed(state.buffers[p]):
            if stored == word:
                return value
        return state.memory[word]
