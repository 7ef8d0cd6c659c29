"""Is an all-reduce (sum) right? Inputs whose exact result every rank can compute, and a bound for each way to round.

It knows how precisely each way rounds and nothing of how bytes move.
"""

import dataclasses
import zlib
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

# Inputs repeat after so many elements, so that the exact result of a large buffer is that of a small one. A prime: no
# two groups, slices or chunks hold the same values.
PERIOD = 1_000_003

# Unit roundoff of each lossy codec: the relative error of one rounding to nearest.
UNIT_ROUNDOFF = {"fp16": 2.0**-11}


class Precision(NamedTuple):
    """How far a result may be from the exact sum: by so many roundings in a row, and by what scaling cannot save."""

    roundoff: float = 0.0  # relative error of one rounding; 0: the result is exact
    roundings: int = 0  # that any term may pass on its way
    of_largest: float = 0.0  # absolute error, relative to the largest sum of magnitudes
    absolute: float = 0.0


EXACT = Precision()


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Of all ranks together. error: relative L2 against fp64; 0 where the result must be exact."""

    wrong: int
    error: float


def precision_of(codec: str, algorithm: str, nranks: int) -> Precision:
    """dpcomm's codec and algorithm. direct and oneshot round each term and the sum once; ring rounds at every hop,
    native (NCCL adds plain 16 bits) at every addition.

    Elements far below their group's largest magnitude M are off by up to 2^-39 M (half the smallest fp16 step, 2^-25,
    over 2^14, the least that M is scaled to) at each of at most N + 1 roundings.
    """
    if codec == "none":
        return EXACT
    if algorithm == "native":
        return precision_of_sixteen_bits({"fp16": torch.float16, "bf16": torch.bfloat16}[codec], nranks)
    roundings = nranks if algorithm == "ring" else 2
    return Precision(UNIT_ROUNDOFF[codec], max(roundings, 2), of_largest=(nranks + 1) * 2.0**-39)


def precision_of_half(nranks: int) -> Precision:
    """Cast to fp16, divided by N, summed in fp16 (N - 1 additions), multiplied by N again: PyTorch's fp16 hook.

    It does not scale: below 2^-14 a step is 2^-24, so that the cast errs by up to 2^-25 and the division by N 2^-25 of
    the sum, for each of N terms. Sums of such small numbers are exact.
    """
    return Precision(2.0**-11, nranks + 1, absolute=nranks * (nranks + 1) * 2.0**-25)


def precision_of_sixteen_bits(dtype: torch.dtype, nranks: int) -> Precision:
    """Cast to 16 bits, and summed in 16 bits (N - 1 additions). bfloat16 has the range of float32; of float16 see
    precision_of_half()."""
    if dtype == torch.float16:
        return Precision(2.0**-11, nranks, absolute=nranks * 2.0**-25)
    return Precision(2.0**-8, nranks)


def precision_of_tensors(precision: Precision, dtype: torch.dtype, nranks: int) -> Precision:
    """The same way to add where the tensors have 16 bits: their values are rounded before it, and the sums after it."""
    if dtype == torch.float32:
        return precision
    ends = precision_of_sixteen_bits(dtype, nranks + 1)  # N values and their sum
    return Precision(
        max(precision.roundoff, ends.roundoff),
        precision.roundings + 2,
        precision.of_largest,
        precision.absolute + ends.absolute,
    )


def parts_of(x: Tensor) -> list[Tensor]:
    """Views of at most PERIOD elements, in order."""
    return [x[start : start + PERIOD] for start in range(0, len(x), PERIOD)]


def verify(
    allreduce: Callable[[Tensor], object],
    elems: int,
    precision: Precision,
    corrupt: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Verdict:
    """Runs one all-reduce (sum, in place) and counts elements that are wrong on any rank. Collective.

    Wrong is an element further from the exact sum than `precision` allows or, whatever its value, an element whose bits
    differ from rank 0's.

    Args:
        corrupt: a check of the check. "bit" flips the lowest bit of one element on the last rank, "value" adds 1 to one
            element on every rank, after the call.
        dtype: of the tensor. `precision` has to allow for the rounding of its values, and of the sum.
    """
    rank, nranks = dist.get_rank(), dist.get_world_size()
    terms = [_inputs(precision, r, min(elems, PERIOD)) for r in range(nranks)]
    x = _repeated(terms[rank], elems).to(dtype)
    allreduce(x)
    if corrupt == "bit" and rank == nranks - 1:
        x.view(torch.uint8)[elems // 2 * x.element_size()] ^= 1  # little-endian: the lowest of its bits
    if corrupt == "value":
        x[elems // 2] += 1

    wrong, error_of_rank = _judge(x, _differing(x), *_sums(terms, precision))
    total = torch.tensor([wrong], dtype=torch.int64)
    error = torch.tensor([error_of_rank], dtype=torch.float64)
    dist.all_reduce(total)
    dist.all_reduce(error, dist.ReduceOp.MAX)
    return Verdict(int(total), float(error))


def verify_local(
    allreduce: Callable[[list[Tensor]], object], nranks: int, elems: int, precision: Precision, spoil: bool = False
) -> Verdict:
    """verify() where all ranks live in this process: `allreduce` takes a tensor of each, in rank order.

    Args:
        spoil: a check of the check: adds 1 to one element of the last rank after the call.
    """
    terms = [_inputs(precision, r, min(elems, PERIOD)) for r in range(nranks)]
    xs = [_repeated(term, elems) for term in terms]
    allreduce(xs)
    if spoil:
        xs[-1][elems // 2] += 1
    exact, bound = _sums(terms, precision)
    first = xs[0].view(torch.int32)
    judged = [_judge(x, first != x.view(torch.int32), exact, bound) for x in xs]
    return Verdict(sum(wrong for wrong, _ in judged), max(error for _, error in judged))


def _repeated(term: Tensor, elems: int) -> Tensor:
    x = torch.empty(elems)
    for part in parts_of(x):
        part.copy_(term[: len(part)])
    return x


def _judge(x: Tensor, other: Tensor, exact: Tensor, bound: Tensor) -> tuple[int, float]:
    """How many elements of one rank are wrong, and its relative L2 error. other: which differ from rank 0's."""
    wrong = 0
    error_squares = exact_squares = 0.0
    for part, differs in zip(parts_of(x), parts_of(other), strict=True):
        sums = exact[: len(part)]
        difference = (part.double() - sums).abs_()
        within = difference <= bound[: len(part)]  # not "difference > bound": a NaN is wrong too
        wrong += int((~within | differs).sum())
        error_squares += float(difference.square_().sum())
        exact_squares += float(sums.square().sum())
    return wrong, (error_squares / exact_squares) ** 0.5 if exact_squares else 0.0


