"""The DDP hook on CUDA: two processes on one GPU, gradients equal to the reference, to the bit."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import array, digest
from gpu.support import DEVICE, on_gpu, torch_works
from ranks import Pool
from ranks import fresh as fresh_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from training import SMALL_BUCKETS_MB, Gradients, Net, Recorder, alone, backward, expected, parameters, sgd

import dpcomm

pytestmark = [*on_gpu, pytest.mark.timeout(120)]

Pools = Callable[[int], Pool]
TURNS_S = 60.0
DEADLINE_S = 90.0
SMALL: dict[str, Any] = {"bucket_cap_mb": SMALL_BUCKETS_MB}


class GpuNet(Net):
    """The net of the tests on CPU, on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.to(DEVICE)

    def inputs(self, step: int, rank: int) -> tuple[torch.Tensor, ...]:
        return tuple(x.to(DEVICE) for x in super().inputs(step, rank))


def hooked(codec: str, **options: Any) -> tuple[DDP, Recorder]:
    ddp = DDP(GpuNet(), **options)
    return ddp, Recorder(ddp, dpcomm.register_ddp_hook(ddp, codec=codec, timeout_s=TURNS_S))


def on_cpu(gradients: Gradients) -> Gradients:
    return {name: None if grad is None else grad.cpu() for name, grad in gradients.items()}


def wrong_gradients(ddp: DDP, recorder: Recorder, step: int, nranks: int, codec: str) -> list[str]:
    """Names of the parameters whose gradients differ from the mean of what each rank computes alone."""
    ranks = [on_cpu(alone(ddp.module, [step], rank)) for rank in range(nranks)]
    means = expected(ranks, recorder.buckets, codec)
    recorder.clear()
    assert set(means) == {name for name, _ in ddp.module.named_parameters()}
    return [name for name, p in ddp.module.named_parameters() if bits_on_cpu(p) != means[name].tobytes()]


def bits_on_cpu(parameter: nn.Parameter) -> bytes:
    assert parameter.grad is not None
    return array(parameter.grad.cpu()).tobytes()


def train(rank: int, nranks: int, codec: str, options: dict[str, Any], steps: int) -> tuple[list[str], str, float]:
    ddp, recorder = hooked(codec, **options)
    optimizer, wrong = sgd(ddp), []
    for step in range(steps):
        optimizer.zero_grad()
        backward(ddp, step, rank)
        wrong += wrong_gradients(ddp, recorder, step, nranks, codec)
        optimizer.step()
    assert recorder.state.last_error is None
    calls = recorder.state.stats()["calls"]
    recorder.state.close()
    return wrong, digest([p.cpu() for p in parameters(ddp)]), calls


@pytest.mark.parametrize("codec", ["none", "fp16"])
@pytest.mark.parametrize(
    "options",
    [{}, SMALL, {**SMALL, "gradient_as_bucket_view": True, "static_graph": True}],
    ids=["one", "small", "view"],
)
def test_each_step_has_the_references_gradients(pool: Pools, options: dict[str, Any], codec: str) -> None:
    results = pool(2).run(train, codec, options, 20, deadline_s=DEADLINE_S)
    assert [wrong for wrong, _, _ in results] == [[], []]
    assert results[0][1] == results[1][1], "replicas differ after 20 steps"
    assert min(calls for _, _, calls in results) >= 20


def train_beside_stock(rank: int, nranks: int, spoil: bool) -> tuple[str, str]:
    hashes = []
    for hook in (False, True):
        ddp = hooked("none", **SMALL)[0] if hook else DDP(GpuNet(), **SMALL)
        optimizer = sgd(ddp)
        for step in range(5):
            optimizer.zero_grad()
            backward(ddp, step, rank + (2 if spoil and hook else 0))
            optimizer.step()
        hashes.append(digest([p.cpu() for p in parameters(ddp)]))
    return hashes[0], hashes[1]


@pytest.mark.parametrize("spoil", [False, True], ids=["same-inputs", "control"])
def test_codec_none_has_the_bits_of_stock_ddp_between_two_ranks(pool: Pools, spoil: bool) -> None:
    """Stock DDP halves first and adds then: the same number, for halving is exact and one addition rounds once."""
    results = pool(2).run(train_beside_stock, spoil, deadline_s=DEADLINE_S)
    assert results[0] == results[1]
    for stock, ours in results:
        assert (ours == stock) is not spoil


def lose_a_peer(rank: int, nranks: int) -> tuple[str, str, str, float, str]:
    """Rank 1 is killed between two steps; where and how rank 0 finds out."""
    ddp, recorder = hooked("fp16", **SMALL)
    optimizer, began, place, text = sgd(ddp), time.monotonic(), "", "no error"
    try:
        for step in range(10_000):
            if rank == 1 and step == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            if step == 5:
                began = time.monotonic()
            place = "forward"
            loss = ddp(*ddp.module.inputs(step, rank))
            place = "backward"
            loss.backward()
            place = "step"
            optimizer.step()
            optimizer.zero_grad()
            torch.cuda.synchronize()
            if time.monotonic() - began > 40:
                break
    except RuntimeError as error:
        text = str(error)
    return place, text, type(recorder.state.last_error).__name__, time.monotonic() - began, torch_works()


def test_a_killed_peer_surfaces_in_the_next_steps(record_property: Callable[[str, object], None]) -> None:
    survivor, victim = fresh_ranks(2, lose_a_peer, deadline_s=DEADLINE_S)
    assert victim.signal == signal.SIGKILL
    assert survivor.error is None, survivor.error.trace
    place, text, last_error, seconds, context = survivor.value
    record_property("survivor", f"{place}: {text}")
    record_property("survivor_context", context or "lives")
    assert place in ("forward", "backward"), text
    assert "[dpcomm:" in text, text
    assert "PEER_LOST" in text, text
    assert last_error in ("PeerLostError", "AbortedError")
    assert seconds < 15
