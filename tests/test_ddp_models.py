"""The DDP hook with unusual models: unused, tied, empty, sparse and mixed parameters; gradients equal the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks import Pool
from torch import nn
from training import SMALL_BUCKETS_MB, Net, backward, check_gradients, hooked, seeded, sgd

import dpcomm

Pools = Callable[[int], Pool]


class Skipping(Net):
    """The middle layer is used by the ranks in `users` only."""

    def __init__(self, users: tuple[int, ...]) -> None:
        super().__init__()
        self.users = users

    def inputs(self, step: int, rank: int) -> tuple[Any, ...]:
        return seeded(step, rank, 8, 32), rank in self.users

    def forward(self, x: torch.Tensor, whole: bool) -> Any:  # type: ignore[override]
        h = self.layers[1](self.layers[0](x))
        return self.layers[4](self.layers[2](h) if whole else h).square().mean()


class UnusedOnOne(Skipping):
    def __init__(self) -> None:
        super().__init__((1,))


class UnusedOnAll(Skipping):
    def __init__(self) -> None:
        super().__init__(())


class Tied(Net):
    """One weight in two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[4].weight = self.layers[0].weight


class MixedDtypes(nn.Module):
    """float32, float64, float16 and bfloat16 parameters in turn, so that buckets of all kinds arise."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float32]
        self.layers = nn.ModuleList(nn.Linear(24, 24, dtype=dtype) for dtype in self.dtypes)

    def inputs(self, step: int, rank: int) -> tuple[torch.Tensor, ...]:
        return (seeded(step, rank, 8, 24),)

    def forward(self, x: torch.Tensor) -> Any:
        for layer, dtype in zip(self.layers, self.dtypes, strict=True):
            x = torch.tanh(layer(x.to(dtype)))
        return x.float().square().mean()


class HalfPrecision(Net):
    """All of it in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.to(torch.bfloat16)

    def forward(self, x: torch.Tensor) -> Any:
        return self.layers(x.to(torch.bfloat16)).float().square().mean()


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Parameter(torch.randn(20, 20, dtype=torch.complex64))
        self.second = nn.Parameter(torch.randn(20, dtype=torch.complex128))
        self.real = nn.Parameter(torch.randn(20))

    def inputs(self, step: int, rank: int) -> tuple[torch.Tensor, ...]:
        return (seeded(step, rank, 5, 20),)

    def forward(self, x: torch.Tensor) -> Any:
        return ((x * self.real).to(torch.complex64) @ self.first * self.second).abs().square().mean()


class Empty(Net):
    """Parameters without elements among the others, and one dtype that has nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.none = nn.Parameter(torch.zeros(0))
        self.rows = nn.Parameter(torch.zeros(0, 7))
        self.doubles = nn.Parameter(torch.zeros(3, 0, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x) + self.none.sum() + self.rows.sum() + self.doubles.sum().float()


class Frozen(Net):
    def __init__(self) -> None:
        super().__init__()
        self.layers[2].requires_grad_(False)


MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "unused-on-one-rank": (UnusedOnOne, {"find_unused_parameters": True}),
    "unused-on-all-ranks": (UnusedOnAll, {"find_unused_parameters": True}),
    "unused-on-all-ranks-static": (UnusedOnAll, {"static_graph": True}),
    "tied": (Tied, {}),
    "mixed-dtypes": (MixedDtypes, {}),
    "mixed-dtypes-views": (MixedDtypes, {"gradient_as_bucket_view": True}),
    "bfloat16": (HalfPrecision, {}),
    "complex": (Complex, {}),
    "zero-size": (Empty, {}),
    "frozen": (Frozen, {}),
}


def train(rank: int, nranks: int, name: str, codec: str, small: bool) -> None:
    make, options = MODELS[name]
    cap = {"bucket_cap_mb": SMALL_BUCKETS_MB} if small else {}
    ddp, recorder = hooked(make(), codec, **cap, **options)
    optimizer = sgd(ddp)
    for step in range(4):
        optimizer.zero_grad()
        backward(ddp, step, rank)
        check_gradients(ddp, recorder, [step], range(nranks), codec)
        optimizer.step()
    dpcomm.verify(ddp)


@pytest.mark.parametrize("small", [False, True], ids=["large-buckets", "small-buckets"])
@pytest.mark.parametrize("codec", ["none", "fp16"])
@pytest.mark.parametrize("name", MODELS)
def test_unusual_models_have_the_references_gradients(pool: Pools, name: str, codec: str, small: bool) -> None:
    pool(2).run(train, name, codec, small)


# --- sparse ----------------------------------------------------------------------------------------------------------


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(30, 8, sparse=True)
        self.layer = nn.Linear(8, 8)

    def inputs(self, step: int, rank: int) -> tuple[torch.Tensor, ...]:
        return (torch.tensor([3, 4 + rank, 10 + step, 3]),)

    def forward(self, rows: torch.Tensor) -> Any:
        return self.layer(self.table(rows)).square().mean()


def train_sparse(rank: int, nranks: int, codec: str) -> None:
    """torch.distributed adds and dpcomm divides: of two ranks, the bits of the reference's codec none."""
    ddp, recorder = hooked(Embedded(), codec)
    optimizer = sgd(ddp)
    for step in range(3):
        optimizer.zero_grad()
        backward(ddp, step, rank)
        assert ddp.module.table.weight.grad.is_sparse
        assert ["table.weight"] in recorder.buckets  # alone, so it may have a codec of its own
        check_gradients(ddp, recorder, [step], range(nranks), codec, plain=("table.weight",))
        optimizer.step()
    dpcomm.verify(ddp)


@pytest.mark.parametrize("codec", ["none", "fp16"])
def test_04_sparse_embeddings_are_averaged(pool: Pools, codec: str) -> None:
    pool(2).run(train_sparse, codec)


# --- higher derivatives, one rank ------------------------------------------------------------------------------------


class OneWeight(Net):
    """DDP itself allows create_graph only where no two parameters share a bucket."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(32, 32, bias=False), nn.Tanh())


def penalise(rank: int, nranks: int, codec: str) -> None:
    """create_graph makes DDP's buckets require grad; the hook must not mind."""
    ddp, recorder = hooked(OneWeight(), codec)
    for step in range(3):
        ddp.zero_grad()
        ddp(*ddp.module.inputs(step, rank)).backward(create_graph=True)
        check_gradients(ddp, recorder, [step], range(nranks), codec)


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
@pytest.mark.parametrize("codec", ["none", "fp16"])
def test_create_graph(pool: Pools, codec: str) -> None:
    pool(2).run(penalise, codec)


def train_alone(rank: int, nranks: int) -> None:
    """A group of one: the mean is the gradient itself, with every codec."""
    groups = [torch.distributed.new_group([r]) for r in range(nranks)]
    ddp, recorder = hooked(Net(), "fp16", process_group=groups[rank], bucket_cap_mb=SMALL_BUCKETS_MB)
    for step in range(3):
        ddp.zero_grad()
        backward(ddp, step, rank)
        check_gradients(ddp, recorder, [step], [rank], "fp16")


def test_33_a_group_of_one(pool: Pools) -> None:
    pool(2).run(train_alone)
