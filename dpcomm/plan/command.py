"""`python -m dpcomm plan`: its arguments with their units, and what it prints."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from pathlib import Path

from dpcomm.errors import ArgumentError
from dpcomm.plan.counts import ELEM_BYTES, MIB
from dpcomm.plan.predict import BreakEven, Plan, Row, plan
from dpcomm.plan.question import CODECS, DEVICES, DTYPES, Question

PREFIXES = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
BINARY = {"": 1, "Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40}
ALIASES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
NUMBER = r"(\d+(?:\.\d+)?(?:[eE][+]?\d+)?)"
BUCKET = 25 * MIB  # DDP's and Communicator's


def speed(text: str) -> float:
    """ "50GB/s" as 50e9, "400Gb/s" as 50e9: bytes per second.

    Raises:
        argparse.ArgumentTypeError: Another form. Bits and bytes differ by the case of one letter: nothing is guessed.
    """
    found = re.fullmatch(NUMBER + r" ?([kMGT]?)(bit|b|B)/s", text)
    if not found or float(found[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r}: expected bytes as in 50GB/s or bits as in 400Gb/s (k, M, G, T)")
    return float(found[1]) * PREFIXES[found[2]] / (1 if found[3] == "B" else 8)


def size(text: str) -> int:
    """ "25MiB", "100MB", "4096B": whole bytes.

    Raises:
        argparse.ArgumentTypeError: Another form.
    """
    found = re.fullmatch(NUMBER + r" ?([kMGT]?|[KMGT]i)B", text)
    scale = (PREFIXES | BINARY)[found[2]] if found else 0
    value = float(found[1]) * scale if found else 0.0
    if value < 1 or value != int(value):
        raise argparse.ArgumentTypeError(f"{text!r}: expected whole bytes as in 25MiB, 100MB or 4096B")
    return int(value)


def count(text: str) -> int:
    """ "7e9" or "7000000000": a whole number above 0.

    Raises:
        argparse.ArgumentTypeError: Another form.
    """
    value = float(text) if re.fullmatch(NUMBER, text) else 0.0
    if not 1 <= value <= 1e15 or value != int(value):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number above 0, as in 7e9")
    return int(value)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of the command."""
    add = parser.add_argument
    add("--hosts", type=count, required=True, help="how many")
    add("--ranks-per-host", type=count, default=1, help="processes, or GPUs (default: 1)")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--params", type=count, help="gradients of so many parameters, in buckets; as in 7e9")
    what.add_argument("--size", type=size, help="one call of so many bytes, as in 25MiB")
    add("--bucket", type=size, help="of --params: what one call reduces at most (default: 25MiB)")
    add("--dtype", choices=[*DTYPES, *ALIASES], default="float32", help="(default: float32)")
    add("--codec", choices=CODECS, default="fp16", help="compared with none (default: fp16)")
    add("--device", choices=DEVICES, help="(default: cuda where --link is given, else cpu)")
    add("--link", type=speed, help="what a GPU sends to others of its host, each way, as in 50GB/s")
    add("--network", type=speed, help="what a host sends to others, each way, all cards together, as in 400Gb/s")
    add("--processors", type=count, help="of a host, for ranks on CPUs (default: one for each rank)")
    add("--json", action="store_true", help="print JSON")
    add("--plot", type=Path, metavar="FILE", help="also draw the times up to 1024 ranks (PNG; needs matplotlib)")


def question_of(arguments: argparse.Namespace) -> Question:
    """What was asked.

    Raises:
        ArgumentError: Arguments that exclude each other.
    """
    dtype = ALIASES.get(arguments.dtype, arguments.dtype)
    if arguments.size is not None and arguments.bucket is not None:
        raise ArgumentError("--size is one call; --bucket belongs to --params.")
    if arguments.size is not None and arguments.size % ELEM_BYTES[dtype]:
        raise ArgumentError(f"--size {arguments.size}: no whole number of elements of {dtype}.")
    return Question(
        hosts=arguments.hosts,
        ranks_per_host=arguments.ranks_per_host,
        elems=arguments.params or arguments.size // ELEM_BYTES[dtype],
        dtype=dtype,
        codec=arguments.codec,
        device=arguments.device or ("cuda" if arguments.link is not None else "cpu"),
        link=arguments.link,
        network=arguments.network,
        bucket_bytes=(arguments.bucket or BUCKET) if arguments.params else None,
        processors=arguments.processors,
    )


