"""dpcomm as a communication hook of DistributedDataParallel: every bucket's mean, in place, while backward goes on.

No `from __future__ import annotations` here: DDP compares the hook's annotations as objects.
"""

import logging
import os
import warnings
import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import GradBucket  # dist.GradBucket, in a way that mypy follows
from torch.autograd.profiler import record_function
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from dpcomm import arrays, ddp_cuda, ddp_model, groups
from dpcomm import options as opt
from dpcomm.communicator import EXIT_GRACE_S, Communicator
from dpcomm.completer import Completer
from dpcomm.errors import AbortedError, ArgumentError, CommTimeoutError, Error, InternalError, UnsupportedError
from dpcomm.groups import Group

logger = logging.getLogger("dpcomm")

AGAIN = "the hook must be registered again, with dpcomm.register_ddp_hook(ddp)"
DRAIN_S = 5.0  # beyond the communicator's close, which has ended every job


class HookState:
    """What the hook of one DDP model holds: a communicator of its own and the thread that completes futures.

    Construction is collective over the group. Pickling keeps the configuration only.

    Args:
        process_group: The model's group, or one dimension of a DeviceMesh; None is the default group.
        codec: What travels; a bucket of a dtype that the codec does not serve travels as "none".
        communicator_keywords: Further arguments of `Communicator`.

    Attributes:
        comm: The communicator.
    """

    def __init__(
        self, process_group: Group | None = None, *, codec: str = "fp16", **communicator_keywords: Any
    ) -> None:
        self._configure(codec, communicator_keywords, process_group)
        self._connect()

    def _configure(self, codec: str, keywords: dict[str, Any], group: Group | None) -> None:
        self.comm: Communicator | None = None
        self._codec, self._keywords, self._group = codec, keywords, group
        self._ddp: weakref.ref[DistributedDataParallel] | None = None
        self._forward_check: RemovableHandle | None = None  # of models on a GPU
        self._completer = Completer()
        self._said: set[str] = set()
        self._complex = True  # whether the model may have complex parameters
        self._finalizer: weakref.finalize[Any, Any] | None = None

    def _connect(self) -> None:
        """Makes the communicator; collective."""
        self.comm = Communicator(self._group, codec=self._codec, **self._keywords)
        if self._finalizer is not None:
            self._finalizer.detach()
        # At exit the thread must have ended before the interpreter does: it could never take the GIL again.
        self._finalizer = weakref.finalize(self, _close_parts, self.comm, self._completer, os.getpid())

    @property
    def last_error(self) -> Error | None:
        """The first error since construction or the last `recover`, with its type; DDP passes on its text only."""
        return self._completer.last_error

    def stats(self) -> dict[str, float]:
        """The communicator's `stats`."""
        return self._live_comm().stats()

    def close(self) -> None:
        """Ends the communicator and the thread; local and idempotent. Later steps fail with ArgumentError."""
        if self._forward_check is not None:
            self._forward_check.remove()
        if self.comm is not None:
            self._warn_of_failure(self.comm)
            self.comm.close()
        self._completer.close(DRAIN_S)
        if self._finalizer is not None:
            self._finalizer.detach()

    def __getstate__(self) -> dict[str, Any]:
        local = ("rank", "nranks", "store", "device")
        return {"codec": self._codec, "keywords": {k: v for k, v in self._keywords.items() if k not in local}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._configure(state["codec"], state["keywords"], None)
        warnings.warn(f"a dpcomm.HookState was copied or unpickled: {AGAIN}", RuntimeWarning, stacklevel=2)

    def _live_comm(self) -> Communicator:
        if self.comm is None:
            raise ArgumentError(f"this HookState was copied or unpickled: {AGAIN}")
        return self.comm

    def _start(self, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        """Starts one bucket; returns the future that DDP waits on."""
        comm = self._live_comm()
        self._refuse_join()
        buffer = bucket.buffer().detach()  # with create_graph=True it requires grad
        if buffer.layout is not torch.strided:
            return self._start_sparse(comm, buffer)
        if not arrays.is_whole_storage(buffer):
            # DDP would read the result from the wrong place, silently.
            raise InternalError(f"bucket {bucket.index()} is not a whole storage. Is another hook wrapped around this?")
        request = self._request(comm, buffer.dtype, self._complex and any(p.is_complex() for p in bucket.parameters()))
        if not torch._C._autograd._profiler_enabled():
            return self._start_dense(comm, request, buffer, bucket.index())
        dtype = str(buffer.dtype).removeprefix("torch.")
        with record_function(f"dpcomm::allreduce bucket {bucket.index()} {buffer.numel()} {dtype}") as span:
            if comm.device.type == "cuda":  # the range of the launch; the profiler sees the kernel itself
                return self._start_dense(comm, request, buffer, bucket.index())
            # The range ends when the future completes, on whichever thread that is.
            future = self._start_dense(comm, request, buffer, bucket.index())
            profiled: torch.futures.Future[torch.Tensor] = span._call_end_callbacks_on_future(future)
            return profiled

    def _start_dense(
        self, comm: Communicator, request: opt.Request, buffer: torch.Tensor, index: int
    ) -> torch.futures.Future[torch.Tensor]:
        if comm.device.type == "cuda":
            comm.check()  # what failed on the device since the last bucket; later buckets would only hide it
            return ddp_cuda.start(comm, request, buffer, index)
        job = comm._submit_bucket(buffer, request, index)
        if job is None:  # one rank: the mean is the bucket itself
            done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
            done.set_result(buffer)
            return done
        return self._completer.future(job, None, buffer)

    def _start_sparse(self, comm: Communicator, buffer: torch.Tensor) -> torch.futures.Future[torch.Tensor]:
        """Sparse gradients go through torch.distributed, on the hook's own group."""
        self._say("sparse", "sparse gradients are reduced by torch.distributed, not by dpcomm")
        work = dist.all_reduce(buffer, group=groups.process_group(self._group), async_op=True)
        assert work is not None
        nranks, completer = comm.nranks, self._completer

        def mean(done: torch.futures.Future[Any]) -> torch.Tensor:
            try:
                total: torch.Tensor = done.value()[0]
            except RuntimeError as error:
                completer.last_error = completer.last_error or Error(f"sparse all-reduce: {error}", code="ABORTED")
                raise
            return total.div_(nranks)

        averaged: torch.futures.Future[torch.Tensor] = work.get_future().then(mean)
        return averaged

    def _request(self, comm: Communicator, dtype: torch.dtype, is_complex: bool) -> opt.Request:
        """The codec's request, or "none" where the codec does not serve the dtype.

        DDP hands complex gradients over as twice as many real ones, so the buffer's dtype does not show them.
        """
        request = comm._request("mean", None, None)
        name = str(dtype).removeprefix("torch.")
        if name in request.dtypes and (not is_complex or comm.codec == "none"):
            return request
        plain = comm._request("mean", "none", None)
        if name not in plain.dtypes:  # with algorithm "native" it may be the library that does not serve it
            plain = comm._request("mean", "none", "auto")
        if name not in plain.dtypes:
            raise opt.refuse_dtype(name, plain)
        kind = f"complex (two {name})" if is_complex else name
        asked = comm.codec if plain.algorithm_name != "auto" or comm.algorithm == "auto" else comm.algorithm
        self._say(kind, f"{kind} buckets travel as codec 'none': '{asked}' does not serve them")
        return plain

    def _refuse_join(self) -> None:
        ddp = self._ddp() if self._ddp is not None else None
        if ddp is not None and ddp._join_config.enable and not getattr(ddp, "_divide_by_initial_world_size", True):
            raise UnsupportedError("Join with divide_by_initial_world_size=False: the hook divides by the group's size")

    def _say(self, key: str, text: str) -> None:
        """One log line per subject."""
        if key not in self._said:
            self._said.add(key)
            logger.warning("%s (said once)", text)

    def _fail(self, cause: BaseException) -> torch.futures.Future[torch.Tensor]:
        """A future that fails with the cause, once earlier buckets are at rest; tells the peers."""
        if isinstance(cause, Error):
            error = cause
        elif isinstance(cause, KeyboardInterrupt):
            error = AbortedError("interrupted in the hook (KeyboardInterrupt)")
        else:
            error = InternalError(f"{type(cause).__name__}: {cause}")
        if error is not cause:
            error.__cause__ = cause
        if self._completer.last_error is None:  # before the earlier buckets fail of it
            self._completer.last_error = error
        if self.comm is not None:
            self.comm._abort(f"the hook failed on rank {self.comm.rank}: {error}")
        return self._completer.future(None, error, None)

    def _check_for(self, module: torch.nn.Module) -> None:
        """Before the forward of `module`: raises what has failed on the device, if it is this state's model."""
        if self._ddp is None or self._ddp() is not module or self.comm is None:
            return
        try:
            self.comm.check()
        except Error as error:
            self._completer.last_error = self._completer.last_error or error
            raise

    def _warn_of_failure(self, comm: Communicator) -> None:
        """On a GPU: says what no step has raised, since there will be none."""
        if comm.closed or comm.device.type != "cuda" or self.last_error is not None:
            return
        try:
            comm._settle(EXIT_GRACE_S)
            comm.check()
        except Error as error:
            logger.warning("closing the DDP hook: the last step had failed, and nothing has raised it: %s", error)

    def _renew(self) -> None:
        """Ends the communicator, waits until nothing touches a bucket, makes a new one; collective."""
        self._live_comm().close()
        if not self._completer.drain(DRAIN_S):
            raise CommTimeoutError(f"recover: the step's buckets were not at rest after {DRAIN_S:g} s")
        self._connect()
        self._completer.last_error = None


def allreduce_hook(state: HookState, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """The communication hook: the mean of a bucket over all ranks, in place. `ddp.register_comm_hook(state, this)`.

    Never raises, since that would leave DDP's reducer stuck: an error travels in the future, and backward() raises it
    as a RuntimeError that holds "[dpcomm:CODE]"; `state.last_error` is the error itself.
    """
    if isinstance(bucket, tuple):  # no reducer here that could get stuck, and nobody looks at a future
        raise UnsupportedError("torch._dynamo.config.optimize_ddp='python_reducer' bypasses bucket hooks")
    try:
        return state._start(bucket)
    except BaseException as error:  # noqa: BLE001 - see above
        if isinstance(state, HookState):
            return state._fail(error)
        wrong = ArgumentError(f"allreduce_hook: state must be a dpcomm.HookState, got {type(state).__name__}")
        return Completer().future(None, wrong, None)


def register_ddp_hook(
    ddp: DistributedDataParallel, *, process_group: Group | None = None, **keywords: Any
) -> HookState:
    """Lets dpcomm average a DDP model's gradients; collective over the model's group.

    On a GPU a step may fail on the device after its backward has returned. The error is raised by what comes next: the
    model's forward, the hook of the next bucket, or `close`, which logs it.

    Args:
        ddp: The model, before its first backward; its parameters all on CPU or all on one GPU.
        process_group: None is the model's own group; another, or a dimension of a DeviceMesh, must have the same ranks.
        keywords: Arguments of `HookState`, such as codec="none".

    Returns:
        The hook's state: `stats()`, `last_error`, `close()`.

    Raises:
        ArgumentError, UnsupportedError: The model cannot take the hook; says why, and what to do.
    """
    device = ddp_model.check(ddp, _is_copy)
    group = ddp.process_group if process_group is None else process_group
    ours = dist.get_process_group_ranks(ddp.process_group)
    theirs = dist.get_process_group_ranks(groups.process_group(group))
    if ours != theirs:
        raise ArgumentError(
            f"register_ddp_hook: ddp uses ranks {ours}, communicator {theirs}. Leave process_group out."
        )
    if device.type == "cuda" or groups.device_type(group):  # a mesh is held to the model's device
        keywords.setdefault("device", device)
    state = HookState(group, **keywords)
    state._ddp = weakref.ref(ddp)
    state._complex = any(parameter.is_complex() for parameter in ddp.parameters())
    try:
        ddp.register_comm_hook(state, allreduce_hook)
    except (RuntimeError, ValueError, TypeError) as error:
        state.close()
        raise ArgumentError(f"register_ddp_hook: DDP refused the hook: {error}") from error
    if device.type == "cuda":
        state._forward_check = ddp.register_forward_pre_hook(ddp_cuda.ForwardCheck(state))
    return state


def recover(ddp: DistributedDataParallel) -> None:
    """After a failed step: a new communicator, DDP's reducer reset, gradients None. Collective over the living ranks.

    The step itself is lost; the next one is as if it had never been.
    Two things lie outside of the hook: where a rank left its backward by an exception of its own, a model with
    find_unused_parameters (whose process group has missed a collective of DDP's), or one with static_graph in its first
    step, must be wrapped anew, on a new group.

    Raises:
        ArgumentError: The model has no dpcomm hook.
        CommTimeoutError, PeerLostError: Some rank of the group did not come, or has ended.
    """
    states = [state for hook, state in getattr(ddp, "_comm_hooks", ()) if hook is allreduce_hook]
    if not states:
        raise ArgumentError("recover: this model has no dpcomm hook. Register one with dpcomm.register_ddp_hook.")
    for state in states:
        state._renew()
    ddp._update_process_group(ddp.process_group)  # type: ignore[no-untyped-call]
    for parameter in ddp.parameters():
        parameter.grad = None


def _is_copy(state: object) -> bool:
    return isinstance(state, HookState) and state.comm is None


def _close_parts(comm: Communicator, completer: Completer, pid: int) -> None:
    if os.getpid() == pid:
        comm._close(EXIT_GRACE_S)
        completer.close(EXIT_GRACE_S)
