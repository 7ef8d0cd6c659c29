"""What `plan` is asked, and which questions make sense."""

from __future__ import annotations

import dataclasses

from dpcomm.errors import ArgumentError
from dpcomm.plan.counts import ELEM_BYTES

DTYPES = tuple(ELEM_BYTES)
CODECS = ("fp16", "bf16")
DEVICES = ("cpu", "cuda")
MOST_RANKS = 1024  # that are predicted


@dataclasses.dataclass(frozen=True)
class Question:
    """What is planned. Speeds in bytes per second.

    Args:
        hosts: how many.
        ranks_per_host: how many on each.
        elems: of the tensor, or of all gradients.
        dtype: "float32", "float16" or "bfloat16".
        codec: "fp16" or "bf16": what is compared with none.
        device: "cpu" or "cuda".
        link: what a GPU can send to others of its host, each way. None on CPU.
        network: what a host can send to others, each way, all its cards together. None for one host.
        bucket_bytes: what one call reduces at most. None: everything in one call.
        processors: of a host, for all its ranks. None: one for each.
    """

    hosts: int
    ranks_per_host: int
    elems: int
    dtype: str = "float32"
    codec: str = "fp16"
    device: str = "cpu"
    link: float | None = None
    network: float | None = None
    bucket_bytes: int | None = None
    processors: float | None = None

    @property
    def nranks(self) -> int:
        return self.hosts * self.ranks_per_host

    @property
    def calls(self) -> list[tuple[int, int]]:
        """How many calls of how many elements."""
        size = ELEM_BYTES[self.dtype]
        each = self.elems if self.bucket_bytes is None else max(1, self.bucket_bytes // size)
        whole, rest = divmod(self.elems, each)
        return [(count, elems) for count, elems in ((whole, each), (1, rest)) if count and elems]


def check(q: Question) -> None:
    """Refuses what cannot be predicted.

    Raises:
        ArgumentError: With what is wrong and what to say instead.
    """
    if q.hosts < 1 or q.ranks_per_host < 1 or q.nranks < 2:
        raise ArgumentError(f"{q.hosts} hosts with {q.ranks_per_host} ranks: an all-reduce needs two ranks.")
    if q.nranks > MOST_RANKS:
        raise ArgumentError(f"{q.nranks} ranks: predictions end at {MOST_RANKS}.")
    if q.elems < 1 or (q.bucket_bytes is not None and q.bucket_bytes < 1024):
        raise ArgumentError("nothing to reduce, or a bucket below 1 KiB. Give --params or --size, and --bucket.")
    for name, value, known in (("dtype", q.dtype, DTYPES), ("codec", q.codec, CODECS), ("device", q.device, DEVICES)):
        if value not in known:
            raise ArgumentError(f"{name} {value!r}: expected {', '.join(known)}.")
    if q.hosts > 1 and q.network is None:
        raise ArgumentError("several hosts: what can a host send to the others? Give --network, as in 100Gb/s.")
    if q.hosts == 1 and q.network is not None:
        raise ArgumentError("one host needs no --network.")
    if q.device == "cuda" and q.ranks_per_host > 1 and q.link is None:
        raise ArgumentError("several GPUs on a host: what can one send to the others? Give --link, as in 50GB/s.")
    if q.device == "cpu" and q.link is not None:
        raise ArgumentError("--link is between GPUs. Ranks on CPUs share memory, whose speed has been measured.")
    if q.device == "cuda" and q.processors is not None:
        raise ArgumentError("--processors is for --device cpu.")
