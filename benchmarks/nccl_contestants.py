"""Who takes part in the benchmark beside stock NCCL: each can be verified, says what it sends, and has calls to time.

A default process group is there; tensors on the CPU go through gloo in it, whatever carries those on GPUs.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from contestants import Contestant, make
from nccl_plan import MIB, NOTHING_TO_MOVE, Contest, codings
from network_plan import sent_plainly
from torch import Tensor
from verification import (
    EXACT,
    Verdict,
    precision_of,
    precision_of_sixteen_bits,
    precision_of_tensors,
    verify,
    verify_local,
)

import dpcomm

DTYPES = {"float": torch.float32, "half": torch.float16, "bfloat16": torch.bfloat16}
HAS_SIXTEEN_BITS = "its tensors have 16 bits already"
# What torch may raise where this machine, driver or build has no symmetric memory.
NO_SYMMETRIC = (RuntimeError, AttributeError, ImportError, TypeError, ValueError)
MOST_ONE_SHOT_BYTES = 4 * MIB  # every rank reads everyone's tensor: beyond, it only loses


class Calls(NamedTuple):
    """One size of one contestant."""

    refill: Callable[[], object]  # before a turn: values that stay finite over its calls
    call: Callable[[], object]


class Entrant(Protocol):
    """A contestant. All its methods are collective."""

    name: str
    on_a_bus: bool  # ranks have links between them
    note: str

    @property
    def ranks(self) -> int: ...
    def serves(self, size_bytes: int) -> bool: ...
    def prepare(self, elems: int) -> Calls | None:
        """None where there is nothing to time."""

    def verify(self, elems: int, spoil: bool) -> Verdict: ...
    def sent(self, elems: int) -> float | None:
        """Bytes that this rank sends in a call; of virtual ranks, the busiest one. None: unknown."""


class Ranks(NamedTuple):
    """All that contestants which are not dpcomm's ask of a communicator."""

    nranks: int


@dataclasses.dataclass
class OneRank:
    """Ranks are processes; this is one of them."""

    name: str
    contestant: Contestant
    source: Tensor  # what is added, of the largest size; on the device
    memory: Tensor  # where; as long
    sending: Callable[[float], float | None]  # from the bytes of the tensor
    comm: dpcomm.Communicator | None = None
    note: str = ""
    on_a_bus: bool = True

    @property
    def ranks(self) -> int:
        return dist.get_world_size()

    def serves(self, size_bytes: int) -> bool:
        return self.contestant.most_bytes is None or size_bytes <= self.contestant.most_bytes

    def prepare(self, elems: int) -> Calls | None:
        if self.note:
            return None
        x, source = self.memory[:elems], self.source[:elems]
        return Calls(lambda: x.copy_(source), lambda: self.contestant.allreduce(x))

    def verify(self, elems: int, spoil: bool) -> Verdict:
        x = self.memory[:elems]

        def through_device(values: Tensor) -> None:
            x.copy_(values)
            self.contestant.allreduce(x)
            values.copy_(x)
            if self.contestant.mean:
                values.mul_(self.ranks)

        return verify(through_device, elems, self.contestant.precision, "value" if spoil else None)

    def sent(self, elems: int) -> float | None:
        x = self.memory[:elems]
        if self.comm is None:
            return self.sending(elems * x.element_size())
        before = self.comm.stats()["wire_bytes"]
        self.contestant.allreduce(x)
        return float(self.comm.stats()["wire_bytes"] - before)


