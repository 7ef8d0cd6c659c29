"""Communicators on GPUs are asked for, built jointly, and hooked into DDP. Without a GPU: those of `fake_cuda`.

Numbers in the names count the faults that dpcomm promises to answer; those that are missing have a test elsewhere.
"""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import types
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.distributed as dist
from fake_cuda import STREAM, CupyArray, Gpu, fake_gpu, tensor, unavailable
from faulty import Caught, catch, check, check_all
from ranks import Pool
from stores import Spy, build
from torch.nn.parallel import DistributedDataParallel as DDP
from training import Net

import dpcomm
from dpcomm import _native, ddp_cuda, ddp_model, default, environment, options, records, rendezvous
from dpcomm.__main__ import main
from dpcomm.bootstrap import locate

__all__ = ["fake_gpu"]  # the fixture `gpu`
Pools = Callable[[int], Pool]


def hash_store() -> Any:
    return dist.HashStore()  # type: ignore[attr-defined]


def on(*devices: Any, **options: Any) -> list[dict[str, Any]]:
    return [{"device": device, **options} for device in devices]


# --- what may be asked for -------------------------------------------------------------------------------------------

NO_GPU = "CUDA not available: the driver is asleep"
ASKED: dict[str, tuple[dict[str, Any], str, str]] = {
    "shm-on-gpu": (
        {"engine": "shm", "device": 0},
        "ArgumentError",
        "engine='shm' moves data between CPUs, but device=0",
    ),
    "p2p-on-cpu": ({"engine": "p2p", "device": "cpu"}, "ArgumentError", "between GPUs, but device='cpu'"),
    "negative": ({"device": -1}, "ArgumentError", "device=-1: expected the ordinal of a GPU"),
    "bool": ({"device": True}, "ArgumentError", "device=True is not a device"),
    "nonsense": ({"device": "gpu7"}, "ArgumentError", "device='gpu7' is not a device"),
    "meta": ({"device": "meta"}, "UnsupportedError", "dpcomm serves memory of CPUs and CUDA devices"),
    "ctas-on-cpu": ({"max_ctas": 4}, "ArgumentError", "max_ctas=4: a communicator on CPU has no CTAs"),
    "ctas-0": ({"max_ctas": 0, "device": 0}, "ArgumentError", "max_ctas=0: expected None or a whole number"),
    "ctas-float": ({"max_ctas": 4.0, "device": 0}, "ArgumentError", "max_ctas=4.0: expected None or a whole number"),
    "ctas-bool": ({"max_ctas": True, "device": 0}, "ArgumentError", "max_ctas=True: expected None"),
    "nccl-on-cpu": ({"engine": "nccl", "device": "cpu"}, "ArgumentError", "between GPUs, but device='cpu'"),
}


@pytest.mark.parametrize("fault", ASKED)
def test_what_cannot_be_asked_for(gpu: Gpu, fault: str) -> None:
    asked, name, text = ASKED[fault]
    check(catch(dpcomm.Communicator, rank=0, nranks=1, **asked), name, text)
    devices = [asked.get("device", "cpu")] * 2
    check(catch(dpcomm.init_local, devices, **{k: v for k, v in asked.items() if k != "device"}), name, text)
    assert gpu.log == []


@pytest.mark.parametrize("asked", [{"engine": "p2p"}, {"device": "cuda:1"}, {"device": 0}, {"engine": "nccl"}], ids=str)
def test_40_no_gpu_is_told_to_all_ranks(monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any]) -> None:
    monkeypatch.setattr(_native, "cuda_reason", lambda: NO_GPU.partition(": ")[2])
    check_all(build([hash_store()] * 3, [{}, asked, {}]), "ArgumentError", "rank 1", NO_GPU, within_s=1.0)
    check(catch(dpcomm.Communicator, rank=0, nranks=1, **asked), "ArgumentError", NO_GPU)


@pytest.mark.parametrize(
    ("asked", "ordinal"),
    [
        ({"device": torch.device("cuda", 1)}, 1),
        ({"device": "cuda:1"}, 1),
        ({"device": 1}, 1),
        ({"device": "cuda"}, 0),
        ({"engine": "p2p"}, 0),
        ({"device": 1, "engine": "p2p"}, 1),
    ],
    ids=str,
)
def test_a_gpu_is_named_in_many_ways(gpu: Gpu, asked: dict[str, Any], ordinal: int) -> None:
    with dpcomm.Communicator(rank=0, nranks=1, **asked) as comm:
        assert comm.device == torch.device("cuda", ordinal)


