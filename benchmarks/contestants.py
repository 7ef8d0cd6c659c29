"""Who takes part in the report from Python: each is an all-reduce of a tensor in place, and how to verify it.

The rank process is part of a gloo group already. mpi4py is imported only where Open MPI takes part.
"""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from verification import EXACT, Precision, precision_of, precision_of_half

import dpcomm

ALGORITHMS = ("auto", "direct", "oneshot", "ring")
# oneshot: several times what auto takes it for; beyond, it only loses. The others: auto says it all about larger ones,
# where eight ranks on two processors need seconds for a call.
MOST_BYTES = {"oneshot": 256 << 10, "direct": 100 << 20, "ring": 100 << 20}
VARIANTS = {
    "floor": ["copy"],
    "gloo": [""],
    "openmpi": [""],
    "fp16_compress_hook": [""],
    "dpcomm": [f"{codec}/{algorithm}" for codec in ("none", "fp16") for algorithm in ALGORITHMS],
}


class Contestant(NamedTuple):
    """Something to verify and to time."""

    name: str
    variant: str
    allreduce: Callable[[Tensor], object]
    meet: Callable[[Tensor], object]  # a call with a few elements: afterwards all ranks are at the same point
    precision: Precision = EXACT
    mean: bool = False  # leaves the mean, not the sum
    sums: bool = True  # False for the floor, which has no result to verify
    most_bytes: int | None = None  # not asked for larger sizes

    def as_sum(self, x: Tensor) -> None:
        """For verification."""
        self.allreduce(x)
        if self.mean:
            x.mul_(dist.get_world_size())


def select(specifications: list[str]) -> list[tuple[str, str]]:
    """Names and variants of NAME (all its variants) and NAME:VARIANT. The floor always takes part.

    Raises:
        ValueError: There is no such contestant.
    """
    selected = [("floor", "copy")]
    for specification in specifications:
        name, _, variant = specification.partition(":")
        if variant not in ["", *VARIANTS.get(name, [])] or name not in VARIANTS:
            raise ValueError(
                f"unknown contestant {specification!r}: expected {', '.join(VARIANTS)} or as dpcomm:none/ring"
            )
        selected += [(name, each) for each in ([variant] if variant else VARIANTS[name])]
    return list(dict.fromkeys(selected))


def make(selected: list[tuple[str, str]], comm: dpcomm.Communicator, source: Tensor) -> list[Contestant]:
    """The contestants, in order. `source` is what the floor copies from: as long as the largest buffer."""
    makers: dict[str, Callable[[str], Contestant]] = {
        "floor": lambda variant: _floor(comm, source),
        "gloo": lambda variant: Contestant("gloo", variant, dist.all_reduce, dist.all_reduce),
        "openmpi": lambda variant: _openmpi(),
        "fp16_compress_hook": lambda variant: _hook(comm.nranks),
        "dpcomm": lambda variant: _dpcomm(comm, *variant.split("/")),
    }
    return [makers[name](variant) for name, variant in selected]


def _floor(comm: dpcomm.Communicator, source: Tensor) -> Contestant:
    """A copy of the buffer by all ranks at once: an all-reduce has to read its input and write its result at least."""
    return Contestant("floor", "copy", lambda x: x.copy_(source[: len(x)]), comm.allreduce, sums=False)


def mpi() -> Any:
    """mpi4py's MPI, initialized without support for threads, which is where it is fastest."""
    importlib.import_module("mpi4py").rc.threads = False
    return importlib.import_module("mpi4py.MPI")


def _openmpi() -> Contestant:
    module = mpi()
    world, in_place = module.COMM_WORLD, module.IN_PLACE

    def allreduce(x: Tensor) -> None:
        world.Allreduce(in_place, x.numpy())

    return Contestant("openmpi", "", allreduce, allreduce)


def _hook(nranks: int) -> Contestant:
    """PyTorch's own function. Python cannot make a GradBucket, but the hook also takes a tuple with the tensor."""
    hook: Any = fp16_compress_hook

    def allreduce(x: Tensor) -> None:
        hook(dist.group.WORLD, (x,)).wait()

    return Contestant("fp16_compress_hook", "", allreduce, allreduce, precision_of_half(nranks), mean=True)


def _dpcomm(comm: dpcomm.Communicator, codec: str, algorithm: str) -> Contestant:
    def allreduce(x: Tensor) -> None:
        comm.allreduce(x, "sum", codec=codec, algorithm=algorithm)

    return Contestant(
        "dpcomm",
        f"{codec}/{algorithm}",
        allreduce,
        allreduce,
        precision_of(codec, algorithm, comm.nranks),
        most_bytes=MOST_BYTES.get(algorithm),
    )
