"""examples/hybrid.py as a user runs it: four processes train as one does, and a planted fault fails the run."""

import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import Pool
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel as DDP

import dpcomm

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import hybrid  # noqa: E402

Pools = Callable[[int], Pool]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_four_processes_train_as_one_does(dtype: str) -> None:
    """In float64 the losses agree to 12 digits: what float32 differs by is its rounding."""
    command = [sys.executable, str(EXAMPLES / "hybrid.py"), "--dtype", dtype]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if re.match(r" +\d", line)]
    assert len(rows) == 9
    assert float(rows[-1][1]) < 0.7 * float(rows[0][1])  # it learns
    assert "of the loss, rounding: at most " in done.stdout
    limit = {"float32": 4e-4, "float64": 1e-12}[dtype]
    assert float(done.stdout.split()[-1]) < limit
    assert all(float(row[3]) < limit for row in rows)


def keep_lists(self: dpcomm.Communicator, x: Any, *arguments: Any) -> Any:
    """An allreduce that forgets lists: the gradients of the copies."""
    return x if isinstance(x, list) else ALLREDUCE(self, x, *arguments)


def keep_gradient(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
    return grad, None


ALLREDUCE = dpcomm.Communicator.allreduce
FAULTS: dict[str, tuple[Any, str, Any]] = {
    "none": (dpcomm.Communicator, "allreduce", ALLREDUCE),
    "no-mean-of-gradients": (dpcomm.Communicator, "allreduce", keep_lists),
    "no-sum-in-backward": (hybrid.SumBackward, "backward", staticmethod(keep_gradient)),
}


def work_with(rank: int, nranks: int, fault: str) -> int:
    """The example's exit status, in processes that have a process group already."""
    with ExitStack() as stack:
        for name in ("init_process_group", "destroy_process_group"):
            stack.enter_context(mock.patch.object(dist, name))
        stack.enter_context(mock.patch.object(*FAULTS[fault]))
        return hybrid.work()


def train_with_hook(rank: int, nranks: int) -> tuple[list[float], list[float]]:
    """Losses of the example, and of the same with the DDP hook, whose buckets go on while backward makes calls."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    with dpcomm.Communicator(mesh["dp"]) as dp, dpcomm.Communicator(mesh["tp"]) as tp:
        example = hybrid.train(tp, dp)
        torch.manual_seed(0)
        model = DDP(
            nn.Sequential(*(hybrid.Block(tp) for _ in range(hybrid.LAYERS))), device_mesh=mesh["dp"], bucket_cap_mb=0.01
        )
        state = dpcomm.register_ddp_hook(model, codec="none")
        optimizer = torch.optim.SGD(model.parameters(), lr=hybrid.RATE)
        losses = []
        for step in range(hybrid.STEPS):
            x, y = (whole.chunk(2)[dp.rank] for whole in hybrid.batch_of(step))
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()  # type: ignore[no-untyped-call]
            losses.append(float(dp.allreduce(loss.detach(), "mean")))
            optimizer.step()
        assert state.stats()["calls"] > hybrid.STEPS  # several buckets a step
        state.close()
    return example, losses


def test_the_ddp_hook_trains_the_same_bits_beside_calls_in_backward(pool: Pools) -> None:
    for example, with_hook in pool(4).run(train_with_hook):
        assert with_hook == example


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_fails_the_run(pool: Pools, fault: str) -> None:
    assert pool(4).run(work_with, fault) == [int(fault != "none"), 0, 0, 0]