def test_plain_cuda_is_torchs_current_device(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert dpcomm.Communicator(rank=0, nranks=1, device="cuda").device.index == 1


@pytest.mark.parametrize("value", ["", "Auto", "host", "pinned "])
def test_68_the_arena_variable_is_strict(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("DPCOMM_P2P_ARENA", value)
    caught = catch(dpcomm.Communicator, rank=0, nranks=1)
    check(caught, "ArgumentError", f"DPCOMM_P2P_ARENA={value!r}: expected one of auto, device, pinned")


def test_the_arena_variable_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment.read().p2p_arena == "auto"
    monkeypatch.setenv("DPCOMM_P2P_ARENA", "pinned")
    assert environment.read().p2p_arena == "pinned"
    assert "DPCOMM_P2P_ARENA" in environment.KNOWN


def test_info_names_gpus(gpu: Gpu, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    facts = dpcomm.info()
    assert facts["engines"]["p2p"] == {"usable": True, "reason": "CUDA tensors of up to 64 ranks of one host"}
    assert facts["devices"][0]["name"] == "Fake"
    monkeypatch.setattr("sys.argv", ["dpcomm", "info"])
    main()
    assert "cuda:0  Fake, sm 9.0" in capsys.readouterr().out
    monkeypatch.setattr(_native, "cuda_reason", lambda: "none here")
    facts = dpcomm.info()
    assert facts["devices"] == []
    assert facts["engines"]["p2p"] == {"usable": False, "reason": "CUDA not available: none here"}


# --- built jointly ---------------------------------------------------------------------------------------------------


def test_ranks_agree_on_the_fewest_ctas(gpu: Gpu) -> None:
    gpu.channels = {0: 300, 1: 7}
    comms = build([hash_store()] * 3, on(0, 0, 1, max_ctas=32))
    assert sorted(gpu.named("channels")) == [("channels", 0, 2, 32, False)] * 2 + [("channels", 1, 1, 32, False)]
    assert sorted(gpu.named("allocate")) == [("allocate", r, False, int(r == 2), 32, 7) for r in range(3)]
    assert [comm.engine for comm in comms] == ["p2p"] * 3
    facts = comms[2].describe()
    assert (facts["device"], facts["arena"]) == (1, "device")
    assert facts["why"] == "all ranks share one host and their data is on CUDA devices"


@pytest.mark.parametrize(
    ("odd", "text"),
    [
        ({"device": None}, "device: rank 0 has 'cuda', rank 1 has 'cpu'"),
        ({"device": 1, "max_ctas": 4}, "max_ctas: rank 0 has 0, rank 1 has 4"),
        ({"device": 1, "engine": "p2p"}, "engine: rank 0 has 'auto', rank 1 has 'p2p'"),
    ],
)
def test_ranks_that_ask_for_different_things(gpu: Gpu, odd: dict[str, Any], text: str) -> None:
    caught = build([hash_store()] * 3, [{"device": 0}, odd, {"device": 0}])
    check_all(caught, "MismatchError", text, within_s=1.0)


def test_ranks_with_other_arenas(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    site = locate(None, 0, 2, hash_store())
    for device, differs in ((0, True), ("cpu", False)):
        hellos: list[records.Hello] = []
        for arena in ("auto", "pinned"):
            monkeypatch.setenv("DPCOMM_P2P_ARENA", arena)
            asked = options.resolve("none", "auto", "auto", 1.0, 1.0, device)
            hellos.append(rendezvous.hello_of(site, asked))
        if differs:
            caught = catch(rendezvous._compare, hellos[0], hellos[1], 1)
            check(caught, "MismatchError", "arena: rank 0 has 'auto', rank 0 has 'pinned'")
        else:
            rendezvous._compare(hellos[0], hellos[1], 1)


def test_34_more_ranks_than_the_engine_serves(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "MAX_RANKS", 2)
    check_all(build([hash_store()] * 3, on(0, 0, 0)), "UnsupportedError", "p2p engine supports at most 2", within_s=1.0)
    check(catch(dpcomm.init_local, [0] * 3), "UnsupportedError", "p2p engine supports at most 2 ranks, got 3")


def test_35_ranks_that_do_not_reach_each_other(gpu: Gpu) -> None:
    gpu.unreachable = {0}
    caught = build([hash_store()] * 2, on(0, 1, engine="p2p"))
    check_all(caught, "UnsupportedError", "engine p2p joins", "ranks [0, 1] on ", "cannot reach rank 0", within_s=1.0)


def spied(nranks: int) -> tuple[list[Any], list[str]]:
    stages: list[str] = []
    store = hash_store()

    def publish(stage: str, record: bytes) -> bytes:
        stages.append(stage)
        return record

    return [Spy(store, publish) if rank == 1 else store for rank in range(nranks)], stages


@pytest.mark.parametrize("stage", ["bind", "verify"])
def test_without_peer_access_all_ranks_take_pinned_memory(
    gpu: Gpu, caplog: pytest.LogCaptureFixture, stage: str
) -> None:
    gpu.fail[stage, 1, False] = unavailable("GPU 1 has no peer access to GPU 0 of rank 0")
    gpu.fail[stage, 0, False] = dpcomm.CommTimeoutError("rank 1 did not come")  # what follows from it is not the cause
    stores, stages = spied(3)
    with caplog.at_level(logging.WARNING, "dpcomm"):
        comms = build(stores, on(0, 1, 1))
    assert [comm.describe()["arena"] for comm in comms] == ["pinned"] * 3
    (line,) = [record.getMessage() for record in caplog.records]
    for text in (f"rank 1, stage '{stage}': GPU 1 has no peer access", "ACS/IOMMU?", "Pinned host memory", "cuda:1"):
        assert text in line
    first = ["hello", "validate", "allocate", "probe", "bind", "verify"]
    again = ["allocate-pinned", "probe-pinned", "bind-pinned", "verify-pinned"]
    assert stages == first[: first.index(stage) + 1] + again
    assert len(gpu.named("close")) == (1 if stage == "verify" else 0), "what one rank had built of the first round"


def test_the_first_round_is_gone_before_the_second_allocates(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: set[int] = set()
    most: list[int] = []
    make = _native.P2pBuilder

    class Counted:
        def __init__(self, rank: int, *args: Any) -> None:
            self.made, self.rank = make(rank, *args), rank
            if rank == 1:
                alive.add(id(self))
                most.append(len(alive))

        def __getattr__(self, name: str) -> Any:
            return getattr(self.made, name)

        def __del__(self) -> None:
            alive.discard(id(self))

    monkeypatch.setattr(_native, "P2pBuilder", Counted)
    gpu.fail["bind", 1, False] = unavailable("no")
    gc.disable()
    try:
        build([hash_store()] * 2, on(0, 1))
    finally:
        gc.enable()
    assert most == [1, 1]


@pytest.mark.parametrize("again", [False, True], ids=["device", "auto, twice"])
def test_peer_access_that_was_asked_for_is_an_error(gpu: Gpu, monkeypatch: pytest.MonkeyPatch, again: bool) -> None:
    gpu.fail["bind", 1, False] = unavailable("no access")
    gpu.fail["bind", 1, True] = unavailable("none either")
    if not again:
        monkeypatch.setenv("DPCOMM_P2P_ARENA", "device")
    for caught in build([hash_store()] * 3, on(0, 1, 1)):
        assert isinstance(caught, Caught)
        assert caught.failure.name == "P2PUnavailableError"
        text = "rank 1, stage 'bind-pinned': none either" if again else "rank 1, stage 'bind': no access"
        assert text in caught.text
    assert any(entry[2] for entry in gpu.named("bind")) is again


def test_who_gives_up_in_the_second_round_is_not_waited_for(gpu: Gpu) -> None:
    gpu.fail["bind", 1, False] = unavailable("no")
    gpu.fail["allocate", 1, True] = KeyboardInterrupt()
    caught = build([hash_store()] * 3, on(0, 1, 1))
    assert caught[1].failure.name == "KeyboardInterrupt"
    text = "rank 1, stage 'allocate-pinned': KeyboardInterrupt"
    check_all([caught[0], caught[2]], "AbortedError", text, within_s=1.0)


def test_pinned_memory_on_request(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPCOMM_P2P_ARENA", "pinned")
    stores, stages = spied(2)
    comms = build(stores, on(0, 1))
    assert [comm.describe()["arena"] for comm in comms] == ["pinned"] * 2
    assert stages[-1] == "verify"
    assert [entry[2] for entry in gpu.named("bind")] == [True] * 2


def test_other_errors_do_not_begin_a_second_round(gpu: Gpu) -> None:
    gpu.fail["bind", 1, False] = dpcomm.SystemResourceError("out of device memory")
    check_all(build([hash_store()] * 2, on(0, 1)), "SystemResourceError", "out of device memory", within_s=1.0)
    assert not any(entry[2] for entry in gpu.named("bind"))


# --- in one process --------------------------------------------------------------------------------------------------


def test_local_ranks_on_gpus(gpu: Gpu) -> None:
    gpu.channels = {0: 6, 1: 9}
    comms = dpcomm.init_local(["cuda:0", 0, torch.device("cuda", 1)], max_ctas=12)
    assert gpu.log == [
        ("channels", 0, 2, 12, False),
        ("channels", 1, 1, 12, False),
        ("p2p_local", [0, 0, 1], 6, False),
    ]
    assert [comm.device.index for comm in comms] == [0, 0, 1]
    assert [comm.device.index for comm in dpcomm.init_local([1])] == [1]


def test_local_ranks_are_all_on_cpu_or_all_on_gpus(gpu: Gpu) -> None:
    caught = catch(dpcomm.init_local, ["cpu", 0])
    check(caught, "ArgumentError", "devices cpu, cuda:0: ranks must be all on CPU or all on GPUs")


def test_launches_that_block_need_one_device(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    check(catch(dpcomm.init_local, [0, 1]), "ArgumentError", "CUDA_LAUNCH_BLOCKING=1 with ranks on GPUs [0, 1]")
    assert len(dpcomm.init_local([1, 1])) == 2


@pytest.mark.parametrize("arena", ["auto", "device", "pinned"])
def test_local_ranks_without_peer_access(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, arena: str
) -> None:
    monkeypatch.setenv("DPCOMM_P2P_ARENA", arena)
    gpu.fail["local", 0, False] = unavailable("GPU 0 has no peer access to GPU 1")
    if arena == "device":
        with pytest.raises(dpcomm.P2PUnavailableError, match="no peer access to GPU 1"):
            dpcomm.init_local([0, 1])
        return
    comms = dpcomm.init_local([0, 1])
    assert [comm.describe()["arena"] for comm in comms] == ["pinned"] * 2
    assert len(caplog.records) == (1 if arena == "auto" else 0)


# --- without a communicator in hand ----------------------------------------------------------------------------------


def test_allreduce_has_a_communicator_for_each_kind_of_device(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    group: Any = type("Group", (), {})()
    made: list[str] = []

    class Made:
        def __init__(self, key: Any, *, device: str) -> None:
            assert key is group
            made.append(device)

        def allreduce(self, x: Any, *_: Any, **__: Any) -> int:
            return id(self)

    monkeypatch.setattr(default, "Communicator", Made)
    x = tensor(gpu, torch.ones(2))
    of_gpu = [dpcomm.allreduce(given, group=group) for given in (x, [x], [], CupyArray(gpu, np.ones(2)))]
    of_cpu = [dpcomm.allreduce(given, group=group) for given in (torch.ones(2), [torch.ones(2)], (), "no array")]
    assert made == ["cuda:0", "cpu"]
    assert [len(set(of_gpu)), len(set(of_cpu))] == [1, 1]


# --- DDP -------------------------------------------------------------------------------------------------------------


def place_parameters(rank: int, nranks: int, places: list[str]) -> Caught | None:
    model = DDP(Net())
    named = [(f"p{i}", types.SimpleNamespace(device=torch.device(place))) for i, place in enumerate(places)]
    cast(Any, model).named_parameters = lambda: iter(named)
    try:
        assert ddp_model.check(model, lambda state: False) == torch.device(places[0])
    except dpcomm.Error:
        return catch(ddp_model.check, model, lambda state: False)
    return None


def test_parameters_lie_on_one_device(pool: Pools) -> None:
    def place(*places: str) -> Any:
        return pool(1).run(place_parameters, list(places))[0]

    assert place("cuda:1", "cuda:1") is None
    assert place("cpu") is None
    check(place("cpu", "cuda:0", "cpu"), "ArgumentError", "several devices (p0 on cpu, p1 on cuda:0)")
    check(place("cuda:0", "cuda:1"), "ArgumentError", "several devices (p0 on cuda:0, p1 on cuda:1)")
    check(place("meta"), "UnsupportedError", "p0 is on meta")


def hook_state(comm: Any, module: Any) -> dpcomm.HookState:
    state = dpcomm.HookState.__new__(dpcomm.HookState)
    state._configure("none", {}, None)
    state.comm, state._ddp = comm, lambda: module  # type: ignore[assignment]
    return state


def test_a_failure_on_the_device_surfaces_at_the_next_forward(gpu: Gpu) -> None:
    comm = dpcomm.init_local([0, 0])[0]
    module = torch.nn.Linear(2, 2)
    state = hook_state(comm, module)
    module.register_forward_pre_hook(ddp_cuda.ForwardCheck(state))
    module(torch.ones(2))
    comm._native.failure = dpcomm.PeerLostError("rank 1 is gone", rank=1)  # type: ignore[union-attr]
    check(catch(module, torch.ones(2)), "PeerLostError", "rank 1 is gone")
    assert isinstance(state.last_error, dpcomm.PeerLostError)
    for made in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        made(torch.ones(2))


@pytest.mark.parametrize("delivered", [False, True])
def test_a_failure_that_nothing_raised_is_logged_by_close(
    gpu: Gpu, caplog: pytest.LogCaptureFixture, delivered: bool
) -> None:
    comm = dpcomm.init_local([0, 0])[0]
    state = hook_state(comm, None)
    comm._native.failure = dpcomm.PeerLostError("rank 1 is gone")  # type: ignore[union-attr]
    if delivered:
        check(catch(lambda: state._check_for(None)), "PeerLostError", "gone")  # type: ignore[arg-type]
    state.close()
    state.close()
    assert [record.getMessage().count("rank 1 is gone") for record in caplog.records] == ([] if delivered else [1])


class Bucket:
    """As DDP's, which only its reducer can make."""

    def __init__(self, buffer: torch.Tensor) -> None:
        self.tensor = buffer

    def index(self) -> int:
        return 3

    def buffer(self) -> torch.Tensor:
        return self.tensor

    def parameters(self) -> list[torch.Tensor]:
        return []


def test_a_failure_known_at_the_hook_travels_in_the_future(gpu: Gpu) -> None:
    comm = dpcomm.init_local([0, 0])[0]
    state = hook_state(comm, None)
    comm._native.failure = dpcomm.PeerLostError("rank 1 is gone")  # type: ignore[union-attr]
    gpu.log.clear()
    bucket: Any = Bucket(tensor(gpu, torch.ones(4)))
    future = dpcomm.allreduce_hook(state, bucket)
    with pytest.raises(RuntimeError, match=r"\[dpcomm:PEER_LOST\] rank 1 is gone.*dpcomm.recover"):
        future.wait()
    assert isinstance(state.last_error, dpcomm.PeerLostError)
    assert [entry[0] for entry in gpu.log] == ["abort"], "the bucket was started, or the peers were not told"
    state.close()


def test_a_bucket_on_a_gpu_completes_on_the_communicators_stream(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    class Entered:
        def __init__(self, stream: Any) -> None:
            self.stream = stream

        def __enter__(self) -> None:
            gpu.log.append(("enter", self.stream.cuda_stream))

        def __exit__(self, *_: object) -> None:
            gpu.log.append(("exit",))

    class Future:
        def __init__(self, devices: list[torch.device]) -> None:
            gpu.log.append(("future", devices))

        def set_result(self, value: torch.Tensor) -> None:
            gpu.log.append(("result", value))

    monkeypatch.setattr(torch.cuda, "stream", Entered)
    monkeypatch.setattr(torch.futures, "Future", Future)
    comm = dpcomm.init_local([0, 0])[0]
    gpu.log.clear()
    buffer = tensor(gpu, torch.ones(4))
    state, bucket = hook_state(comm, None), cast(Any, Bucket(buffer))
    assert isinstance(dpcomm.allreduce_hook(state, bucket), Future)
    order = [entry[0] for entry in gpu.log]
    assert order == ["record_stream", "enqueue", "join", "future", "enter", "result", "exit"]
    (call,) = gpu.named("enqueue")
    assert call[-2:] == (3, gpu.torch_stream)
    assert gpu.named("join")[0][2] == STREAM == gpu.named("enter")[0][1]
    assert gpu.named("future") == [("future", [torch.device("cuda", 0)])]
    with torch.autograd.profiler.profile() as profile:
        assert isinstance(dpcomm.allreduce_hook(state, bucket), Future)
    assert "dpcomm::allreduce bucket 3 4 float32" in {event.name for event in profile.function_events}
    (alone,) = dpcomm.init_local([0])
    gpu.log.clear()
    ddp_cuda.start(alone, alone._request("mean", None, None), buffer, 3)
    assert [entry[0] for entry in gpu.log] == ["future", "result"]
