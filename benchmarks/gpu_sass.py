"""Reads machine code of NVIDIA GPUs as nvdisasm prints it: instructions, loops, and what a loop moves.

A loop is a natural loop: a block that dominates another which jumps back to it, and all blocks from which that other is
reached without passing the first. Loops inside it count for themselves.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from control_flow import dominating, reaching, reversed_edges
from gpu_code import Kernel, parse_name

DEADLINE_S = 120
FUNCTION = re.compile(r"^\.text\.(\S+):$", re.MULTILINE)
LINE = re.compile(r"\s+/\*([0-9a-f]+)\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*);")
LABEL = re.compile(r"(\S+):")
TARGET = re.compile(r"`\((\S+)\)")
MEMORY = re.compile(r"(LD|ST)G?\.E((?:\.\w+)*)")
INSTRUCTION_BYTES = 16
NO_DISASSEMBLER = (
    "gpu_static: no nvdisasm. It comes with the CUDA Toolkit (set CUDA_HOME, or put it on PATH) and as a wheel: "
    "pip install nvidia-cuda-nvdisasm"
)


class Instruction(NamedTuple):
    """One line of nvdisasm; address in bytes from the kernel's begin."""

    address: int
    predicated: bool
    name: str
    operands: str
    label: str  # of this place, "" where nothing jumps

    @property
    def target(self) -> str:
        """The label that a branch may go to."""
        found = TARGET.search(self.operands) if self.name.partition(".")[0] == "BRA" else None
        return found[1] if found else ""

    @property
    def ends(self) -> bool:
        """What comes next in memory does not come next in time."""
        if self.predicated:
            return False
        kind = self.name.partition(".")[0]
        return kind in ("EXIT", "RET") or (self.name == "BRA" and self.operands.startswith("`"))

    @property
    def leaves(self) -> bool:
        return self.name.partition(".")[0] in ("BRA", "EXIT", "RET")

    @property
    def access(self) -> tuple[str, int] | None:
        """("LD" or "ST", bytes a lane) of a plain access to user memory, slots or tables; None for all else, flags
        (STRONG) and atomics included."""
        found = MEMORY.fullmatch(self.name)
        if found is None or "STRONG" in found[2]:
            return None
        modifiers = found[2].split(".")
        for modifier, size in (("256", 32), ("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("U8", 1), ("S8", 1)):
            if modifier in modifiers:
                return found[1], size
        return found[1], 4


class Moved(NamedTuple):
    """What one lane moves in one turn of a loop on the way of whole vectors, in bytes by accesses of 16 and more, and
    how many accesses of an element's size the loop has on any way: ends of segments, and what else has that size."""

    read: int
    written: int
    narrow: int


class Code(NamedTuple):
    """One kernel: bytes of code, accesses of 16 bytes (one of 32 is two) and smaller ones, and its loops that move
    whole vectors, in the order of their addresses."""

    code_bytes: int
    loads16: int
    stores16: int
    small_loads: int
    small_stores: int
    loops: list[Moved]


def find_nvdisasm() -> str | None:
    """Of the CUDA Toolkit, on PATH, or the wheel's in this environment."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    wheels = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin"), reverse=True)
    folders = [*(f"{home}/bin" for home in homes), os.environ.get("PATH", ""), "/usr/local/cuda/bin", *map(str, wheels)]
    return shutil.which("nvdisasm", path=os.pathsep.join(folders))


def disassemble(cubin: Path) -> dict[Kernel, Code]:
    """Raises RuntimeError where there is no nvdisasm or it does not understand the file."""
    tool = find_nvdisasm()
    if tool is None:
        raise RuntimeError(NO_DISASSEMBLER)
    done = subprocess.run([tool, "-c", str(cubin)], capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"gpu_static: {tool} {cubin} exited with {done.returncode}:\n{done.stderr[-2000:]}")
    read = ((parse_name(name), body) for name, body in functions(done.stdout))
    return {kernel: read_code(body, kernel.element_bytes) for kernel, body in read}


def functions(text: str) -> Iterator[tuple[str, list[Instruction]]]:
    """Each kernel's mangled name and instructions."""
    parts = FUNCTION.split(text)[1:]
    for name, body in zip(parts[::2], parts[1::2], strict=True):
        instructions, label = [], ""
        for line in body.splitlines():
            if found := LINE.match(line):
                address, predicate, opcode, operands = found.groups()
                instructions.append(Instruction(int(address, 16), bool(predicate), opcode, operands.strip(), label))
                label = ""
            elif (marked := LABEL.fullmatch(line.strip())) and not line.strip().startswith(".text"):
                label = marked[1]
            elif line.startswith("//-----"):
                break  # of the next section
        yield name, instructions


def blocks_of(body: list[Instruction]) -> list[list[Instruction]]:
    """Instructions that run one after the other: cut before labels and after jumps."""
    blocks: list[list[Instruction]] = [[]]
    for i in body:
        if blocks[-1] and (i.label or blocks[-1][-1].leaves):
            blocks.append([])
        blocks[-1].append(i)
    return blocks


def following(blocks: list[list[Instruction]]) -> list[list[int]]:
    """The blocks that each block may go on with; a call comes back."""
    index = {block[0].label: b for b, block in enumerate(blocks) if block[0].label}
    result = []
    for b, block in enumerate(blocks):
        last = block[-1]
        targets = [index[last.target]] if last.target in index else []
        if not last.ends and b + 1 < len(blocks):
            targets.append(b + 1)
        result.append(targets)
    return result


def natural_loops(edges: list[list[int]]) -> dict[int, set[int]]:
    """The blocks of each loop, by its head."""
    before = reversed_edges(edges)
    dominators = dominating(before)
    loops: dict[int, set[int]] = {}
    for block, targets in enumerate(edges):
        for head in targets:
            if dominators[block] >> head & 1 and dominators[block] != (1 << len(edges)) - 1:
                loops.setdefault(head, {head}).update(reaching(block, head, before))
    return loops


Cost = tuple[int, int, int]  # narrow accesses, -bytes written, bytes read: the least is the way of whole vectors


def cost_of(block: list[Instruction], element_bytes: int) -> Cost:
    narrow = written = read = 0
    for i in block:
        if i.access is not None:
            direction, size = i.access
            if size == element_bytes:
                narrow += 1
            elif direction == "ST" and size >= 16:
                written += size
            elif size >= 16:
                read += size
    return narrow, -written, read


def best_way(head: int, members: set[int], edges: list[list[int]], costs: dict[int, Cost]) -> Cost:
    """The least cost of a way from the head once round the loop. Ways that leave the loop do not count."""
    never: Cost = (1 << 30, 0, 0)
    order, seen = [], {head}

    def visit(block: int) -> None:  # children first
        for t in edges[block]:
            if t in members and t not in seen:
                seen.add(t)
                visit(t)
        order.append(block)

    sys.setrecursionlimit(max(sys.getrecursionlimit(), 10 * len(edges)))
    visit(head)
    best: dict[int, Cost] = {}
    for block in order:  # jumps back inside an inner loop lead to what is not known yet, and are left out
        ways = [best[t] for t in edges[block] if t != head and t in best]
        ways += [(0, 0, 0)] * (head in edges[block])
        rest, mine = min(ways, default=never), costs[block]
        best[block] = (mine[0] + rest[0], mine[1] + rest[1], mine[2] + rest[2])
    return best[head]


def moved_by(head: int, members: set[int], inner: set[int], edges: list[list[int]], costs: list[Cost]) -> Moved | None:
    """Of the ways once round the loop the one with the fewest narrow accesses, then with the most stores, then with the
    fewest loads: whole vectors, and all values finite. None if the loop moves no whole vectors itself."""
    own = {b: (0, 0, 0) if b in inner else costs[b] for b in members}
    _, written, read = best_way(head, members, edges, own)
    if written == 0 and read == 0:  # one way does nothing, for a rank's own part or no known operation: another one
        _, written, read = best_way(head, members, edges, {b: (n, w, -r) for b, (n, w, r) in own.items()})
    narrow = sum(cost[0] for cost in own.values())
    return Moved(abs(read), -written, narrow) if written or read else None


def read_code(body: list[Instruction], element_bytes: int) -> Code:
    """All that the table says of a kernel's machine code."""
    accesses = [i.access for i in body if i.access is not None]
    wide = {d: sum(size // 16 for direction, size in accesses if direction == d) for d in ("LD", "ST")}
    small = {d: sum(size < 16 for direction, size in accesses if direction == d) for d in ("LD", "ST")}
    blocks = blocks_of(body)
    edges = following(blocks)
    costs = [cost_of(block, element_bytes) for block in blocks]
    loops = natural_loops(edges)
    moved = []
    for head, members in sorted(loops.items()):
        inside = (m for h, m in loops.items() if h != head and h in members and m < members)
        found = moved_by(head, members, set().union(*inside), edges, costs)
        if found is not None:
            moved.append(found)
    size = body[-1].address + INSTRUCTION_BYTES
    return Code(size, wide["LD"], wide["ST"], small["LD"], small["ST"], moved)