@dataclasses.dataclass
class VirtualRanks:
    """Ranks of one process that share its device: what a rank has to do is timed, not what a link carries."""

    name: str
    comms: list[dpcomm.Communicator]
    codec: str
    algorithm: str
    source: Tensor
    memory: list[Tensor]
    note: str
    on_a_bus: bool = False

    @property
    def ranks(self) -> int:
        return len(self.comms)

    def serves(self, size_bytes: int) -> bool:
        return True

    def prepare(self, elems: int) -> Calls:
        xs, source = [x[:elems] for x in self.memory], self.source[:elems]
        return Calls(lambda: [x.copy_(source) for x in xs], lambda: self._allreduce(xs))

    def verify(self, elems: int, spoil: bool) -> Verdict:
        def through_device(values: list[Tensor]) -> None:
            xs = [x[:elems] for x in self.memory]
            for x, value in zip(xs, values, strict=True):
                x.copy_(value)
            self._allreduce(xs)
            for x, value in zip(xs, values, strict=True):
                value.copy_(x)

        precision = precision_of(self.codec, self.algorithm, self.ranks)
        precision = precision_of_tensors(precision, self.source.dtype, self.ranks)
        return verify_local(through_device, self.ranks, elems, precision, spoil)

    def sent(self, elems: int) -> float | None:
        before = [comm.stats()["wire_bytes"] for comm in self.comms]
        self._allreduce([x[:elems] for x in self.memory])
        after = [comm.stats()["wire_bytes"] for comm in self.comms]
        return float(max(late - early for early, late in zip(before, after, strict=True)))

    def _allreduce(self, xs: list[Tensor]) -> None:
        dpcomm.allreduce_local(self.comms, xs, "sum", codec=self.codec, algorithm=self.algorithm)


@dataclasses.dataclass
class Field:
    """Everyone that takes part, and why others do not."""

    entrants: list[Entrant] = dataclasses.field(default_factory=list)
    absent: dict[str, str] = dataclasses.field(default_factory=dict)
    comms: list[dpcomm.Communicator] = dataclasses.field(default_factory=list)
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)  # by engine

    def close(self) -> None:
        for comm in self.comms:
            comm.close()


def assemble(contest: Contest, arguments: argparse.Namespace, device: torch.device) -> Field:
    """Makes the contestants that were asked for. Collective."""
    dtype = DTYPES[arguments.dtype]
    elems = max(arguments.sizes) // dtype.itemsize
    source = torch.randn(elems, generator=torch.Generator().manual_seed(dist.get_rank())).to(device, dtype)
    memory = torch.empty_like(source)
    wanted = [name for name in contest.names() if not arguments.only or arguments.only in name or name == contest.stock]
    field = Field()
    _add_stock(field, contest, wanted, source, memory)
    _add_symmetric(field, wanted, source)
    for engine in contest.engines:
        names = {coding: name for name, coding in codings(engine).items() if name in wanted}
        if names:
            _add_engine(field, engine, names, source, memory, arguments.virtual_ranks)
    order = contest.names()
    field.entrants.sort(key=lambda entrant: order.index(entrant.name))
    return field


def _add_stock(field: Field, contest: Contest, wanted: list[str], source: Tensor, memory: Tensor) -> None:
    nranks = dist.get_world_size()
    exact = EXACT if source.dtype == torch.float32 else precision_of_sixteen_bits(source.dtype, nranks)
    made = {
        contest.stock: Contestant(contest.stock, "", dist.all_reduce, dist.all_reduce, exact),
        f"{contest.stock} bf16": Contestant(
            contest.stock, "bf16", _in_bfloat16, _in_bfloat16, precision_of_sixteen_bits(torch.bfloat16, nranks)
        ),
        "fp16_compress_hook": make([("fp16_compress_hook", "")], _ranks(), source)[0],
    }
    for name in (name for name in made if name in wanted):
        narrow = name != contest.stock
        if narrow and source.dtype != torch.float32:
            field.absent[name] = HAS_SIXTEEN_BITS
            continue
        field.entrants.append(OneRank(name, made[name], source, memory, _sending(0.5 if narrow else 1.0)))


def _sending(share: float) -> Callable[[float], float]:
    """What a rank sends at least, of a tensor's bytes, so many of which travel."""
    nranks = dist.get_world_size()
    return lambda size: sent_plainly(size * share, nranks)


def _ranks() -> Any:
    return Ranks(dist.get_world_size())


def _in_bfloat16(x: Tensor) -> None:
    narrow = x.to(torch.bfloat16)
    dist.all_reduce(narrow)
    x.copy_(narrow)


# --- torch's symmetric memory ----------------------------------------------------------------------------------------


