"""The DDP hook in processes on CPU: gradients equal to the reference, to the bit, however DDP cuts its buckets."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import digest
from heard import heard
from ranks import Pool
from torch.nn.parallel import DistributedDataParallel as DDP
from training import SMALL_BUCKETS_MB, Net, backward, check_gradients, hooked, parameters, seeded, sgd

import dpcomm

Pools = Callable[[int], Pool]
SMALL: dict[str, Any] = {"bucket_cap_mb": SMALL_BUCKETS_MB}
VARIANTS: dict[str, dict[str, Any]] = {
    "one-bucket": {},
    "small-buckets": SMALL,
    "static-graph": {**SMALL, "static_graph": True},
    "find-unused": {**SMALL, "find_unused_parameters": True},
    "bucket-view": {**SMALL, "gradient_as_bucket_view": True},
    "bucket-view-static": {**SMALL, "gradient_as_bucket_view": True, "static_graph": True},
}
variants = pytest.mark.parametrize("variant", VARIANTS)
codecs = pytest.mark.parametrize("codec", ["none", "fp16"])


def train(rank: int, nranks: int, variant: str, codec: str, steps: int) -> tuple[list[int], str]:
    """Checks each step's gradients; returns how many buckets each step had, and a hash of the end."""
    ddp, recorder = hooked(Net(), codec, **VARIANTS[variant])
    optimizer, counts = sgd(ddp), []
    for step in range(steps):
        optimizer.zero_grad()
        backward(ddp, step, rank)
        counts.append(len(recorder.buckets))
        check_gradients(ddp, recorder, [step], range(nranks), codec)
        optimizer.step()
    dpcomm.verify(ddp)
    assert recorder.state.stats()["calls"] == sum(counts)
    assert recorder.state.last_error is None
    return counts, digest(parameters(ddp))


@codecs
@variants
def test_each_step_has_the_references_gradients(pool: Pools, variant: str, codec: str) -> None:
    results = pool(2).run(train, variant, codec, 5)
    counts, _ = results[0]
    assert results[1] == results[0]
    if variant == "one-bucket":
        assert counts == [1] * 5
    else:
        assert min(counts[2:]) >= 3  # buckets were rebuilt after the first steps, or were small from the start


def flip_a_bit(rank: int, nranks: int) -> None:
    ddp, recorder = hooked(Net(), **SMALL)
    backward(ddp, 0, rank)
    last = next(reversed(list(ddp.parameters()))).grad
    assert last is not None
    last.view(torch.int32)[-1] ^= 1
    with pytest.raises(AssertionError, match=r"layers\.4\.bias differs"):
        check_gradients(ddp, recorder, [0], range(nranks))


def test_a_flipped_bit_in_a_gradient_is_noticed(pool: Pools) -> None:
    pool(2).run(flip_a_bit)


@codecs
def test_four_ranks_have_the_references_gradients(pool: Pools, codec: str) -> None:
    assert len(set(map(str, pool(4).run(train, "small-buckets", codec, 3)))) == 1


def train_beside_stock(rank: int, nranks: int) -> tuple[str, str]:
    hashes = []
    for hook in (False, True):
        ddp = hooked(Net(), **SMALL)[0] if hook else DDP(Net(), **SMALL)
        optimizer = sgd(ddp)
        for step in range(4):
            optimizer.zero_grad()
            backward(ddp, step, rank)
            optimizer.step()
        hashes.append(digest(parameters(ddp)))
    return hashes[0], hashes[1]


def test_codec_none_has_the_bits_of_stock_ddp_between_two_ranks(pool: Pools) -> None:
    """Stock DDP halves first and adds then: the same number, for halving is exact and one addition rounds once."""
    for stock, ours in pool(2).run(train_beside_stock):
        assert ours == stock


def accumulate(rank: int, nranks: int, codec: str, view: bool) -> None:
    ddp, recorder = hooked(Net(), codec, gradient_as_bucket_view=view, **SMALL)
    for steps in ([0, 1, 2], [3], [4, 5]):
        ddp.zero_grad()
        with ddp.no_sync():
            for step in steps[:-1]:
                backward(ddp, step, rank)
        assert not recorder.buckets
        backward(ddp, steps[-1], rank)
        check_gradients(ddp, recorder, steps, range(nranks), codec)


@codecs
@pytest.mark.parametrize("view", [False, True], ids=["copies", "views"])
def test_no_sync_accumulates_and_then_reduces_the_sum(pool: Pools, view: bool, codec: str) -> None:
    pool(2).run(accumulate, codec, view)


def train_two(rank: int, nranks: int) -> None:
    """Two models, each with a hook, in one backward: their buckets mix in an order that is the same on all ranks."""
    (a, of_a), (b, of_b) = hooked(Net(), "none", **SMALL), hooked(Net(), "fp16", **SMALL)
    assert of_a.state.comm is not of_b.state.comm
    for step in range(3):
        for model in (a, b):
            model.zero_grad()
        (a(*a.module.inputs(step, rank)) + b(*b.module.inputs(step + 50, rank))).backward()
        check_gradients(a, of_a, [step], range(nranks), "none")
        check_gradients(b, of_b, [step + 50], range(nranks), "fp16")


def test_two_models_have_a_hook_each(pool: Pools) -> None:
    pool(2).run(train_two)


