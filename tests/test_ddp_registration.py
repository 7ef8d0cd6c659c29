"""Registering the hook: what it refuses and why, and that a state is bound to its process and its model.

Numbers in the names count the faults that dpcomm promises to answer; those that are missing have a test elsewhere.
"""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist
from faulty import Caught, catch, check
from ranks import Pool
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel as DDP
from training import SMALL_BUCKETS_MB, Net, Recorder, backward, check_gradients, seeded

import dpcomm

Pools = Callable[[int], Pool]


def refuse_models(rank: int, nranks: int) -> dict[str, Caught]:
    hooked, mixed, python = DDP(Net()), DDP(Net()), DDP(Net())
    dpcomm.register_ddp_hook(hooked, timeout_s=10.0)
    mixed.mixed_precision = cast(Any, object())  # as DDP(mixed_precision=...), which needs a GPU
    python._use_python_reducer = True
    named = type("FullyShardedDataParallel", (nn.Module,), {})()
    models = {
        "module": Net(),
        "number": 3,
        "fsdp": named,
        "compiled": torch.compile(DDP(Net())),
        "hooked": hooked,
        "mixed precision": mixed,
        "python reducer": python,
    }
    caught = {name: catch(dpcomm.register_ddp_hook, model) for name, model in models.items()}
    backward(hooked, 0, rank)  # the one it has still serves
    dpcomm.verify([p.grad for p in hooked.parameters()])
    stock = DDP(Net())
    stock.register_comm_hook(None, default_hooks.allreduce_hook)
    return {**caught, "stock hook": catch(dpcomm.register_ddp_hook, stock)}


def test_62_models_that_cannot_take_the_hook(pool: Pools) -> None:
    for caught in pool(2).run(refuse_models):
        check(caught["module"], "ArgumentError", "expected a DistributedDataParallel model, got Net", "Wrap it in DDP")
        check(caught["number"], "ArgumentError", "expected a DistributedDataParallel model, got int")
        check(caught["fsdp"], "ArgumentError", "FullyShardedDataParallel shards gradients")
        check(caught["compiled"], "ArgumentError", "before torch.compile(ddp)")
        check(caught["hooked"], "ArgumentError", "has a communication hook already (allreduce_hook)", "Wrap it anew")
        check(caught["stock hook"], "ArgumentError", "has a communication hook already (allreduce_hook)")
        check(caught["mixed precision"], "ArgumentError", "native mixed precision", "torch.autocast")
        check(caught["python reducer"], "UnsupportedError", "optimize_ddp='python_reducer' bypasses bucket hooks")


def refuse_group(rank: int, nranks: int) -> Caught:
    groups = [dist.new_group([r]) for r in range(nranks)]
    ddp = DDP(Net())
    caught = catch(dpcomm.register_ddp_hook, ddp, process_group=groups[rank])
    same = dist.new_group([0, 1])
    dpcomm.register_ddp_hook(ddp, process_group=same, timeout_s=10.0)
    backward(ddp, 0, rank)
    return caught


def test_63_another_groups_ranks(pool: Pools) -> None:
    for rank, caught in enumerate(pool(2).run(refuse_group)):
        check(caught, "ArgumentError", f"ddp uses ranks [0, 1], communicator [{rank}]", "Leave process_group out")


def test_64_the_python_reducers_tuples() -> None:
    caught = catch(dpcomm.allreduce_hook, None, (torch.ones(2), torch.ones(2)))
    check(caught, "UnsupportedError", "optimize_ddp='python_reducer' bypasses bucket hooks")


def join_uneven(rank: int, nranks: int) -> tuple[Caught, str]:
    ddp = DDP(Net(), bucket_cap_mb=SMALL_BUCKETS_MB)
    state = dpcomm.register_ddp_hook(ddp, codec="none", timeout_s=10.0)

    def uneven() -> None:
        with Join([ddp], divide_by_initial_world_size=False):
            backward(ddp, 0, rank)

    return catch(uneven), type(state.last_error).__name__


def test_65_join_that_divides_by_the_ranks_that_are_left(pool: Pools) -> None:
    for caught, kind in pool(2).run(join_uneven):
        assert "[dpcomm:UNSUPPORTED] Join with divide_by_initial_world_size=False" in caught.text
        assert kind == "UnsupportedError"


