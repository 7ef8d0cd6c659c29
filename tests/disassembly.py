"""Reads object files: symbols (nm) and machine code (objdump), so that tests can judge what the compiler made.

Knows x86-64 only. A loop is a natural loop: a block that dominates another which jumps back to it, and all blocks from
which that other is reached without passing the first. Addresses alone would not do: the compiler moves rare parts of a
loop away, and parts of others in between.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import cpp_build

sys.path.append(str(cpp_build.ROOT / "benchmarks"))
from control_flow import dominating, reaching, reversed_edges

DEADLINE_S = 60
FUNCTION = re.compile(r"[0-9a-f]+ <(.+)>:")
LINE = re.compile(r"\s*([0-9a-f]+):\t((?:[0-9a-f]{2} )+)\s*\t(\S+)\s*(.*)")
TARGET = re.compile(r"([0-9a-f]+) <")
LEGACY_PREFIXES = {"66", "f2", "f3", "2e", "36", "3e", "26", "64", "65", "67", "f0"}


class Symbol(NamedTuple):
    """One line of nm. Kinds: lower case is local, U undefined, V and W (and v, w) weak, u unique."""

    name: str  # demangled
    kind: str

    @property
    def shared(self) -> bool:
        """The linker may keep one of several definitions."""
        return self.kind in "VvWwu"


class Instruction(NamedTuple):
    """One line of objdump."""

    address: int
    code: str  # bytes in hexadecimal, each followed by a space
    name: str
    operands: str

    @property
    def encoding(self) -> str:
        """ "VEX" (AVX, AVX2, F16C, FMA, BMI), "EVEX" (AVX-512), "0f38" (SSSE3, SSE4), or "" for what is older."""
        left = self.code.split()
        while left and left[0] in LEGACY_PREFIXES:
            left.pop(0)
        if left and left[0] in ("c4", "c5"):
            return "VEX"
        if left and left[0] == "62":
            return "EVEX"
        if left and "40" <= left[0] <= "4f":  # REX
            left.pop(0)
        return "0f38" if left[:2] in (["0f", "38"], ["0f", "3a"]) else ""

    @property
    def target(self) -> int:
        """Where a jump leads; -1 for other instructions and indirect jumps."""
        found = TARGET.match(self.operands) if self.name.startswith("j") else None
        return int(found[1], 16) if found else -1

    @property
    def leaves(self) -> bool:
        return self.name.startswith(("j", "ret"))

    @property
    def ends(self) -> bool:
        """What comes next in memory does not come next in time."""
        return self.name.startswith(("jmp", "ret"))


Loop = list[Instruction]


class Function(NamedTuple):
    """A function's name, demangled, and its instructions in the order of their addresses."""

    name: str
    body: list[Instruction]

    def loops(self) -> list[Loop]:
        """All loops, the smallest first."""
        blocks = list(self._blocks())
        following = self._following(blocks)
        before = reversed_edges(following)
        dominators = dominating(before)
        loops: dict[int, set[int]] = {}
        for block, targets in enumerate(following):
            for head in targets:
                if dominators[block] >> head & 1:
                    loops.setdefault(head, {head}).update(reaching(block, head, before))
        found = [[i for block in sorted(members) for i in blocks[block]] for members in loops.values()]
        return sorted(found, key=len)

    def _blocks(self) -> Iterator[Loop]:
        """Instructions that run one after the other: cut before targets and after jumps."""
        targets = {i.target for i in self.body}
        block: Loop = []
        for i in self.body:
            if i.address in targets and block:
                yield block
                block = []
            block.append(i)
            if i.leaves:
                yield block
                block = []
        if block:
            yield block

    def _following(self, blocks: list[Loop]) -> list[list[int]]:
        """The blocks that each block may go on with. Indirect jumps lead nowhere: the core has no jump tables."""
        index = {block[0].address: b for b, block in enumerate(blocks)}
        result = []
        for b, block in enumerate(blocks):
            last = block[-1]
            targets = [index[last.target]] if last.target in index else []
            if not last.ends and b + 1 < len(blocks):
                targets.append(b + 1)
            result.append(targets)
        return result


class Object:
    """An object file. Each tool runs once, when it is first asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def _tool(self, *command: str) -> Iterator[str]:
        done = cpp_build.call([*command, str(self.path)], DEADLINE_S)
        assert done.returncode == 0, f"{command[0]} failed: {done.stdout[-2000:]}"
        return iter(done.stdout.splitlines())

    @cached_property
    def symbols(self) -> list[Symbol]:
        """All but the compiler's own labels."""
        lines = (re.fullmatch(r"[0-9a-f ]+([A-Za-z]) (.+)", line) for line in self._tool("nm", "--demangle"))
        return [Symbol(m[2], m[1]) for m in lines if m and not m[2].startswith(".L")]

    @cached_property
    def functions(self) -> list[Function]:
        found: list[Function] = []
        for line in self._tool("objdump", "--disassemble", "--demangle", "--wide"):
            if m := LINE.fullmatch(line):
                found[-1].body.append(Instruction(int(m[1], 16), m[2], m[3], m[4]))
            elif m := FUNCTION.fullmatch(line):
                found.append(Function(m[1], []))
        assert any(function.body for function in found), "objdump's output was not understood"
        return found
