"""Is an all-reduce (sum) right? Inputs whose exact result every rank can compute, and a bound for each codec.

It knows the codecs' precision and nothing of how bytes move.
"""

import dataclasses
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

PART_ELEMS = (
    1 << 20
)  # results are checked in parts: the fp64 reference of a whole buffer would take 2 (N+1) times its memory

# Unit roundoff of each lossy codec: the relative error of one rounding to nearest.
UNIT_ROUNDOFF = {"fp16": 2.0**-11}


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Of all ranks together. error: relative L2 against fp64; 0 for `none`, whose result must be exact."""

    wrong: int
    error: float


def parts_of(x: Tensor) -> list[Tensor]:
    """Views of at most PART_ELEMS elements, in order."""
    return [x[start : start + PART_ELEMS] for start in range(0, len(x), PART_ELEMS)]


def verify(allreduce: Callable[[Tensor], object], elems: int, codec: str, corrupt: str | None = None) -> Verdict:
    """Runs one all-reduce (sum, float32, in place) and counts elements that are wrong on any rank. Collective.

    Wrong is an element outside the codec's bound (for `none`: not equal to the exact sum) or, whatever its value, an
    element whose bits differ from rank 0's.

    Args:
        corrupt: a check of the check. "bit" flips the lowest bit of one element on the last rank, "value" adds 1 to one
            element on every rank, after the call.
    """
    rank, nranks = dist.get_rank(), dist.get_world_size()
    x = torch.empty(elems)
    for index, part in enumerate(parts_of(x)):
        part.copy_(_inputs(codec, rank, index, len(part)))
    allreduce(x)
    if corrupt == "bit" and rank == nranks - 1:
        x.view(torch.int32)[elems // 2] ^= 1
    if corrupt == "value":
        x[elems // 2] += 1

    wrong = 0
    error_squares = exact_squares = 0.0
    for index, (part, first) in enumerate(zip(parts_of(x), parts_of(_of_rank_0(x)), strict=True)):
        terms = [_inputs(codec, r, index, len(part)).double() for r in range(nranks)]
        exact = torch.stack(terms).sum(dim=0)
        difference = (part.double() - exact).abs()
        within = difference <= _bound(codec, terms)
        same = part.view(torch.int32) == first.view(torch.int32)
        wrong += int((~within | ~same).sum())  # not "difference > bound": a NaN is wrong too
        error_squares += float(difference.square().sum())
        exact_squares += float(exact.square().sum())
    total = torch.tensor([wrong], dtype=torch.int64)
    error = torch.tensor([(error_squares / exact_squares) ** 0.5 if exact_squares else 0.0], dtype=torch.float64)
    dist.all_reduce(total)
    dist.all_reduce(error, dist.ReduceOp.MAX)
    return Verdict(int(total), float(error))


def _inputs(codec: str, rank: int, part_idx: int, elems: int) -> Tensor:
    """One rank's values of one part: small integers, whose sums are exact, for `none`; else independent Gaussians."""
    if codec == "none":
        indexes = torch.arange(part_idx * PART_ELEMS, part_idx * PART_ELEMS + elems)
        return ((indexes * 7 + rank * 13) % 1021).float()
    generator = torch.Generator().manual_seed(1_000_003 * rank + part_idx)
    return torch.randn(elems, generator=generator)


def _bound(codec: str, terms: list[Tensor]) -> Tensor | float:
    """The most that each element may differ from the exact sum.

    With u the codec's unit roundoff, every term is rounded once and the sum once: u sum|x| + u |y|, and |y| is at most
    (1 + u) sum|x|. The fp32 sum of N terms adds N 2^-24 sum|x|. Elements far below their group's largest magnitude M
    are off by up to 2^-39 M (half the smallest fp16 step, 2^-25, over 2^14, the least that M is scaled to) at each of
    N + 1 roundings; the largest magnitude of the whole part stands for M.
    """
    if codec == "none":
        return 0.0
    u, nranks = UNIT_ROUNDOFF[codec], len(terms)
    magnitudes = torch.stack(terms).abs().sum(dim=0)
    return magnitudes * (2 * u + 2 * u * u + nranks * 2.0**-24) + magnitudes.max() * (nranks + 1) * 2.0**-39


def _of_rank_0(x: Tensor) -> Tensor:
    """Rank 0's x. Collective."""
    first = x.clone()
    dist.broadcast(first, src=0)
    return first
