"""Runs the passes of gpu_passes_plan.py on the current CUDA device; compares results with tests/reference.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_clock import time_on_device
from gpu_environment import l2_bytes
from gpu_passes_plan import ELEM_BYTES, HOOK_RANKS, NATIVE, Subject, counts_of, slice_bytes, subjects
from torch import Tensor

from dpcomm import _native

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
import reference

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
HOLD_US = 100.0  # more than the host needs to enqueue three operations of torch
SAMPLE_ELEMS = 64_000  # whole groups, and whole tensors of a list
# csrc/cuda/passes.h
MESSAGES = {"encode": 1, "decode": 1, "add": 2, "reduce": 3, "cast": 1, "widen": 1, "copy": 1, "memcpy": 1, "empty": 0}
READERS = {"cast": "widen", "widen": "widen"}  # of a message that a pass writes or reads; of others, decode
WRITERS = {"cast": "cast", "widen": "cast"}
CAST_RANKS = 2  # what the pass divides by


class Passes:
    """The buffers of one size. Repetitions rotate through several sets of them, so that none is found in the L2 cache.

    Args:
        size_bytes: of the tensors.
        ctas: numbers of CTAs that will be asked for.
        hot: one set only; small sizes then stay in the cache.
    """

    def __init__(self, size_bytes: int, ctas: list[int], hot: bool) -> None:
        self.size_bytes = size_bytes
        self.sets = 1 if hot else max(1, -(-2 * l2_bytes() // size_bytes))
        self.message_bytes = max(_native.pass_message_bytes(self._call(each)) for each in subjects(ctas) if each.ctas)
        generator = torch.Generator("cuda").manual_seed(1)

        def numbers(dtype: str) -> tuple[Tensor, Tensor]:
            elems = size_bytes // ELEM_BYTES[dtype]
            return spread_numbers(elems, generator).to(DTYPES[dtype]), spread_numbers(elems, generator).to(
                DTYPES[dtype]
            )

        self.sources = {dtype: numbers(dtype) for dtype in DTYPES}
        self.tensors = [torch.empty(size_bytes, dtype=torch.uint8, device="cuda") for _ in range(self.sets)]
        self.messages = [
            [torch.empty(self.message_bytes, dtype=torch.uint8, device="cuda") for _ in range(3)]
            for _ in range(self.sets)
        ]

    def time(self, subject: Subject, repeats: int) -> float:
        """Microseconds a repetition by the device's clock."""
        self.prepare(subject)
        if subject.kind == "hook":
            return self._time_hook(repeats)
        return self._run(subject, range(MESSAGES[subject.kind]), repeats)

    def correct(self, subject: Subject) -> bool:
        """Whether the pass gives the reference's bits on a sample of every set."""
        self.prepare(subject)
        reader = READERS.get(subject.kind, "decode")
        decode = Subject(reader, subject.ctas, subject.codec, subject.dtype, subject.many)
        messages = MESSAGES[subject.kind]
        if subject.kind != reader:
            self._run(subject, range(messages), 1)
        if subject.kind != "reduce":  # a message, which its last one is, is compared decoded
            for tensor in self.tensors:
                tensor.zero_()
            self._run(decode, range(messages - 1, messages), 1)
        expected = self._expected(subject)
        found = [bits(tensor.view(DTYPES[subject.dtype])[: expected.size]) for tensor in self.tensors]
        return all(np.array_equal(each, expected) for each in found)

    def prepare(self, subject: Subject) -> None:
        """Fills tensors and messages with what the subject reads: numbers that are finite, whatever ran before."""
        first, second = self.sources[subject.dtype]
        of_messages = {"decode": [first], "widen": [first], "add": [second], "reduce": [first, second]}.get(
            subject.kind, []
        )
        encode = Subject(WRITERS.get(subject.kind, "encode"), subject.ctas, subject.codec, subject.dtype, subject.many)
        for number, values in enumerate(of_messages):
            self._fill(values)
            self._run(encode, range(number, number + 1), 1)
        self._fill(first)
        torch.cuda.synchronize()

    def _fill(self, values: Tensor) -> None:
        for tensor in self.tensors:
            tensor.view(values.dtype).copy_(values)

    def _call(self, subject: Subject) -> _native.CudaPass:
        call = _native.CudaPass()
        call.kind, call.codec = _native.PASSES[subject.kind], _native.CODECS[subject.codec]
        call.dtype, call.counts = _native.DTYPES[subject.dtype], counts_of(subject, self.size_bytes)
        if subject.ctas:
            call.ctas, call.slice_bytes = subject.ctas, slice_bytes(subject, self.size_bytes)
        return call

    def _run(self, subject: Subject, messages: range, repeats: int) -> float:
        call = self._call(subject)
        offsets = np.concatenate(([0], np.cumsum(call.counts)[:-1])) * ELEM_BYTES[subject.dtype]
        if subject.kind != "empty":
            call.tensors = [[tensor.data_ptr() + int(offset) for offset in offsets] for tensor in self.tensors]
            call.messages = [[each[number].data_ptr() for number in messages] for each in self.messages]
        call.message_bytes, call.repeats = self.message_bytes, repeats
        call.stream = torch.cuda.current_stream().cuda_stream
        return _native.run_pass(call)

    def _time_hook(self, repeats: int) -> float:
        """What _compress_hook of PyTorch does on the device before and after its all-reduce."""
        buffers = [tensor.view(torch.float32) for tensor in self.tensors]

        def three(buffer: Tensor) -> None:
            buffer.copy_(buffer.to(torch.float16).div_(HOOK_RANKS))

        for buffer in buffers:
            three(buffer)
        hold_s = HOLD_US * repeats / 1e6
        return time_on_device(lambda number: three(buffers[number % len(buffers)]), repeats, hold_s).gpu_us

    def _expected(self, subject: Subject) -> Any:
        first, second = (array(source[:SAMPLE_ELEMS]) for source in self.sources[subject.dtype])
        counts = counts_of(subject, self.size_bytes)
        return expected_bits(subject, first, second, counts)


