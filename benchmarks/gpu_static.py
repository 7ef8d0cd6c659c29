"""What is known of the p2p kernels without a GPU, as a table: registers, spills, accesses, code, occupancy, bytes.

    python benchmarks/gpu_static.py            # compares with results/gpu-static.json: 1 if anything is worse
    python benchmarks/gpu_static.py --update   # writes it and gpu-static.md beside it

Needs nvcc and nvdisasm (2 without them). Nothing runs on a GPU, so no line here is a time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gpu_code
from gpu_code import ALGORITHMS, ARCHITECTURES, KERNELS, UNITS, Compiled, CompilerError, Kernel, Usage
from gpu_sass import NO_DISASSEMBLER, Code, disassemble, find_nvdisasm

RESULTS = gpu_code.ROOT / "benchmarks" / "results" / "gpu-static.json"
REGISTER_SLACK = 8  # of a lane; registers are handed out in eights
CODE_SLACK = 1.25  # of a kernel's size
RANKS = (2, 4, 8)
GROUP = 256  # elements that share an exponent in codec fp16

Row = dict[str, Any]  # of one kernel on one architecture, by the names that make_row() gives
Rows = dict[str, dict[str, Row]]  # by architecture and kernel


class Sm(NamedTuple):
    """Limits of a multiprocessor (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability")."""

    threads: int
    ctas: int


SMS = {"80": Sm(2048, 32), "90": Sm(2048, 32), "100": Sm(2048, 32), "120": Sm(1536, 24)}
REGISTER_FILE = 65536
WARP = 32
REGISTERS_AT_ONCE = 256  # handed out to a warp
WARPS_AT_ONCE = 4  # an SM has four parts with a register file each


def ctas_an_sm(registers: int, threads: int, sm: Sm) -> int:
    """CTAs that fit on an SM at once, by registers and threads: the kernels use next to no shared memory."""
    a_warp = -(-registers * WARP // REGISTERS_AT_ONCE) * REGISTERS_AT_ONCE
    warps = REGISTER_FILE // a_warp // WARPS_AT_ONCE * WARPS_AT_ONCE
    return min(sm.ctas, sm.threads // threads, warps * WARP // threads)


# --- bytes by formula ------------------------------------------------------------------------------------------------


class Traffic(NamedTuple):
    """Bytes an element of the bucket that one rank moves in one call. Slots are in the reader's memory: what others
    write into mine is theirs. Flags and headers are left out, and so is a second look at a value just read."""

    user_read: float
    user_written: float
    slots_read: float  # my own memory
    slots_written: float  # my own memory: contributions to myself, where the codec loses bits
    peers_written: float  # across the link


def traffic(kernel: Kernel, nranks: int) -> Traffic:
    """By the schedules of csrc/core: see there for which rank does what. Chunks are taken to be equal."""
    scaled = kernel.codec == "fp16"
    user, code = float(kernel.element_bytes), kernel.code_bytes + (1 / GROUP if scaled else 0)
    others = nranks - 1
    if kernel.algorithm == "oneshot":
        messages = nranks if scaled else others  # read for each one again
        return Traffic((messages + (not scaled)) * user, user, messages * code, code * scaled, others * code)
    if kernel.algorithm == "direct":
        own = code / nranks * scaled
        return Traffic(user, user, 2 * others / nranks * code + own, own, 2 * others / nranks * code)
    return Traffic(user, user, 2 * others / nranks * code, 0.0, 2 * others / nranks * code)


# --- the table -------------------------------------------------------------------------------------------------------


def make_row(kernel: Kernel, architecture: str, usage: Usage, ptx: str, code: Code) -> Row:
    """Everything of one kernel on one architecture, fit for json.dump."""
    ops = gpu_code.opcodes(ptx)
    return {
        "registers": usage.registers,
        "spill_bytes": usage.spill_bytes,
        "stack_bytes": usage.stack_bytes,
        "shared_bytes": usage.shared_bytes,
        "threads": kernel.threads,
        "ctas_an_sm": ctas_an_sm(usage.registers, kernel.threads, SMS[architecture]),
        "ptx_loads16": gpu_code.whole(ops, "ld"),
        "ptx_stores16": gpu_code.whole(ops, "st"),
        "loads16": code.loads16,
        "stores16": code.stores16,
        "small_loads": code.small_loads,
        "small_stores": code.small_stores,
        "code_bytes": code.code_bytes,
        "loops": [list(moved) for moved in code.loops],
    }


def make_rows(compiled: Compiled) -> Rows:
    """Disassembles everything.

    Raises:
        RuntimeError: see gpu_sass.disassemble.
    """
    rows: Rows = {}
    for a in ARCHITECTURES:
        code = {kernel: c for unit in UNITS for kernel, c in disassemble(compiled.cubins[a, unit]).items()}
        rows[a] = {str(k): make_row(k, a, compiled.usage[a, k], compiled.ptx[a, k], code[k]) for k in KERNELS}
    return rows


def worse(was: Row, now: Row) -> Iterator[str]:
    """What is worse in one row, in words."""
    for name in ("spill_bytes", "stack_bytes"):
        if now[name] > 0:
            yield f"{name} {now[name]}"
    if now["registers"] > was["registers"] + REGISTER_SLACK:
        yield f"registers {was['registers']} -> {now['registers']}"
    if now["shared_bytes"] > was["shared_bytes"]:
        yield f"shared_bytes {was['shared_bytes']} -> {now['shared_bytes']}"
    if now["ctas_an_sm"] < was["ctas_an_sm"]:
        yield f"ctas_an_sm {was['ctas_an_sm']} -> {now['ctas_an_sm']}"
    for wide, small in (("loads16", "small_loads"), ("stores16", "small_stores")):
        if now[wide] < was[wide] and now[small] > was[small]:  # fewer of both is less to do
            yield f"{wide} {was[wide]} -> {now[wide]}, {small} {was[small]} -> {now[small]}"
    if now["code_bytes"] > was["code_bytes"] * CODE_SLACK:
        yield f"code_bytes {was['code_bytes']} -> {now['code_bytes']}"
    if len(was["loops"]) == len(now["loops"]):
        for number, (before, after) in enumerate(zip(was["loops"], now["loops"], strict=True), 1):
            if after[0] > before[0] or after[2] > before[2]:
                yield f"loop {number} (read, written, narrow) {before} -> {after}"


def compare(was: Rows, now: Rows) -> list[str]:
    """Everything that is worse than before, a line each; kernels that are gone or new are lines, too."""
    lines = []
    for a in sorted({*was, *now}, key=int):
        old, new = was.get(a, {}), now.get(a, {})
        for kernel in sorted({*old, *new}):
            if kernel not in new:
                lines.append(f"sm_{a} {kernel}: gone")
            elif kernel not in old:
                lines.append(f"sm_{a} {kernel}: new, --update takes it in")
            else:
                lines += [f"sm_{a} {kernel}: {what}" for what in worse(old[kernel], new[kernel])]
    return lines


COLUMNS = (
    *("registers", "spill_bytes", "stack_bytes", "shared_bytes", "ctas_an_sm", "ptx_loads16", "ptx_stores16"),
    *("loads16", "stores16", "small_loads", "small_stores", "code_bytes"),
)
LEGEND = """\
Compiled by nvcc {nvcc} from csrc/cuda/p2p_*.cu as it is shipped, read with nvdisasm {nvdisasm}. Nothing ran: no times.

- loads16, stores16: instructions that move 16 bytes a lane (one of 32 is two), in PTX and in machine code; small: those
  that move less (ends of segments, exponents, bookkeeping). Flags and atomics are neither.
- ctas_an_sm: by registers (65536, by 256 to a warp, warps by 4) and threads (2048 and 32 CTAs; sm_120: 1536 and 24), at
  512 threads a CTA, 256 for types of eight bytes.
- loops: each that moves whole vectors, in the order of addresses: bytes a lane read + written in one turn on the way of
  whole vectors and finite values, then in brackets the accesses of an element's size on any way (ends of segments). A
  turn is 8 elements; a loop over peers may be unrolled. Loops inside a loop count for themselves. What writes 48, 96 or
  192 bytes and reads none at the begin of a kernel is headers.
"""
FORMULA = """\
What one rank moves of a bucket in one call, where each rank has an arena of its own: user memory, slots in its own
memory, slots in its peers' memory. Values that a loop reads twice, as the tables above may show, count once here.
"""


def to_markdown(document: dict[str, Any]) -> str:
    """The committed table."""
    lines = ["# The p2p kernels without a GPU (`make gpu-static`)", "", LEGEND.format(**document)]
    for a, rows in document["rows"].items():
        lines += [
            f"## sm_{a}",
            "",
            f"| kernel | {' | '.join(COLUMNS)} | loops |",
            "|---|" + "--:|" * len(COLUMNS) + "---|",
        ]
        for name, row in rows.items():
            loops = ", ".join(f"{read}+{written} ({narrow})" for read, written, narrow in row["loops"])
            lines.append(f"| {name} | {' | '.join(str(row[c]) for c in COLUMNS)} | {loops} |")
        lines.append("")
    lines += ["## Bytes an element by formula", "", FORMULA]
    names = [name.replace("_", " ") for name in Traffic._fields]
    lines += [f"| kernel | ranks | {' | '.join(names)} |", "|---|--:|" + "--:|" * len(names)]
    for kernel in KERNELS:
        for nranks in RANKS:
            moved = " | ".join(f"{value:.4g}" for value in traffic(kernel, nranks))
            lines.append(f"| {kernel} | {nranks} | {moved} |")
    return "\n".join(lines) + "\n"


def summary(rows: Rows) -> str:
    """A few lines for the terminal: the most registers of each algorithm and architecture."""
    lines = ["most registers   " + "  ".join(f"sm_{a:>3}" for a in ARCHITECTURES)]
    for algorithm in ALGORITHMS:
        most = [
            max(row["registers"] for name, row in rows[a].items() if name.endswith(algorithm)) for a in ARCHITECTURES
        ]
        lines.append(f"{algorithm:<15}  " + "  ".join(f"{m:>6}" for m in most))
    return "\n".join(lines)


def version_of(tool: str) -> str:
    """As "13.0.88", from the tool's own words."""
    said = subprocess.run([tool, "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
    return said.partition(", V")[2].split()[0]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="write the table instead of comparing with it")
    parser.add_argument("--json", type=Path, default=RESULTS, help="the table; its .md lies beside it (%(default)s)")
    arguments = parser.parse_args(argv)
    nvcc, nvdisasm = gpu_code.find_nvcc(), find_nvdisasm()
    if nvcc is None or nvdisasm is None:
        reason = "gpu_static: no nvcc: set CUDA_HOME, or put it on PATH" if nvcc is None else NO_DISASSEMBLER
        print(reason, file=sys.stderr)
        return 2
    try:
        compiled = gpu_code.compile_all()
        rows = make_rows(compiled)
    except (CompilerError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1
    document = {"nvcc": version_of(nvcc), "nvdisasm": version_of(nvdisasm), "rows": rows}
    print(summary(rows))
    print("compiled in " + ", ".join(f"{unit} {seconds:.0f} s" for unit, seconds in compiled.seconds.items()))
    if arguments.update:
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
        arguments.json.with_suffix(".md").write_text(to_markdown(document))
        return 0
    before = json.loads(arguments.json.read_text())
    if before["nvcc"] != document["nvcc"]:
        print(f"the table was made by nvcc {before['nvcc']}, this is {document['nvcc']}: what differs may be its doing")
    lines = compare(before["rows"], rows)
    print(
        "\n".join(
            ["worse than the committed table:", *lines] if lines else ["nothing is worse than the committed table"]
        )
    )
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
