"""`plan`: how long an all-reduce should take here, with each algorithm, codec and engine, and whether a codec pays.

Predictions, not measurements: cpu.py and gpu.py have the formulas, docs/plan.md sources and errors.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from dpcomm import _native
from dpcomm.plan import constants, counts, cpu, gpu
from dpcomm.plan import machine as machines
from dpcomm.plan.counts import Load, Place
from dpcomm.plan.question import Question, check

NOT_BUILT: tuple[str, ...] = ()  # algorithms that are predicted before they exist
WORTH = 0.9  # of the time without a codec: one that saves less than a tenth is not worth its roundings
LEAST_SPEED, MOST_SPEED = 1e5, 1e13  # bytes per second, between which a break-even is looked for
HOOK = "torch's fp16_compress_hook, not dpcomm"


@dataclasses.dataclass(frozen=True)
class Row:
    """One prediction. Seconds of all calls, one behind the other; bytes that a host sends in them."""

    engine: str
    algorithm: str
    codec: str
    seconds: float
    best_s: float
    worst_s: float
    host_bytes: float
    auto: bool  # what algorithm "auto" takes
    note: str = ""  # why dpcomm does not have it now; empty: it has


@dataclasses.dataclass(frozen=True)
class BreakEven:
    """From which speed of the network (of the link, where there is one host) a codec no longer pays.

    `bytes_per_s` 0: it never does; None: it always does, up to MOST_SPEED.
    """

    engine: str
    algorithm: str
    codec: str
    bytes_per_s: float | None


@dataclasses.dataclass(frozen=True)
class Plan:
    """Rows in order of time, and what follows."""

    question: Question
    rows: list[Row]
    break_even: list[BreakEven]
    best: Row
    best_none: Row
    best_codec: Row | None
    compress: bool


def plan(question: Question) -> Plan:
    """Predicts every row and decides.

    Args:
        question: what is planned.

    Returns:
        The plan. `best` is the fastest row that dpcomm has; where there are too many ranks, that it would have.

    Raises:
        ArgumentError: The question does not make sense.
    """
    check(question)
    rows = sorted(predict(question), key=lambda row: row.seconds)
    choice = [row for row in rows if row.note == _too_many(question)]
    best_none = next(row for row in choice if row.codec == "none")
    best_codec = next((row for row in choice if row.codec != "none"), None)
    compress = best_codec is not None and best_codec.seconds <= WORTH * best_none.seconds
    return Plan(question, rows, break_evens(question), choice[0], best_none, best_codec, compress)


def predict(question: Question) -> list[Row]:
    """Every algorithm, codec and engine, in no particular order."""
    return [row(question, *each) for each in contestants(question)]


def contestants(q: Question) -> list[tuple[str, str, str]]:
    """Engine, algorithm and codec of all rows. Codec bf16 is a library's only; a ring of 16-bit numbers too."""
    own = ["direct", "oneshot", "ring"]
    codecs = ["none", q.codec]
    network = "gloo" if q.device == "cpu" else "nccl"
    local = "shm" if q.device == "cpu" else "p2p"
    found = [(network, "native", codec) for codec in codecs if network == "nccl" or codec != "bf16"]
    for engine in [network] + [local] * (q.hosts == 1):
        found += [(engine, algorithm, codec) for algorithm in own for codec in codecs if codec != "bf16"]
    if q.hosts > 1 and q.ranks_per_host > 1:
        engine = "two_level" if q.device == "cpu" else "nccl"
        found += [(engine, "two_level", codec) for codec in codecs if codec != "bf16"]
    return found


def row(q: Question, engine: str, algorithm: str, codec: str) -> Row:
    """The prediction of one."""
    cases = [seconds(q, engine, algorithm, codec, case) for case in gpu.CASES]
    place = _place(q)
    sent = sum(n * counts.host_bytes(algorithm, Load(elems, q.dtype, codec), place) for n, elems in q.calls)
    note = why_not(engine, algorithm, codec, q.dtype) or _too_many(q)
    return Row(
        engine,
        algorithm,
        codec,
        cases[gpu.LIKELY],
        cases[gpu.BEST],
        cases[gpu.WORST],
        sent,
        auto(q, engine, algorithm, codec),
        note,
    )


def auto(q: Question, engine: str, algorithm: str, codec: str) -> bool:
    """True where algorithm "auto" of this engine is this one, for the first and largest call."""
    if engine == "nccl" and codec == "none":
        return algorithm == "native"
    if codec == "bf16" or why_not(engine, algorithm, codec, q.dtype):
        return False
    if algorithm == "two_level":
        return engine != "nccl" and q.dtype != "float16"  # in which the sums of a host could overflow
    load = Load(q.calls[0][1], q.dtype, codec)
    return counts.auto(load, q.nranks, engine in ("gloo", "nccl")) == algorithm