def spread_numbers(elems: int, generator: torch.Generator) -> Tensor:
    """Finite float32 of very different size: the largest of a group decides what codec fp16 keeps of the others."""
    exponents = torch.randint(-30, 31, (elems,), device=generator.device, generator=generator, dtype=torch.int32)
    return torch.randn(elems, device=generator.device, generator=generator).ldexp_(exponents)


def expected_bits(subject: Subject, first: Any, second: Any, counts: list[int]) -> Any:
    """Bits of the tensors after the pass, from the first elements of what it was given.

    Args:
        first, second: numbers that the sources begin with, float32 or bfloat16 as uint16; as long as whole groups, or
            whole tensors where there are many.
        counts: elements of each tensor.
    """
    ends = [int(end) for end in np.cumsum(counts) if end < first.size]
    pieces = [
        _expected_tensor(subject, a, b) for a, b in zip(np.split(first, ends), np.split(second, ends), strict=True)
    ]
    return as_unsigned(np.concatenate(pieces))


def _expected_tensor(subject: Subject, first: Any, second: Any) -> Any:
    def through(values: Any) -> Any:
        return reference.through_fp16(values) if subject.codec == "fp16" else values

    mine, theirs = reference.widen(first), reference.widen(second)
    if subject.kind in NATIVE:
        wire = {"fp16": np.dtype(np.float16), "bf16": reference.BFLOAT16}[subject.codec]
        result = reference.widen(reference.narrow(reference.finish(mine, "mean", CAST_RANKS), wire))
        return reference.narrow(reference.canonical(result), first.dtype)
    if subject.kind in ("encode", "decode"):
        result = through(mine)
    elif subject.kind == "add":
        result = through(through(theirs) + mine)
    else:
        result = through(reference.finish(through(mine) + through(theirs), "mean", 2))
    return reference.narrow(result, first.dtype)


def array(values: Tensor) -> Any:
    """As the reference has them: bfloat16 as bit patterns."""
    host = values.cpu()
    return host.view(torch.uint16).numpy() if host.dtype == torch.bfloat16 else host.numpy()


def as_unsigned(values: Any) -> Any:
    """The bits of an array."""
    return values.view(np.dtype(f"u{values.dtype.itemsize}"))


def bits(values: Tensor) -> Any:
    """The bits of a tensor."""
    return as_unsigned(array(values))
