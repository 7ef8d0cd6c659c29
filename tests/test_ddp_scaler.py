"""The DDP hook under GradScaler: what overflows on one rank is skipped on all, and the scale stays the same on all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import digest
from ranks import Pool
from torch import nn
from training import hooked, parameters, seeded, sgd

Pools = Callable[[int], Pool]


class Half(nn.Module):
    """Its loss is Inf or NaN for inputs that are."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(300, 3)

    def forward(self, x: torch.Tensor) -> Any:
        return self.layer(x).square().mean()


def train_scaled(rank: int, nranks: int, codec: str, value: float) -> list[tuple[float, str]]:
    """Step 1 overflows on rank 1 only. The scale and a hash of the weights, after each step."""
    ddp, _ = hooked(Half(), codec)
    scaler, optimizer, after = torch.amp.GradScaler("cpu", init_scale=1024.0), sgd(ddp), []
    for step in range(3):
        optimizer.zero_grad()
        x = seeded(step, rank, 4, 300)
        if step == 1 and rank == 1:
            x[2, 7] = value
        scaler.scale(ddp(x)).backward()
        scaler.step(optimizer)
        scaler.update()
        after.append((scaler.get_scale(), digest(parameters(ddp))))
    return after


@pytest.mark.parametrize("value", [float("inf"), float("nan")], ids=["inf", "nan"])
@pytest.mark.parametrize("codec", ["none", "fp16"])
def test_grad_scaler_skips_on_all_ranks_what_overflows_on_one(pool: Pools, codec: str, value: float) -> None:
    first, second = pool(2).run(train_scaled, codec, value)
    assert first == second
    (scale, before), (halved, skipped), (kept, later) = first
    assert (scale, halved, kept) == (1024.0, 512.0, 512.0)
    assert before == skipped
    assert later != skipped