def train_in_halves(rank: int, nranks: int, codec: str) -> str:
    halves = [[0, 2], [1, 3]]
    groups = [dist.new_group(members) for members in halves]
    mine = rank % 2
    ddp, recorder = hooked(Net(), codec, process_group=groups[mine], **SMALL)
    assert recorder.state.comm is not None
    assert (recorder.state.comm.rank, recorder.state.comm.nranks) == (rank // 2, 2)
    for step in range(3):
        ddp.zero_grad()
        backward(ddp, step, rank)
        check_gradients(ddp, recorder, [step], halves[mine], codec)
    return digest([p.grad for p in ddp.parameters() if p.grad is not None])


@codecs
def test_a_model_of_a_subgroup_is_reduced_in_it(pool: Pools, codec: str) -> None:
    a, b, c, d = pool(4).run(train_in_halves, codec)
    assert (a, b) == (c, d)
    assert a != b


# --- how -------------------------------------------------------------------------------------------------------------


class Patient(torch.autograd.Function):
    """Identity whose backward waits until a bucket has been reduced: without overlap, for ever."""

    reduced = threading.Event()
    waited: bool | None = None

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        Patient.waited = Patient.reduced.wait(10.0)
        return grad


class PatientNet(Net):
    def forward(self, x: torch.Tensor) -> Any:
        return self.layers[1:](Patient.apply(self.layers[0](x))).square().mean()  # type: ignore[no-untyped-call]


def overlap(rank: int, nranks: int) -> bool | None:
    ddp, recorder = hooked(PatientNet(), **SMALL)
    Patient.reduced.set()
    for step in range(2):  # until buckets are rebuilt
        backward(ddp, step, rank)
    recorder.clear()
    ddp.zero_grad()
    Patient.reduced.clear()
    Patient.waited = None
    inner = recorder.inner

    def start(bucket: Any) -> Any:
        future = inner(bucket)
        future.add_done_callback(lambda _: Patient.reduced.set())
        return future

    recorder.inner = start
    backward(ddp, 2, rank)
    check_gradients(ddp, recorder, [2], range(nranks))
    return Patient.waited


def test_a_bucket_is_reduced_while_backward_goes_on(pool: Pools) -> None:
    assert pool(2).run(overlap) == [True, True]


def reduce_in_place(rank: int, nranks: int) -> int:
    ddp, recorder = hooked(Net(), gradient_as_bucket_view=True, **SMALL)
    for step in range(3):
        recorder.clear()
        ddp.zero_grad()
        backward(ddp, step, rank)
        for address, future in recorder.futures:
            assert future.done()
            assert future.value().data_ptr() == address
            assert future.value().storage_offset() == 0
    return len(recorder.futures)


def test_the_futures_value_is_the_buckets_own_buffer(pool: Pools) -> None:
    assert min(pool(2).run(reduce_in_place)) >= 3


def profile(rank: int, nranks: int) -> list[list[tuple[str, float]]]:
    ddp, recorder = hooked(Net(), "fp16", **SMALL)
    for step in range(2):
        backward(ddp, step, rank)
    found = []
    for step in range(2):
        recorder.clear()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            ddp.zero_grad()
            backward(ddp, step, rank)
            check_gradients(ddp, recorder, [step], range(nranks), "fp16")
        events = [e for e in profiler.events() if e.name.startswith("dpcomm::")]
        found.append(sorted((e.name, e.time_range.elapsed_us()) for e in events))
    return found


def test_profiler_shows_a_range_for_each_bucket(pool: Pools) -> None:
    for found in pool(2).run(profile):
        for ranges in found:
            names = [name for name, _ in ranges]
            assert [name.rsplit(" ", 2)[0] for name in names] == [f"dpcomm::allreduce bucket {i}" for i in range(3)]
            assert sum(int(name.split(" ")[3]) for name in names) == 3 * (32 * 32 + 32)
            assert all(name.endswith(" float32") for name in names)
            assert all(0 < us < 1e6 for _, us in ranges), "a range that has not ended"


def log_of_codecs(rank: int, nranks: int) -> list[str]:
    with heard() as said:
        ddp, _ = hooked(Net().double(), "fp16", **SMALL)
        for step in range(3):
            ddp(seeded(step, rank, 8, 32).double()).backward()
    return [text for text in said if "travel" in text]


def test_a_dtype_that_the_codec_does_not_serve_is_logged_once(pool: Pools) -> None:
    for said in pool(2).run(log_of_codecs):
        (text,) = said
        assert "float64 buckets travel as codec 'none'" in text


def train_natively(rank: int, nranks: int, dtype: torch.dtype) -> tuple[list[float], list[str]]:
    """Gradients of one layer whose inputs are the rank's number."""
    model = torch.nn.Linear(3, 1, bias=False, dtype=dtype)
    with heard() as said:
        ddp = DDP(model)
        state = dpcomm.register_ddp_hook(ddp, codec="none", engine="gloo", algorithm="native", timeout_s=20.0)
        ddp(torch.full((1, 3), float(rank), dtype=dtype)).sum().backward()
        state.close()
    assert model.weight.grad is not None
    return model.weight.grad.flatten().tolist(), said


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gloo_adds_buckets_on_request_but_those_it_would_round(pool: Pools, dtype: torch.dtype) -> None:
    for gradient, said in pool(2).run(train_natively, dtype):
        assert gradient == [0.5] * 3
        assert any("bfloat16 buckets travel" in text for text in said) == (dtype == torch.bfloat16)
