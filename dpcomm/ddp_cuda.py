"""What the DDP hook does on a GPU: futures that complete on the device, and failures that surface between steps."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

import torch

from dpcomm import options as opt
from dpcomm.communicator import Communicator


def start(
    comm: Communicator, request: opt.Request, buffer: torch.Tensor, index: int
) -> torch.futures.Future[torch.Tensor]:
    """Starts one bucket behind torch's current stream.

    Returns:
        A future that is complete at once and lets the streams that wait for it wait for the device.
    """
    stream = comm._enqueue_bucket(buffer, request, index)
    future: torch.futures.Future[torch.Tensor] = torch.futures.Future(devices=[comm.device])
    if stream is None:  # one rank: the mean is the bucket itself
        future.set_result(buffer)
        return future
    with torch.cuda.stream(stream):  # the future notes where the current stream is
        future.set_result(buffer)
    return future


class Checked(Protocol):
    """Of a hook's state, what the forward pass asks."""

    def _check_for(self, module: torch.nn.Module) -> None: ...


class ForwardCheck:
    """A forward pre-hook that raises what has failed on the device since the last step.

    A copy of the model, or one that was pickled, has a check that does nothing: its hook must be registered again.
    """

    def __init__(self, state: Checked | None = None) -> None:
        self._state = weakref.ref(state) if state is not None else None

    def __call__(self, module: torch.nn.Module, _inputs: Any) -> None:
        """Called by the module before its forward."""
        if torch.compiler.is_compiling():  # the next bucket's hook checks as well
            return
        state = self._state() if self._state is not None else None
        if state is not None:
            state._check_for(module)

    def __reduce__(self) -> tuple[type[ForwardCheck], tuple[()]]:
        return ForwardCheck, ()
