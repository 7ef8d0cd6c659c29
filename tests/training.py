"""DDP against the reference: what a step's gradients must be, to the bit, computed without DDP and without dpcomm.

A model here is a module whose forward returns the loss, and whose `inputs(step, rank)` says what it gets. Every rank
can make the gradients of all ranks alone, so each checks its own result.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import reference
import torch
from cases import Array, array
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import dpcomm

SMALL_BUCKETS_MB = 0.004  # a few KiB: several buckets, and a rebuild after the first step
Gradients = dict[str, "torch.Tensor | None"]


def seeded(step: int, rank: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1000 * step + rank))


class Net(nn.Module):
    """Three layers of 4 KiB and their biases."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32))

    def inputs(self, step: int, rank: int) -> tuple[torch.Tensor, ...]:
        return (seeded(step, rank, 8, 32),)

    def forward(self, x: torch.Tensor) -> Any:
        return self.layers(x).square().mean()


def backward(model: nn.Module, step: int, rank: int) -> None:
    """One forward and backward, of a DDP model or of a plain one."""
    module: Any = model.module if isinstance(model, DDP) else model
    model(*module.inputs(step, rank)).backward()


def alone(module: nn.Module, steps: Sequence[int], rank: int) -> Gradients:
    """The gradients of one rank, of several accumulated steps, without DDP."""
    own = copy.deepcopy(module)
    own.zero_grad()
    for step in steps:
        backward(own, step, rank)
    return {name: dense(p.grad) for name, p in own.named_parameters()}


def dense(grad: torch.Tensor | None) -> torch.Tensor | None:
    return grad.coalesce().to_dense() if grad is not None and grad.is_sparse else grad


def bits(grad: torch.Tensor) -> Array:
    """Complex gradients lie in DDP's buckets as pairs of real numbers."""
    return array(torch.view_as_real(grad.resolve_conj()) if grad.is_complex() else grad)


class Recorder:
    """Remembers which parameters lie in which bucket, in order: groups of codecs depend on it."""

    def __init__(self, ddp: DDP, state: dpcomm.HookState) -> None:
        self.names = {id(p): name for name, p in ddp.module.named_parameters()}
        self.state, self.inner = state, state._start
        self.buckets: list[list[str]] = []
        self.futures: list[tuple[int, torch.futures.Future[torch.Tensor]]] = []  # with their buckets' addresses
        state._start = self.start  # type: ignore[method-assign]

    def start(self, bucket: Any) -> torch.futures.Future[torch.Tensor]:
        self.buckets.append([self.names[id(p)] for p in bucket.parameters()])
        future = self.inner(bucket)
        if not bucket.buffer().is_sparse:
            self.futures.append((bucket.buffer().data_ptr(), future))
        return future

    def clear(self) -> None:
        self.buckets.clear()
        self.futures.clear()


def hooked(module: nn.Module, codec: str = "none", **options: Any) -> tuple[DDP, Recorder]:
    """A DDP model with the hook registered; options are DDP's."""
    ddp = DDP(module, **options)
    return ddp, Recorder(ddp, dpcomm.register_ddp_hook(ddp, codec=codec, timeout_s=20.0))


def expected(
    ranks: Sequence[Gradients], buckets: Sequence[Sequence[str]], codec: str, plain: Sequence[str] = ()
) -> dict[str, Array]:
    """The mean of all ranks' gradients, bucket by bucket; a rank without a gradient contributes zeros."""
    means: dict[str, Array] = {}
    for names in buckets:
        like = {n: next(g[n] for g in ranks if g[n] is not None) for n in names if any(g[n] is not None for g in ranks)}
        flat = [[bits(g[n]) if g[n] is not None else np.zeros_like(bits(like[n])) for n in like] for g in ranks]  # type: ignore[arg-type]
        if not like:
            continue
        sizes = np.cumsum([x.size for x in flat[0]])[:-1]
        joined = [[np.concatenate(parts)] for parts in flat]
        pairs = any(x is not None and x.is_complex() for x in like.values())
        encodable = joined[0][0].dtype.name in ("float32", "float16", "uint16") and not pairs
        served = encodable and not set(names) & set(plain)
        (mean,) = reference.allreduce(joined, "mean", codec=codec if served else "none")
        means.update(zip(like, np.split(mean, sizes), strict=True))
    return means


def check_gradients(
    ddp: DDP,
    recorder: Recorder,
    steps: Sequence[int],
    ranks: Sequence[int],
    codec: str = "none",
    *,
    plain: Sequence[str] = (),
) -> None:
    """The gradients in the model are the mean over `ranks`, to the bit; a parameter that nobody used has none.

    All of the model's buckets were recorded since the last call. Those of `plain` parameters travel without a codec.
    """
    means = expected([alone(ddp.module, steps, rank) for rank in ranks], recorder.buckets, codec, plain)
    recorder.clear()
    for name, p in ddp.module.named_parameters():
        grad = dense(p.grad)
        if name not in means:
            assert grad is None, f"{name} has a gradient that no rank made"
            continue
        assert grad is not None, f"{name} has no gradient"
        assert bits(grad).tobytes() == means[name].tobytes(), f"{name} differs from the reference"


def train_through(
    engine: str, rank: int, nranks: int, codec: str, steps: int, options: dict[str, Any] | None = None
) -> str:
    """Trains with the hook, compares each step's gradients with the reference. Says which engine it was."""
    ddp = DDP(Net(), bucket_cap_mb=SMALL_BUCKETS_MB, **(options or {}))
    state = dpcomm.register_ddp_hook(ddp, codec=codec, engine=engine, timeout_s=20.0)
    recorder = Recorder(ddp, state)
    for step in range(steps):
        ddp.zero_grad()
        backward(ddp, step, rank)
        check_gradients(ddp, recorder, [step], range(nranks), codec)
    dpcomm.verify(ddp)
    assert state.comm is not None
    return state.comm.engine


def sgd(ddp: DDP) -> torch.optim.Optimizer:
    return torch.optim.SGD(ddp.parameters(), lr=0.05)


def parameters(ddp: DDP) -> list[torch.Tensor]:
    return [p.detach() for p in ddp.parameters()]