def why_not(engine: str, algorithm: str, codec: str, dtype: str = "float32") -> str:
    """Why dpcomm does not serve this, whatever the number of ranks; empty: it does."""
    if algorithm in NOT_BUILT:
        return "not built yet"
    if engine == "gloo" and algorithm == "native" and codec == "none" and dtype != "float32":
        return "gloo would round at each rank"
    return HOOK if (engine, algorithm, codec) == ("gloo", "native", "fp16") else ""


def _too_many(q: Question) -> str:
    most = _native.MAX_RANKS
    return f"dpcomm serves {most} ranks at most" if q.nranks > most else ""


def _place(q: Question) -> Place:
    return Place(q.hosts, q.ranks_per_host, q.network, q.processors)


def seconds(q: Question, engine: str, algorithm: str, codec: str, case: int) -> float:
    """All calls, one behind the other, in the best, the likely or the worst case."""
    call = _call_on_cpu if q.device == "cpu" else _call_on_gpu
    return sum(count * call(q, engine, algorithm, Load(elems, q.dtype, codec), case) for count, elems in q.calls) / 1e6


def _call_on_cpu(q: Question, engine: str, algorithm: str, load: Load, case: int) -> float:
    """Microseconds. The bar is the error within which nine tenths of what was measured lie."""
    place, gloo, shm = _place(q), constants.GLOO, constants.SHM
    if engine == "shm":
        error, likely = constants.SHM_ERROR, cpu.shm_us(place, load, algorithm, shm)
    elif algorithm == "two_level":
        error = max(constants.GLOO_ERROR, constants.SHM_ERROR)
        likely = cpu.two_level_us(place, load, gloo, shm)
    else:
        error, likely = constants.GLOO_ERROR, cpu.gloo_us(place, load, algorithm, gloo)
    return likely * (1 - error, 1, 1 + error)[case]


def _call_on_gpu(q: Question, engine: str, algorithm: str, load: Load, case: int) -> float:
    """Microseconds."""
    machine = machines.machine_of(q.hosts, q.ranks_per_host, q.link and q.link / 1e9, q.network and q.network / 1e9)
    size = float(load.plain)
    if algorithm == "native":
        if load.codec == "none":
            return gpu.none_us(machine, size, case)
        return gpu.native_us(machine, size, load.native, case)
    plain = counts.GROUP * counts.ELEM_BYTES[load.dtype]
    coding = gpu.Coding(plain, load.group_bytes, load.codec != "none")
    if engine == "p2p":
        return gpu.p2p_us(machine, size, case, coding, algorithm)
    calls: dict[str, Callable[[gpu.Machine, float, int, gpu.Coding], float]] = {
        "direct": gpu.direct_us,
        "oneshot": gpu.oneshot_us,
        "ring": gpu.ring_us,
        "two_level": machines.two_level_us,
    }
    return calls[algorithm](machine, size, case, coding)


# --- what follows ----------------------------------------------------------------------------------------------------


def varied(question: Question, speed: float) -> Question:
    """The same with another network, or another link where there is one host."""
    if question.hosts > 1:
        return dataclasses.replace(question, network=speed)
    return dataclasses.replace(question, link=speed)


def break_evens(q: Question) -> list[BreakEven]:
    """For each engine and algorithm that a codec can be had with; before them, for the fastest rows that can be had.
    Nothing on the CPUs of one host: there is no line whose speed could be another."""
    if q.hosts == 1 and q.device == "cpu":
        return []
    every = contestants(q)
    had = [each for each in every if not why_not(*each, q.dtype)]
    found = [BreakEven("any", "fastest", q.codec, break_even(q, had))]
    for engine, algorithm, codec in every:
        if codec != "none":
            pair = [(engine, algorithm, "none"), (engine, algorithm, codec)]
            found.append(BreakEven(engine, algorithm, codec, break_even(q, pair)))
    return found


def break_even(q: Question, rows: list[tuple[str, str, str]]) -> float | None:
    """The speed, in bytes per second, above which the fastest of these rows (engine, algorithm, codec) has no codec.
    Found by halving, on a logarithmic scale.

    Returns:
        The highest such speed; 0.0 if a codec loses at every one, None if it wins at MOST_SPEED.
    """

    def gain(log_speed: float) -> float:
        at = varied(q, math.exp(log_speed))
        times = {each: seconds(at, *each, gpu.LIKELY) for each in rows}
        plain = min(time for each, time in times.items() if each[2] == "none")
        return plain - min((time for each, time in times.items() if each[2] != "none"), default=math.inf)

    grid = [math.log(LEAST_SPEED) + i * math.log(MOST_SPEED / LEAST_SPEED) / 80 for i in range(81)]
    wins = [gain(each) > 0 for each in grid]
    if wins[-1]:
        return None
    if True not in wins:
        return 0.0
    last = max(i for i, won in enumerate(wins) if won)
    low, high = grid[last], grid[last + 1]
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if gain(middle) > 0 else (low, middle)
    return math.exp(low)
