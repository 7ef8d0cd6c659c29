"""`verify`: do all ranks hold the same bytes?"""

from __future__ import annotations

import zlib
from collections import Counter
from typing import Any

import torch

from dpcomm import arrays
from dpcomm.communicator import Communicator
from dpcomm.default import communicator_of
from dpcomm.errors import MismatchError


def verify(x: Any) -> None:
    """Checks that tensors, or a module's parameters and buffers, have the same bytes on all ranks of the default group.

    Collective. Only hashes travel.

    Args:
        x: A tensor or array, a list or dict of them, or a torch.nn.Module.

    Raises:
        MismatchError: On all ranks; names the first tensor that differs, and the ranks that differ from most others.
            The communicator stays usable.
        ArgumentError: There is no process group.
    """
    named = _named(x)
    comm = communicator_of(None)
    kinds, hashes = [], []
    for name, tensor in named:
        kind, value = arrays.digest(tensor)
        kinds.append(f"{name}: {kind}")
        hashes.append(value)
    # First what the tensors are: the hashes can be compared one by one only where their number is the same.
    shape = _gather(comm, [len(kinds), zlib.crc32("\n".join(kinds).encode())])
    odd = _odd_ranks(shape)
    if odd:
        raise MismatchError(
            f"verify: names, shapes or dtypes differ on ranks {odd}: rank {comm.rank} has {len(kinds)} tensors, "
            f"{_abridged(kinds)}"
        )
    if not hashes:
        return
    low, high = torch.tensor(hashes, dtype=torch.int64), torch.tensor(hashes, dtype=torch.int64)
    comm.allreduce(low, "min", codec="none")
    comm.allreduce(high, "max", codec="none")
    different = torch.nonzero(low != high).reshape(-1).tolist()
    if different:
        first = different[0]
        ranks = _odd_ranks(_gather(comm, [hashes[first]]))
        raise MismatchError(
            f"verify: {kinds[first]} differs on ranks {ranks}; {len(different)} of {len(kinds)} tensors differ. "
            "Were the ranks started from the same checkpoint, or did one of them skip a step?"
        )


def _named(x: Any) -> list[tuple[str, Any]]:
    if isinstance(x, torch.nn.Module):
        x = {name: value for name, value in x.state_dict().items() if isinstance(value, torch.Tensor)}
    if isinstance(x, dict):
        return [(str(name), value) for name, value in x.items()]
    if isinstance(x, (list, tuple)):
        return [(f"tensor {index}", value) for index, value in enumerate(x)]
    return [("tensor", x)]


def _gather(comm: Communicator, values: list[int]) -> list[tuple[int, ...]]:
    """The values of all ranks: a sum in which each rank fills its own row."""
    rows = torch.zeros(comm.nranks, len(values), dtype=torch.int64)
    rows[comm.rank] = torch.tensor(values, dtype=torch.int64)
    comm.allreduce(rows, "sum", codec="none")
    return [tuple(row) for row in rows.tolist()]


def _odd_ranks(rows: list[tuple[int, ...]]) -> list[int]:
    """The ranks whose values differ from the most frequent (of equally frequent ones, the lowest rank's)."""
    usual = Counter(rows).most_common(1)[0][0]
    return [rank for rank, row in enumerate(rows) if row != usual]


def _abridged(kinds: list[str]) -> str:
    return ", ".join(kinds[:3]) + (", ..." if len(kinds) > 3 else "")
