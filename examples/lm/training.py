"""One training run: a DDP model, its gradient averaging (stock gloo or dpcomm), its clocks. Only it knows dpcomm.

What is timed, each on every rank with the slowest rank counted:
  step      forward, backward with its communication, optimizer: from one optimizer step to the next
  compute   forward and backward under no_sync(): the same arithmetic without any communication
  exposed   an ordinary forward and backward minus the compute pass just before it: what the step really pays for
            communication, DDP's copies into its buckets included
  allreduce the step's buckets reduced at once with nothing else to do, after training
"""

import dataclasses
import hashlib
import statistics
import time
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from .data import ByteWindows, batches
from .model import ModelShape, seeded_model

WARMUP_STEPS = 3  # the first steps build and rebuild DDP's buckets; they are trained but not timed
ALLREDUCE_ROUNDS = 20
FINAL_STEPS = 10  # the final loss is the mean over this many last steps


@dataclasses.dataclass(frozen=True)
class Method:
    """How gradients are averaged: hook "stock" (DDP over gloo) or "dpcomm" with a codec."""

    hook: str
    codec: str

    @property
    def name(self) -> str:
        return "stock DDP, gloo" if self.hook == "stock" else f"dpcomm {self.codec}"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all runs of one report share."""

    shape: ModelShape
    steps: int
    batch: int
    seed: int
    bucket_cap_mb: float


@dataclasses.dataclass(frozen=True)
class Result:
    """One run, over all ranks. Times are medians in milliseconds of the slowest rank."""

    name: str
    hook: str
    codec: str
    losses: list[float]
    final_loss: float
    step_ms: float
    compute_ms: float
    exposed_ms: float
    optimizer_ms: float
    allreduce_ms: float
    bucket_bytes: list[int]
    wire_bytes_per_step: float
    replicas_identical: bool
    parameters_sha256: str


class Run:
    """A model in training by one method. Its constructor, `step`, `measure_exposed` and `result` are collective."""

    def __init__(self, method: Method, settings: Settings, windows: ByteWindows) -> None:
        self.method = method
        self.losses: list[float] = []
        self.step_s: list[float] = []
        self.exposed_s: list[float] = []
        self._compute_s: list[float] = []
        self._optimizer_s: list[float] = []
        self._allreduce_s: list[float] = []
        self._batches = batches(windows, settings.batch, dist.get_rank(), dist.get_world_size(), settings.seed)
        model = seeded_model(settings.shape, settings.seed)
        self._ddp = DistributedDataParallel(model, bucket_cap_mb=settings.bucket_cap_mb)
        self._optimizer = torch.optim.AdamW(self._ddp.parameters(), lr=1e-3)
        # Typed as Any so that stock DDP can be trained where dpcomm is not built.
        self._state: Any = None
        if method.hook == "dpcomm":
            import dpcomm

            self._state = dpcomm.register_ddp_hook(self._ddp, codec=method.codec, bucket_cap_mb=settings.bucket_cap_mb)

    def step(self) -> None:
        """One optimizer step on this rank's next batch."""
        batch = next(self._batches)
        start = time.perf_counter()
        loss = self._forward_backward(batch)
        middle = time.perf_counter()
        self._update()
        end = time.perf_counter()
        self.losses.append(loss)
        if len(self.losses) > WARMUP_STEPS:
            self.step_s.append(end - start)
            self._optimizer_s.append(end - middle)

    def measure_exposed(self) -> None:
        """One optimizer step, timed against the same forward and backward without communication just before it."""
        batch = next(self._batches)
        dist.barrier()
        start = time.perf_counter()
        with self._ddp.no_sync():
            self._forward_backward(batch)
        compute_s = time.perf_counter() - start
        self._optimizer.zero_grad()  # the trial pass leaves nothing behind
        dist.barrier()
        start = time.perf_counter()
        self.losses.append(self._forward_backward(batch))
        both_s = time.perf_counter() - start
        self._update()
        compute_s, both_s = slowest_rank([compute_s, both_s])
        if len(self.losses) > WARMUP_STEPS:
            self._compute_s.append(compute_s)
            self.exposed_s.append(both_s - compute_s)

    def _forward_backward(self, batch: tuple[Tensor, Tensor]) -> float:
        loss: Tensor = self._ddp(*batch)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()

    def _update(self) -> None:
        self._optimizer.step()
        self._optimizer.zero_grad()

    def bucket_bytes(self) -> list[int]:
        """Sizes of DDP's gradient buckets, as the reducer itself reports them."""
        facts = self._ddp._get_ddp_logging_data()  # type: ignore[no-untyped-call]
        sizes = str(facts.get("rebuilt_bucket_sizes") or facts["bucket_sizes"])
        return [int(size) for size in sizes.split(",")]

    def time_allreduce(self, buckets: list[Tensor]) -> None:
        """Reduces the buckets with no computation beside it, the way the run's own communication does."""
        dist.barrier()
        start = time.perf_counter()
        if self._state is None:
            works: list[Any] = [dist.all_reduce(bucket, async_op=True) for bucket in buckets]
        else:
            works = [self._state.comm.allreduce(bucket, "mean", async_op=True) for bucket in buckets]
        for work in works:
            work.wait()
        self._allreduce_s.append(time.perf_counter() - start)

    def wire_bytes_per_step(self) -> float:
        """Bytes one rank sends in one step: dpcomm's own count; for gloo its ring's, 2 (N-1)/N a gradient byte."""
        if self._state is not None:
            return float(self._state.stats()["wire_bytes"]) / len(self.losses)
        nranks = dist.get_world_size()
        return sum(self.bucket_bytes()) * 2 * (nranks - 1) / nranks

    def result(self, wire_bytes_per_step: float) -> Result:
        """Gathers what all ranks saw."""
        losses = torch.tensor(self.losses, dtype=torch.float64)
        dist.all_reduce(losses)
        curve: list[float] = (losses / dist.get_world_size()).tolist()
        digests = gather_bytes(parameters_digest(self._ddp))
        return Result(
            name=self.method.name,
            hook=self.method.hook,
            codec=self.method.codec,
            losses=curve,
            final_loss=statistics.mean(curve[-FINAL_STEPS:]),
            step_ms=1e3 * statistics.median(slowest_rank(self.step_s)),
            compute_ms=1e3 * statistics.median(self._compute_s),
            exposed_ms=1e3 * statistics.median(self.exposed_s),
            optimizer_ms=1e3 * statistics.median(slowest_rank(self._optimizer_s)),
            allreduce_ms=1e3 * statistics.median(slowest_rank(self._allreduce_s)),
            bucket_bytes=self.bucket_bytes(),
            wire_bytes_per_step=wire_bytes_per_step,
            replicas_identical=len(set(digests)) == 1,
            parameters_sha256=digests[0].hex(),
        )

    def close(self) -> None:
        """Ends the run's communicator, where it has one."""
        if self._state is not None:
            self._state.close()


def measure_allreduce(runs: Iterable[Run]) -> None:
    """Times every run's all-reduce alone, one round each in turn, so that all meet the same state of the machine."""
    runs = list(runs)
    for _ in range(ALLREDUCE_ROUNDS):
        for run in runs:
            # New values each round: sums of sums would grow without bound.
            run.time_allreduce([torch.randn(size // 4) for size in run.bucket_bytes()])


def slowest_rank(times: list[float]) -> list[float]:
    """Element by element the maximum over all ranks. Collective."""
    slowest = torch.tensor(times, dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    maxima: list[float] = slowest.tolist()
    return maxima


def parameters_digest(model: torch.nn.Module) -> bytes:
    """SHA-256 of the bytes of all parameters in order."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().contiguous().numpy().tobytes())
    return digest.digest()


def gather_bytes(mine: bytes) -> list[bytes]:
    """Every rank's bytes, in rank order; all of one length. Collective."""
    own = torch.frombuffer(bytearray(mine), dtype=torch.uint8)
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, own)
    return [bytes(other.tolist()) for other in everyone]