def _inputs(precision: Precision, rank: int, elems: int) -> Tensor:
    """One rank's values: small integers, whose sums are exact, or independent Gaussians where values are rounded."""
    if precision == EXACT:
        return ((torch.arange(elems) * 7 + rank * 13) % 1021).float()
    return torch.randn(elems, generator=torch.Generator().manual_seed(rank))


def _sums(terms: list[Tensor], precision: Precision) -> tuple[Tensor, Tensor]:
    """The exact sums, and the most that each may be missed by.

    A term that is rounded k times to u and passes N additions in fp32 is off by a factor between (1 - u)^k (1 - v)^N
    and (1 + u)^k (1 + v)^N with v = 2^-24; what a sum is off by is at most that times the sum of magnitudes.
    """
    exact = torch.zeros_like(terms[0], dtype=torch.float64)
    magnitudes = torch.zeros_like(exact)
    for term in terms:
        exact += term
        magnitudes += term.abs()
    if precision == EXACT:
        return exact, torch.zeros_like(exact)
    relative = (1 + precision.roundoff) ** precision.roundings * (1 + 2.0**-24) ** len(terms) - 1
    return exact, magnitudes * relative + magnitudes.max() * precision.of_largest + precision.absolute


def _differing(x: Tensor) -> Tensor:
    """Which elements' bits differ from rank 0's. Collective. Rank 0's elements are sent only where a checksum differs:
    eight ranks on two processors need seconds for 256 MiB."""
    mine = x.view(torch.uint8)
    lowest, highest = (torch.tensor([zlib.crc32(mine.numpy().data)], dtype=torch.int64) for _ in range(2))
    dist.all_reduce(lowest, dist.ReduceOp.MIN)
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    if int(lowest) == int(highest):
        return torch.zeros(len(x), dtype=torch.bool)
    first = mine.clone()
    dist.broadcast(first, src=0)
    return (first != mine).view(len(x), x.element_size()).any(dim=1)
