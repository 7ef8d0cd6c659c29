"""What gpu_kernels.py times, how many bytes each pass must move, and what follows from the times. It needs no GPU.

Passes are those of csrc/cuda/passes.h; "hook" is the three operations of PyTorch's fp16_compress_hook on the same
buffer.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence

from gpu_goals import Outcome

from dpcomm import _native

MIB = 1 << 20
GROUP = 256  # elements that share a scale
ELEM_BYTES = {"float32": 4, "bfloat16": 2}
DEFAULT_SIZES = (MIB, 25 * MIB, 64 * MIB, 256 * MIB)
DEFAULT_CTAS = (1, 2, 4, 8, 16, 32, 64)  # and one for each multiprocessor
MOST_SLICE_BYTES = 128 << 10  # of a message, as a slot of the engines
MANY_ELEMS = 4000  # elements of each tensor of a list: 15 whole groups and a short one; starts stay aligned to 16 bytes
HOOK_RANKS = 2  # what the hook divides by
TIMING_US = 2000.0  # that one timing should last
MOST_REPEATS = 200
COPY_GOALS = ((64 * MIB, math.inf, 0.92), (25 * MIB, 25 * MIB, 0.85))  # sizes from .. to: fraction of the device copy
HOOK_GOAL_BYTES, HOOK_GOAL = 25 * MIB, 1.3
NATIVE, NATIVE_CTAS = ("cast", "widen"), 4  # around NCCL's own all-reduce; CTAs of an SM, as in csrc/nccl/native.cpp


@dataclasses.dataclass(frozen=True)
class Subject:
    """Something to be timed at one size."""

    kind: str  # "encode" "decode" "add" "reduce" "cast" "widen" "copy" "memcpy" "empty" "hook"
    ctas: int = 0  # 0 where it is not ours to choose
    codec: str = "none"
    dtype: str = "float32"
    many: bool = False  # a list of small tensors rather than one

    @property
    def of_a_group(self) -> int:
        """Bytes of a group in a message."""
        return self.message_bytes([1])

    def message_bytes(self, counts: Sequence[int]) -> int:
        """Bytes of one message of tensors with so many elements: codes and exponents of whole groups."""
        dtype, codec = _native.DTYPES[self.dtype], _native.CODECS[self.codec]
        of = {count: _native.wire_bytes(count, dtype, codec, self.kind in NATIVE) for count in dict.fromkeys(counts)}
        return sum(bytes_ * counts.count(count) for count, bytes_ in of.items())


@dataclasses.dataclass(frozen=True)
class Row:
    """One subject at one size. Bandwidth in 10^9 bytes per second; fractions of the copies of the same run."""

    kind: str
    codec: str
    dtype: str
    tensors: int
    size_bytes: int
    ctas: int
    median_us: float
    least_us: float
    moved_bytes: int
    gb_s: float
    of_memcpy: float | None  # bandwidth over that of cudaMemcpyAsync
    of_copy: float | None  # over that of the copy kernel with as many CTAs
    correct: bool | None  # the bits that tests/reference.py computes; None where there is nothing to check


TimePass = Callable[[Subject, int], float]  # microseconds a repetition, of that many repetitions
Check = Callable[[Subject], bool]
Advance = Callable[[], object]


def passes(ctas: int) -> list[Subject]:
    """All passes with one number of CTAs."""
    codecs = ("none", "fp16")
    found = [Subject(kind, ctas, codec) for kind in ("encode", "decode", "add", "reduce") for codec in codecs]
    found += [Subject(kind, ctas, codec, "bfloat16") for kind in ("encode", "decode") for codec in codecs]
    found += [Subject("encode", ctas, codec, many=True) for codec in codecs]
    return found + native_passes(ctas)


def native_passes(ctas: int) -> list[Subject]:
    """Those around an all-reduce in 16 bits."""
    return [Subject(kind, ctas, codec) for kind in NATIVE for codec in ("fp16", "bf16")]


def subjects(ctas: Sequence[int]) -> list[Subject]:
    """All that is timed at each size."""
    found = [Subject("memcpy"), Subject("hook"), Subject("empty", 1)]
    for number in ctas:
        found += [Subject("copy", number), *passes(number)]
    return found + native_passes(NATIVE_CTAS * max(ctas))


def counts_of(subject: Subject, size_bytes: int) -> list[int]:
    """Elements of each tensor; the last of a list has what is left."""
    elems = size_bytes // ELEM_BYTES[subject.dtype]
    if not subject.many:
        return [elems]
    whole, left = divmod(elems, MANY_ELEMS)
    return [MANY_ELEMS] * whole + ([left] if left else [])


def moved_bytes(subject: Subject, size_bytes: int) -> int:
    """Bytes that must be read and written at least.

    encode, cast: tensors in, a message out. decode, widen: the reverse. add: a message and tensors in, a message out.
    reduce, of two ranks: two contributions in (messages; with codec none the own one from the tensors), tensors and a
    message out.
    hook: to half 4 + 2 bytes an element, divide 2 + 2, copy back 2 + 4.
    """
    counts = counts_of(subject, size_bytes)
    tensors, wire = sum(counts) * ELEM_BYTES[subject.dtype], subject.message_bytes(counts)
    own = tensors if subject.codec == "none" else wire
    return {
        "encode": tensors + wire,
        "decode": wire + tensors,
        "add": wire + tensors + wire,
        "reduce": own + wire + tensors + wire,
        "cast": tensors + wire,
        "widen": wire + tensors,
        "copy": 2 * tensors,
        "memcpy": 2 * tensors,
        "hook": 4 * tensors,
        "empty": 0,
    }[subject.kind]


def slice_bytes(subject: Subject, size_bytes: int) -> int:
    """Bytes of a message that a CTA works on at a time: at most MOST_SLICE_BYTES, and as many slices for each CTA.

    With fixed slices some CTAs would have one more than others, and the pass would last as long as theirs.
    """
    of_a_group = subject.of_a_group
    groups = subject.message_bytes(counts_of(subject, size_bytes)) // of_a_group
    rounds = -(-groups * of_a_group // (MOST_SLICE_BYTES * subject.ctas))
    return -(-groups // (rounds * subject.ctas)) * of_a_group


def repeats_for(us: float) -> int:
    """How many repetitions make a timing, from the time of one."""
    return max(3, min(MOST_REPEATS, math.ceil(TIMING_US / us))) if us > 0 else MOST_REPEATS


def measure_size(
    size_bytes: int, ctas: Sequence[int], rounds: int, time_pass: TimePass, check: Check, advance: Advance
) -> list[Row]:
    """Checks every pass, then times all subjects in turns: the order is that of subjects() and rotates.

    Args:
        time_pass: runs a subject and returns microseconds by the device's clock.
        check: runs a pass once and compares with the reference.
        advance: called after each timing.
    """
    every = subjects(ctas)
    correct = {each: check(each) for each in every if each.kind not in ("copy", "memcpy", "empty", "hook")}
    repeats = {each: repeats_for(time_pass(each, 3)) for each in every}
    times: dict[Subject, list[float]] = {each: [] for each in every}
    for number in range(rounds):
        first = number * len(every) // rounds
        for each in every[first:] + every[:first]:
            times[each].append(time_pass(each, repeats[each]))
            advance()
    return rows_of(size_bytes, times, correct)


def rows_of(size_bytes: int, times: dict[Subject, list[float]], correct: dict[Subject, bool]) -> list[Row]:
    """The figures of one size."""
    median = {each: statistics.median(values) for each, values in times.items()}
    speed = {each: moved_bytes(each, size_bytes) / us / 1e3 if us > 0 else 0.0 for each, us in median.items()}
    memcpy = speed.get(Subject("memcpy"))

    def fraction(each: Subject, of: float | None) -> float | None:
        return speed[each] / of if of and each.kind not in ("memcpy", "empty") else None

    return [
        Row(
            kind=each.kind,
            codec=each.codec,
            dtype=each.dtype,
            tensors=len(counts_of(each, size_bytes)),
            size_bytes=size_bytes,
            ctas=each.ctas,
            median_us=median[each],
            least_us=min(values),
            moved_bytes=moved_bytes(each, size_bytes),
            gb_s=speed[each],
            of_memcpy=fraction(each, memcpy),
            of_copy=None if each.kind == "copy" else fraction(each, speed.get(Subject("copy", each.ctas))),
            correct=correct.get(each),
        )
        for each, values in times.items()
    ]


def outcomes(rows: Sequence[Row]) -> list[Outcome]:
    """The goals: with the most CTAs, float32, one tensor."""
    most = max((row.ctas for row in rows if row.kind not in NATIVE), default=0)
    full = [
        row
        for row in rows
        if row.ctas == most
        and row.dtype == "float32"
        and row.tensors == 1
        and row.kind not in ("copy", "empty", *NATIVE)
    ]
    found = [_copy_outcome(full, *goal) for goal in COPY_GOALS]
    native = [row for row in rows if row.kind in NATIVE and row.ctas == NATIVE_CTAS * most]
    return [*found, _hook_outcome(full, rows, ("encode", "decode")), _hook_outcome(native, rows, NATIVE)]


def _copy_outcome(full: Sequence[Row], begin: float, end: float, bound: float) -> Outcome:
    where = f"at {begin / MIB:.0f} MiB" + (" and more" if end > begin else "")
    goal = f"every pass at least {bound:.0%} of the device copy's bandwidth {where}"
    values = [(row.of_memcpy, row) for row in full if begin <= row.size_bytes <= end and row.of_memcpy is not None]
    if not values:
        return Outcome(goal, "", None)
    least, row = min(values, key=lambda each: each[0])
    text = f"{least:.1%} ({row.kind} {row.codec}, {row.size_bytes / MIB:g} MiB, {row.ctas} CTAs)"
    return Outcome(goal, text, least >= bound)


def _hook_outcome(full: Sequence[Row], rows: Sequence[Row], kinds: tuple[str, str]) -> Outcome:
    goal = f"{kinds[0]} and {kinds[1]} of fp16 at least {HOOK_GOAL:g}x as fast as the hook's three operations at 25 MiB"
    hook = [row.median_us for row in rows if row.kind == "hook" and row.size_bytes == HOOK_GOAL_BYTES]
    ours = {
        row.kind: row.median_us
        for row in full
        if row.size_bytes == HOOK_GOAL_BYTES and row.codec == "fp16" and row.kind in kinds
    }
    if not hook or len(ours) != 2:
        return Outcome(goal, "", None)
    ratio = hook[0] / sum(ours.values())
    return Outcome(goal, f"{ratio:.2f}x", ratio >= HOOK_GOAL)
