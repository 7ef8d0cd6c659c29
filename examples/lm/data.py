"""Text as windows of bytes, split between ranks by DistributedSampler. It knows nothing of the model or dpcomm."""

import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

MAX_TEXT_BYTES = 4 << 20  # the default demo reads 300 steps x 4 windows x 128 bytes = 150 KiB of it


def load_text(text_file: Path | None) -> bytes:
    """The training text, cut at MAX_TEXT_BYTES.

    Args:
        text_file: a file to read; None takes the Python standard library's own sources, in order of their names.
    Raises:
        OSError: the file cannot be read, or this Python has no library sources.
    """
    if text_file is not None:
        return text_file.read_bytes()[:MAX_TEXT_BYTES]
    library = Path(sysconfig.get_path("stdlib"))
    text = bytearray()
    for source in sorted(library.glob("*.py")):
        text += source.read_bytes()
        if len(text) >= MAX_TEXT_BYTES:
            break
    if not text:
        raise FileNotFoundError(f"no *.py files in {library}; give a text with --text FILE")
    return bytes(text[:MAX_TEXT_BYTES])


class ByteWindows(Dataset[tuple[Tensor, Tensor]]):
    """Non-overlapping windows of `context` bytes, each with the same bytes shifted by one as its targets."""

    def __init__(self, text: bytes, context: int) -> None:
        """Raises ValueError where the text is shorter than one window."""
        if len(text) <= context:
            raise ValueError(f"the text has {len(text)} bytes; at least {context + 1} are needed")
        self._bytes = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self._context = context

    def __len__(self) -> int:
        return (len(self._bytes) - 1) // self._context

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        start = index * self._context
        window = self._bytes[start : start + self._context + 1].long()
        return window[:-1], window[1:]


def batches(windows: ByteWindows, batch: int, rank: int, nranks: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of this rank's share; every epoch is shuffled anew by seed and epoch.

    Raises:
        ValueError: the text has fewer windows than one batch of every rank takes.
    """
    if len(windows) < batch * nranks:
        raise ValueError(f"the text has {len(windows)} windows; one step of {nranks} ranks takes {batch * nranks}")
    sampler: DistributedSampler[tuple[Tensor, Tensor]] = DistributedSampler(
        windows, nranks, rank, shuffle=True, seed=seed, drop_last=True
    )
    loader = DataLoader(windows, batch_size=batch, sampler=sampler, drop_last=True)
    epoch = 0
    while True:
        sampler.set_epoch(epoch)
        yield from ((inputs, targets) for inputs, targets in loader)
        epoch += 1