def run(arguments: argparse.Namespace) -> str:
    """Plans, and draws where asked to.

    Returns:
        What to print.

    Raises:
        ArgumentError: The question makes no sense, or nothing can be drawn.
    """
    found = plan(question_of(arguments))
    if arguments.plot is not None:
        from dpcomm.plan.picture import draw

        draw(found.question, arguments.plot)
    return json.dumps(document(found), indent=2) if arguments.json else text(found)


def document(found: Plan) -> dict[str, object]:
    """The plan as JSON: question, rows, break_even, verdict, all in seconds, bytes and bytes per second."""
    return dataclasses.asdict(found) | {"verdict": verdict(found), "predicted": True}


def text(found: Plan) -> str:
    """The plan as a page."""
    q = found.question
    calls = " and ".join(
        f"{number} call{'s' * (number > 1)} of {bytes_text(elems * ELEM_BYTES[q.dtype])}" for number, elems in q.calls
    )
    place = f"{q.hosts} host{'s' * (q.hosts > 1)} x {q.ranks_per_host} rank{'s' * (q.ranks_per_host > 1)} on {q.device}"
    speeds = [f"; {name} {speed_text(value)}" for name, value in (("link", q.link), ("network", q.network)) if value]
    lines = [
        f"predicted, not measured: {place}{''.join(speeds)}",
        f"{q.elems} elements of {q.dtype}, {bytes_text(q.elems * ELEM_BYTES[q.dtype])}, in {calls}",
        "",
        f"{'engine':<10}{'algorithm':<11}{'codec':<7}{'time':>10}  {'best to worst':<22}{'a host sends':>14}",
    ]
    lines += [*(row_text(row) for row in found.rows), "*: what algorithm auto of that engine takes"]
    if found.break_even:
        where = "network" if q.hosts > 1 else "link"
        lines += ["", f"break-even: from which speed of the {where} on a codec loses"]
        lines += [f"{each.engine:<10}{each.algorithm:<11}{each.codec:<7}{even_text(each)}" for each in found.break_even]
    return "\n".join([*lines, "", verdict(found)])


def row_text(row: Row) -> str:
    """A line of the table."""
    bar = f"{seconds_text(row.best_s)} to {seconds_text(row.worst_s)}"
    names = f"{row.engine:<10}{row.algorithm + '*' * row.auto:<11}{row.codec:<7}"
    return f"{names}{seconds_text(row.seconds):>10}  {bar:<22}{bytes_text(row.host_bytes):>14}  {row.note}".rstrip()


def even_text(each: BreakEven) -> str:
    """Where it is, in words."""
    if each.bytes_per_s is None:
        return "never: it pays at every speed"
    return f"{speed_text(each.bytes_per_s)}" if each.bytes_per_s else "it pays at no speed"


def verdict(found: Plan) -> str:
    """Whether to compress, in plain sentences."""
    best, none, coded = found.best, found.best_none, found.best_codec
    if coded is None:
        said = f"do not compress here: no algorithm has codec {found.question.codec} on these engines."
    elif found.compress:
        said = f"compress: {_name(coded)} takes {coded.seconds / none.seconds:.2f} of the time of {_name(none)}."
    else:
        said = f"do not compress here: {_name(coded)} takes {coded.seconds / none.seconds:.2f} of the time of "
        said += f"{_name(none)}."
    if coded is not None and max(none.best_s, coded.best_s) < min(none.worst_s, coded.worst_s):
        said += "\nThe error bars of the two overlap: measure before you decide."
    if coded is not None and coded.host_bytes >= none.host_bytes > 0 and coded.algorithm == none.algorithm:
        said += f"\nCodec {coded.codec} makes no fewer bytes of {found.question.dtype}."
    if best.note:
        said += f"\n{best.note}: predicted as if it served {found.question.nranks}."
    first = found.rows[0]
    if first.note and first.note != best.note and first is not best:
        said += f"\nFaster than all that can be had: {_name(first)}, {seconds_text(first.seconds)} ({first.note})."
    return said


def _name(row: Row) -> str:
    return f"{row.engine} {row.algorithm} {row.codec}"


def seconds_text(value: float) -> str:
    """Three digits and a unit."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}" if value < 1000 * scale else f"{value / scale:.0f} {unit}"
    return f"{value * 1e6:.3g} us"


def bytes_text(value: float) -> str:
    """Decimal, three digits."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.0f} B"


def speed_text(bytes_per_s: float) -> str:
    """In bits, as networks are named, and in bytes."""
    return f"{8 * bytes_per_s / 1e9:.3g} Gb/s ({bytes_per_s / 1e9:.3g} GB/s)"