def _add_symmetric(field: Field, wanted: list[str], source: Tensor) -> None:
    for variant in ("one_shot", "two_shot", "multimem"):
        if f"symm_mem {variant}" not in wanted:
            continue
        entrant, reason = None, "symmetric memory is for GPUs"
        if source.is_cuda:
            try:
                entrant, reason = _symmetric(variant, source), ""
            except NO_SYMMETRIC as error:
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            everyone = _on_all_ranks(entrant is not None)
            reason = reason or ("" if everyone else "another rank cannot")
        if entrant is not None and not reason:
            field.entrants.append(entrant)
        else:
            field.absent[f"symm_mem {variant}"] = reason


def _on_all_ranks(yes: bool) -> bool:
    count = torch.tensor([int(yes)])
    dist.all_reduce(count, dist.ReduceOp.MIN)
    return bool(count)


def _symmetric(variant: str, source: Tensor) -> OneRank:
    """Tries its first call; torch has these functions under names of its own making, without a promise."""
    import torch.distributed._symmetric_memory as symm_mem

    assert dist.group.WORLD is not None
    group = dist.group.WORLD.group_name
    memory = symm_mem.empty(len(source), dtype=source.dtype, device=source.device)
    symm_mem.rendezvous(memory, group)
    operations: Any = torch.ops.symm_mem

    def allreduce(x: Tensor) -> None:
        if variant == "one_shot":  # the only one whose result is elsewhere
            x.copy_(operations.one_shot_all_reduce(x, "sum", group))
        elif variant == "two_shot":
            operations.two_shot_all_reduce_(x, "sum", group)
        else:
            operations.multimem_all_reduce_(x, "sum", group)

    memory.zero_()
    allreduce(memory[: 4096 // source.element_size()])
    torch.cuda.synchronize()
    nranks = dist.get_world_size()
    sending: dict[str, Callable[[float], float | None]] = {
        "one_shot": lambda size: size * (nranks - 1),  # that others read from here
        "two_shot": _sending(1.0),
        "multimem": lambda size: None,  # the switch adds up and multiplies
    }
    precision = EXACT if source.dtype == torch.float32 else precision_of_sixteen_bits(source.dtype, nranks)
    most = MOST_ONE_SHOT_BYTES if variant == "one_shot" else None
    contestant = Contestant("symm_mem", variant, allreduce, allreduce, precision, most_bytes=most)
    return OneRank(f"symm_mem {variant}", contestant, source, memory, sending[variant])


# --- dpcomm ----------------------------------------------------------------------------------------------------------


def _add_engine(
    field: Field, engine: str, names: dict[tuple[str, str], str], source: Tensor, memory: Tensor, virtual: int
) -> None:
    """All codings of one engine. Its construction fails on all ranks or on none."""
    alone, within_a_host = dist.get_world_size() == 1, engine in ("p2p", "shm")
    device = source.device if source.is_cuda else torch.device("cpu")
    try:
        if alone and within_a_host:
            comms = dpcomm.init_local([device] * virtual, engine=engine)
        else:
            comms = [dpcomm.Communicator(dist.group.WORLD, device=device, engine="auto" if alone else engine)]
    except dpcomm.Error as error:
        field.absent |= dict.fromkeys(names.values(), str(error))
        return
    field.comms += comms
    field.facts[engine] = comms[0].describe()
    lanes = [torch.empty_like(source) for _ in comms] if alone and within_a_host else []
    for (codec, algorithm), name in names.items():
        if lanes:
            note = f"{virtual} virtual ranks on one device"
            field.entrants.append(VirtualRanks(name, comms, codec, algorithm, source, lanes, note))
            continue
        made = make([("dpcomm", f"{codec}/{algorithm}")], comms[0], source)[0]
        precision = precision_of_tensors(made.precision, source.dtype, dist.get_world_size())
        made = made._replace(precision=precision, most_bytes=None)
        note = NOTHING_TO_MOVE if alone else ""
        field.entrants.append(OneRank(name, made, source, memory, lambda size: None, comms[0], note))
