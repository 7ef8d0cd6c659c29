"""Hybrid parallelism in four processes: layers split over two ranks, copies of the model averaged over two.

                      "tp": halves of every layer
                      rank 0  <------>  rank 1        copy 0, learns from the first half of every batch
    "dp": the same      ^                 ^
    half, averaged      v                 v
                      rank 2  <------>  rank 3        copy 1, learns from the second half

Each rank has two communicators, one for its row and one for its column. Then one process trains the same model on whole
batches: its losses must be the same but for rounding, or the exit status is 1.

    python examples/hybrid.py          starts its four processes with torchrun, on this machine's CPUs
"""

import argparse
import os
import subprocess
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional

import dpcomm

COPIES, SPLIT = 2, 2  # sizes of "dp" and "tp"
WIDTH, HIDDEN, LAYERS = 32, 64, 2
BATCH, STEPS, RATE = 64, 40, 0.1


class SumForward(torch.autograd.Function):
    """Adds up what the ranks of a layer have computed; each gets the whole gradient, which all of them have."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, comm: dpcomm.Communicator) -> torch.Tensor:
        total: torch.Tensor = comm.allreduce(x.clone())  # in place, so on a copy
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


class SumBackward(torch.autograd.Function):
    """Hands every rank of a layer the same input; its gradient is the sum of what comes back from all of them."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, comm: dpcomm.Communicator) -> torch.Tensor:
        ctx.comm = comm
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.comm.allreduce(grad.clone()), None


class Block(nn.Module):
    """x + down(tanh(up(x))). A rank has some rows of `up` and the same columns of `down`, so nothing but the sum of
    all ranks' `down` has to travel: hidden values are never needed in one place."""

    def __init__(self, tp: dpcomm.Communicator | None) -> None:
        super().__init__()
        # All ranks draw the whole layer and keep their part, so the parts are those of the one-process run.
        up, down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        rank, nranks = (tp.rank, tp.nranks) if tp is not None else (0, 1)
        mine = slice(rank * HIDDEN // nranks, (rank + 1) * HIDDEN // nranks)
        self.tp = tp
        self.up_weight, self.up_bias = part(up.weight[mine]), part(up.bias[mine])
        self.down_weight, self.down_bias = part(down.weight[:, mine]), part(down.bias)  # the bias: on all ranks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        into = x if self.tp is None else SumBackward.apply(x, self.tp)  # type: ignore[no-untyped-call]
        hidden = torch.tanh(functional.linear(into, self.up_weight, self.up_bias))
        out = functional.linear(hidden, self.down_weight)
        total = out if self.tp is None else SumForward.apply(out, self.tp)  # type: ignore[no-untyped-call]
        return x + total + self.down_bias  # once, not once a rank


def part(weight: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(weight.detach().clone())


def batch_of(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The whole batch, the same on all ranks: something smooth to learn."""
    x = torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(step))
    return x, torch.sin(x.roll(1, dims=1))


def train(tp: dpcomm.Communicator | None, dp: dpcomm.Communicator | None) -> list[float]:
    """The losses of all steps, of the whole batch. Without communicators: in this process alone."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(tp) for _ in range(LAYERS)))
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    copy, copies = (dp.rank, dp.nranks) if dp is not None else (0, 1)
    losses = []
    for step in range(STEPS):
        x, y = (whole.chunk(copies)[copy] for whole in batch_of(step))
        optimizer.zero_grad()
        # Calls of "tp" are inside of forward and backward; all ranks run the same layers, so they agree on the order.
        loss = functional.mse_loss(model(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        mean = loss.detach()
        if dp is not None:
            # One list, one call. DistributedDataParallel(model, device_mesh=mesh["dp"]) with dpcomm.register_ddp_hook
            # would do the same while backward goes on.
            dp.allreduce([p.grad for p in model.parameters()], "mean")
            dp.allreduce(mean, "mean")
        optimizer.step()
        losses.append(float(mean))
    return losses


def tolerance() -> float:
    """Relative difference of losses that is rounding: the two runs make the same sums in another order.

    A sum of n terms is off by n * eps of its terms' size at most; the longest has HIDDEN, and each step builds on the
    errors of those before. A gradient that is wrong, not rounded, shows in the first digits.
    """
    return STEPS * HIDDEN * torch.finfo(torch.get_default_dtype()).eps


def compare(hybrid: list[float], alone: list[float]) -> bool:
    """Prints both curves; whether they are the same but for rounding."""
    differences = [abs(h - a) / a for h, a in zip(hybrid, alone, strict=True)]
    print(f"{'step':>4} {'4 processes':>14} {'1 process':>14} {'difference':>11}")
    for step in [*range(0, STEPS, 5), STEPS - 1]:
        print(f"{step:>4} {hybrid[step]:>14.9f} {alone[step]:>14.9f} {differences[step]:>11.1e}")
    same = max(differences) <= tolerance()
    print(f"largest difference {max(differences):.1e} of the loss, {'' if same else 'MORE than '}", end="")
    print(f"{'rounding: at most ' if same else ''}{tolerance():.1e}")
    return same


def work() -> int:
    """One rank. Returns 1 on rank 0 if the losses differ, else 0."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (COPIES, SPLIT), mesh_dim_names=("dp", "tp"))
    # On every rank in the same order: making a communicator waits for the other ranks of its group.
    with dpcomm.Communicator(mesh["dp"]) as dp, dpcomm.Communicator(mesh["tp"]) as tp:
        hybrid = train(tp, dp)
    same = compare(hybrid, train(None, None)) if dist.get_rank() == 0 else True
    dist.destroy_process_group()
    return 0 if same else 1


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32", help="(default: float32)")
    arguments = parser.parse_args(argv)
    torch.set_default_dtype(getattr(torch, arguments.dtype))
    if "RANK" in os.environ:
        return work()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(COPIES * SPLIT)]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}  # one core a rank; torchrun warns where it is not set
    return subprocess.run([*torchrun, __file__, *argv], env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
