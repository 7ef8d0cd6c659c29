"""Graphs of blocks of machine code, of any machine: block 0 is the entry, edges[b] are those that may follow b."""

from __future__ import annotations


def reversed_edges(edges: list[list[int]]) -> list[list[int]]:
    before: list[list[int]] = [[] for _ in edges]
    for block, targets in enumerate(edges):
        for target in targets:
            before[target].append(block)
    return before


def dominating(before: list[list[int]]) -> list[int]:
    """For each block the set, as bits, of blocks that every way to it passes; all for what is never reached."""
    everything = (1 << len(before)) - 1
    result = [1] + [everything] * (len(before) - 1)
    changed = True
    while changed:
        changed = False
        for block in range(1, len(before)):
            common = everything
            for b in before[block]:
                common &= result[b]
            new = common | 1 << block
            changed |= new != result[block]
            result[block] = new
    return result


def reaching(block: int, head: int, before: list[list[int]]) -> set[int]:
    """The blocks from which `block` is reached without passing `head`."""
    found, left = {head}, [block]
    while left:
        b = left.pop()
        if b not in found:
            found.add(b)
            left += before[b]
    return found