def join_even(rank: int, nranks: int) -> None:
    """Rank 1 has two batches more; the others' missing gradients count as zeros, and the hook is called all along."""
    ddp = DDP(Net(), bucket_cap_mb=SMALL_BUCKETS_MB)
    dpcomm.register_ddp_hook(ddp, codec="fp16", timeout_s=10.0)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    with Join([ddp]):
        for step in range(2 + 2 * rank):
            optimizer.zero_grad()
            ddp(seeded(step, rank, 8, 32)).backward()
            optimizer.step()
    dpcomm.verify(ddp)


def test_join_with_uneven_inputs_keeps_replicas_equal(pool: Pools) -> None:
    pool(2).run(join_even)


# --- the state -------------------------------------------------------------------------------------------------------


def copy_states(rank: int, nranks: int) -> list[str]:
    ddp = DDP(Net())
    state = dpcomm.register_ddp_hook(ddp, codec="none", timeout_s=7.5)
    said = []
    duplicates: list[Callable[[Any], Any]] = [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))]
    for duplicate in duplicates:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            made = duplicate(state)
        said += [str(w.message) for w in caught]
        assert made.comm is None
        assert (made._codec, made._keywords) == ("none", {"timeout_s": 7.5})
        check(catch(made.stats), "ArgumentError", "registered again")
        made.close()
        again = DDP(Net())
        again.register_comm_hook(made, dpcomm.allreduce_hook)
        assert "[dpcomm:ARGUMENT] " in catch(backward, again, 0, rank).text
        assert isinstance(made.last_error, dpcomm.ArgumentError)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        duplicate_model = copy.deepcopy(ddp)
    of_copy = dpcomm.register_ddp_hook(duplicate_model, timeout_s=10.0)  # as the warning says
    for model in (ddp, duplicate_model):
        backward(model, 0, rank)
        dpcomm.verify([p.grad for p in model.parameters()])
    assert state.stats()["calls"] == of_copy.stats()["calls"] == 1
    return said


def test_61_copies_of_a_state_hold_its_configuration_only(pool: Pools) -> None:
    for said in pool(2).run(copy_states):
        assert len(said) == 2
        assert all("the hook must be registered again" in text for text in said)


def register_by_hand(rank: int, nranks: int) -> None:
    """As PyTorch's documentation registers hooks, and with a state of the default group."""
    ddp = DDP(Net(), bucket_cap_mb=SMALL_BUCKETS_MB)
    state = dpcomm.HookState(timeout_s=10.0)
    recorder = Recorder(ddp, state)
    ddp.register_comm_hook(state, dpcomm.allreduce_hook)
    for step in range(3):
        ddp.zero_grad()
        backward(ddp, step, rank)
        check_gradients(ddp, recorder, [step], range(nranks), "fp16")
    assert state.stats()["calls"] > 3
    state.close()
    state.close()
    assert "[dpcomm:ARGUMENT] " in catch(backward, ddp, 3, rank).text


def test_hook_and_state_register_as_any_hook(pool: Pools) -> None:
    pool(2).run(register_by_hand)


def pass_a_wrong_state(rank: int, nranks: int) -> str:
    ddp = DDP(Net())
    ddp.register_comm_hook({"codec": "fp16"}, dpcomm.allreduce_hook)
    return catch(backward, ddp, 0, rank).text


def test_a_wrong_state_is_named_in_the_future(pool: Pools) -> None:
    for text in pool(2).run(pass_a_wrong_state):
        assert "[dpcomm:ARGUMENT] allreduce_hook: state must be a dpcomm.HookState, got dict" in text


def recover_nothing(rank: int, nranks: int) -> Caught:
    return catch(dpcomm.recover, DDP(Net()))


def test_recover_needs_a_hook(pool: Pools) -> None:
    for caught in pool(2).run(recover_nothing):
        check(caught, "ArgumentError", "no dpcomm hook", "register_ddp_hook")


def unregistered(rank: int, nranks: int) -> Any:
    """Options of a state are validated as a communicator's are: on all ranks alike."""
    return catch(dpcomm.HookState, codec="zip" if rank == 0 else "fp16", timeout_s=10.0)


def test_a_states_options_are_refused_on_all_ranks(pool: Pools) -> None:
    for caught in pool(2).run(unregistered):
        check(caught, "ArgumentError", "unknown codec 'zip'", within_s=1.0)
