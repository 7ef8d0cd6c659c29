"""What is trained and by whose gradients' means: two models with their data, and the contestants that train them.

It takes no times. No `from __future__ import annotations` here: DDP compares a hook's annotations as objects.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lm.data import ByteWindows, batches, load_text
from lm.model import ModelShape, seeded_model
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket  # dist.GradBucket, in a way that mypy follows
from torch.autograd.profiler import record_function
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel

import dpcomm

BATCHES = 8  # made before anything is timed, and taken in turn
Batch = tuple[Tensor, Tensor]


class Waitable(Protocol):
    """What an asynchronous all-reduce returns, whoever did it."""

    def wait(self) -> object: ...


@dataclasses.dataclass(frozen=True)
class Task:
    """A model that maps (inputs, targets) to its loss, its data and its optimizer; equal for all contestants."""

    name: str
    batch: int  # samples that a rank takes in one step
    model: Callable[[], nn.Module]
    data: Callable[[int, int], list[Batch]]  # of a rank out of so many
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]


class MLP(nn.Module):
    """Linear layers of one width with ReLU between them; regression with mean squared error."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        for layer in self.layers:
            # PyTorch's own initialisation lets eight such layers' gradients shrink to where float16 has no numbers.
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")  # type: ignore[arg-type]

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The loss of targets given inputs, both [batch, width]."""
        x = inputs
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return F.mse_loss(self.layers[-1](x), targets)


def mlp_task(layers: int, width: int, batch: int, seed: int) -> Task:
    """Regression on random data."""

    def model() -> nn.Module:
        torch.manual_seed(seed)
        return MLP(layers, width)

    def data(rank: int, nranks: int) -> list[Batch]:
        random = torch.Generator().manual_seed(seed * nranks + rank + 1)
        return [
            (torch.randn(batch, width, generator=random), torch.randn(batch, width, generator=random))
            for _ in range(BATCHES)
        ]

    return Task("mlp", batch, model, data, lambda model: torch.optim.SGD(model.parameters(), lr=0.01))


def gpt_task(batch: int, seed: int) -> Task:
    """The language model of examples/lm with its own data and optimizer; a sample is a window of 128 bytes."""
    shape = ModelShape()

    def data(rank: int, nranks: int) -> list[Batch]:
        windows = ByteWindows(load_text(None), shape.context)
        return list(itertools.islice(batches(windows, batch, rank, nranks, seed), BATCHES))

    return Task(
        "gpt",
        batch,
        lambda: seeded_model(shape, seed),
        data,
        lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3),
    )


@dataclasses.dataclass(frozen=True)
class Method:
    """Who averages the gradients.

    Attributes:
        register: Gives a DDP model its hook; returns the hook's state, or None where there is none.
        start: Reduces one bucket with nothing else to do, as the method does within a step.
        fills_buckets: Whether DDP copies gradients into its buckets and back; if not, steps run under no_sync().
        communicates: Whether ranks meet in every step.
    """

    name: str
    register: Callable[[DistributedDataParallel, float], Any]
    start: Callable[[Any, Tensor], Waitable]
    fills_buckets: bool = True
    communicates: bool = True


def _nothing(*_: object) -> None:
    """Stock DDP needs no hook."""


def _start_gloo(_: object, bucket: Tensor) -> Waitable:
    work: Waitable | None = dist.all_reduce(bucket, async_op=True)
    assert work is not None
    return work


def _register_fp16_hook(ddp: DistributedDataParallel, _: float) -> None:
    ddp.register_comm_hook(None, fp16_compress_hook)


def _start_fp16_hook(_: object, bucket: Tensor) -> Waitable:
    """The three steps of fp16_compress_hook, which itself takes a GradBucket that only DDP can make."""
    half = bucket.to(torch.float16).div_(dist.get_world_size())
    work = dist.all_reduce(half, async_op=True)
    assert work is not None

    def expand(done: torch.futures.Future[Any]) -> Tensor:
        return bucket.copy_(done.value()[0])

    expanded: Waitable = work.get_future().then(expand)
    return expanded


def _dpcomm(codec: str) -> Method:
    def register(ddp: DistributedDataParallel, bucket_cap_mb: float) -> dpcomm.HookState:
        return dpcomm.register_ddp_hook(ddp, codec=codec, bucket_cap_mb=bucket_cap_mb)

    def start(state: Any, bucket: Tensor) -> Waitable:
        work: Waitable = state.comm.allreduce(bucket, "mean", async_op=True)
        return work

    return Method(f"dpcomm {codec}", register, start)


def _leave_bucket(_: object, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def _start_nothing(_: object, __: Tensor) -> Waitable:
    done: torch.futures.Future[None] = torch.futures.Future()
    done.set_result(None)
    return done


def _register_nothing(ddp: DistributedDataParallel, _: float) -> None:
    ddp.register_comm_hook(None, _leave_bucket)


# What the others are compared with: a step's arithmetic, and the same with DDP's own work on its buckets.
COMPUTE = Method("no_sync", _nothing, _start_nothing, fills_buckets=False, communicates=False)
BUCKETS = Method("buckets only", _register_nothing, _start_nothing, communicates=False)
METHODS = {
    "stock": Method("stock DDP, gloo", _nothing, _start_gloo),
    "fp16-hook": Method("fp16_compress_hook", _register_fp16_hook, _start_fp16_hook),
    "none": _dpcomm("none"),
    "fp16": _dpcomm("fp16"),
    # For the test that replicas that differ are noticed: a hook that forgets to reduce.
    "forgetful": Method("forgetful", _register_nothing, _start_nothing),
}


class Contestant:
    """One method in training. Its constructor, `step` and `reduce_alone` are collective."""

    def __init__(self, method: Method, task: Task, data: list[Batch], bucket_cap_mb: float) -> None:
        self.method = method
        self.losses: list[float] = []
        self.ddp = DistributedDataParallel(task.model(), bucket_cap_mb=bucket_cap_mb)
        self._data = data
        self._optimizer = task.optimizer(self.ddp)
        self._state = method.register(self.ddp, bucket_cap_mb)

    def step(self) -> None:
        """Forward, backward, optimizer, on this rank's next batch."""
        batch = self._data[len(self.losses) % len(self._data)]
        if self.method.fills_buckets:
            self._forward_backward(batch)
        else:
            with self.ddp.no_sync():
                self._forward_backward(batch)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def _forward_backward(self, batch: Batch) -> None:
        loss: Tensor = self.ddp(*batch)
        with record_function("backward"):
            loss.backward()  # type: ignore[no-untyped-call]
        self.losses.append(loss.item())

    def bucket_bytes(self) -> list[int]:
        """Sizes of DDP's gradient buckets, as the reducer itself reports them."""
        facts = self.ddp._get_ddp_logging_data()  # type: ignore[no-untyped-call]
        sizes = str(facts.get("rebuilt_bucket_sizes") or facts["bucket_sizes"])
        return [int(size) for size in sizes.split(",")]

    def reduce_alone(self, buckets: list[Tensor]) -> None:
        """A step's communication with no computation beside it."""
        for work in [self.method.start(self._state, bucket) for bucket in buckets]:
            work.wait()

    def close(self) -> None:
        """Ends the hook's communicator, where it has one."""
        if self._state is not None:
            self._state.close()
