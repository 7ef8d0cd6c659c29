"""`Communicator`: validates once, at the edge, and calls the engine.

What a tensor is lies in `arrays`, how ranks meet in `bootstrap`, how calls are issued in `calls` and `cuda_calls`.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from typing import Any, NoReturn

import torch
from torch._C._distributed_c10d import Store

from dpcomm import _native, arrays, bootstrap, groups
from dpcomm import options as opt
from dpcomm.calls import Calls, CpuCalls
from dpcomm.carriers import CARRIER_THREADS
from dpcomm.cuda_calls import CudaCalls
from dpcomm.errors import ArgumentError, Error, InternalError
from dpcomm.groups import Group
from dpcomm.overlap import check_overlap
from dpcomm.store_calls import THREAD as STORE_THREAD
from dpcomm.work import Work

CLOSE_GRACE_S = 5.0
EXIT_GRACE_S = 2.0
# Where the collector must not wait for a communicator that it finds: for itself, or while a rank waits for the store.
OWN_THREADS = (*CARRIER_THREADS, STORE_THREAD)
STATS = ("calls", "input_bytes", "wire_bytes", "put_s", "reduce_s", "get_s", "wait_s", "nonfinite_groups")


class Communicator:
    """The ranks of a group, ready to all-reduce. Construction is collective: every rank of the group takes part.

    After a failure on any rank it is poisoned on all: every call raises AbortedError with the first cause. A context
    manager; closed at exit at the latest. Calls from several threads are serialised, in an order that must be the same
    on all ranks. Cannot be pickled.

    Args:
        group: The process group, or one dimension of a DeviceMesh, such as mesh["dp"]; None with no rank, nranks and
            store is the default group. Many communicators may live at once: docs/subgroups.md has the rules.
        rank, nranks, store: Instead of a group: this rank, how many there are, and a torch.distributed.Store that all
            reach. nranks=1 needs no store.
        device: Where all arrays lie: "cpu"; or a GPU, as torch.device, "cuda", "cuda:1" or its ordinal. None is "cpu",
            or the kind of device that a mesh is made of. Calls on a GPU are ordered as torch's own work is: behind what
            the current stream has, before what it gets.
        codec: What travels: "none", "fp16", or with algorithm="native" also "bf16"; calls may choose another.
        engine: "auto"; "shm" (on CPU, one host), "gloo" (on CPU, any hosts), "two_level" (on CPU, several hosts with
            several ranks: memory inside a host, gloo between), "torch" (on CPU, any hosts, through a process group like
            the given one), "p2p" (on GPUs of one host) or "nccl" (on GPUs of any hosts; both without a device take the
            current one). auto takes shm or p2p; where the ranks share no host, two_level, gloo or nccl; gloo or nccl
            for algorithm="native".
        algorithm: "auto", "direct", "oneshot", "ring"; "two_level" of that engine, and on GPUs of engine "nccl" (which
            takes it only where it is asked for, here); or "native": the all-reduce of NCCL (engine "nccl"), where
            codecs are plain 16 bits that NCCL adds up, or of gloo (engines "gloo" and "two_level", codec "none"). It
            promises the same bytes on all ranks and nothing else of them. Calls may choose another.
        timeout_s: After how many seconds without progress a call raises CommTimeoutError. Ranks may differ in it; the
            first that runs out ends the call on all. DPCOMM_TIMEOUT_S takes the place of the default.
        bucket_cap_mb: Size in MiB up to which the tensors of a list are reduced together.
        max_ctas: On a GPU, how many CTAs a call may take at most; None takes as many as perform best.
        intra_codec: Of two levels, what travels inside a host in calls that have a codec: "none" or "fp16".

    Raises:
        ArgumentError, UnsupportedError: Arguments that cannot work, on any rank.
        P2PUnavailableError: GPUs do not reach each other's memory, and DPCOMM_P2P_ARENA=device.
        MismatchError, VersionError: Ranks that want or are different things.
        CommTimeoutError, PeerLostError: Ranks that did not come, or ended.
        SystemResourceError: No memory, descriptors or permission.
    """

    def __init__(
        self,
        group: Group | None = None,
        *,
        rank: int | None = None,
        nranks: int | None = None,
        store: Store | None = None,
        device: torch.device | str | int | None = None,
        codec: str = "none",
        engine: str = "auto",
        algorithm: str = "auto",
        timeout_s: float = 300.0,
        bucket_cap_mb: float = 25.0,
        max_ctas: int | None = None,
        intra_codec: str = "none",
    ) -> None:
        self._finalizer: weakref.finalize[Any, Any] | None = None
        site = bootstrap.locate(group, rank, nranks, store)
        options: opt.Options | Error
        try:
            where = groups.device_for(group, device)
            options = opt.resolve(codec, engine, algorithm, timeout_s, bucket_cap_mb, where, max_ctas, intra_codec)
        except Error as error:
            options = error  # told to all ranks before it is raised
        built = bootstrap.build(site, options) if site.nranks > 1 else None
        if isinstance(options, Error):
            raise options
        self._set_up(built, site.rank, site.nranks, options)

    @classmethod
    def _from_native(cls, native: _native.Comm | None, rank: int, nranks: int, options: opt.Options) -> Communicator:
        """Wraps a native communicator that was built elsewhere (`init_local`)."""
        made = cls.__new__(cls)
        built = None
        if native is not None:
            where = "CPU" if options.device == opt.CPU else "CUDA devices"
            why = bootstrap.one_host(where) if options.engine == "auto" else "asked for"
            built = bootstrap.Built(native, options.serving, why)
        made._set_up(built, rank, nranks, options)
        return made

    def _set_up(self, built: bootstrap.Built | None, rank: int, nranks: int, options: opt.Options) -> None:
        native = built.comm if built is not None else None
        self.rank, self.nranks = rank, nranks
        self.codec, self.algorithm, self.timeout_s = options.codec, options.algorithm, options.timeout_s
        self.device = torch.device(options.device_name)
        self.engine = built.engine if built is not None else "none"
        self._why = built.why if built is not None else "one rank: nothing to move"
        self._options = options
        cap_bytes = options.bucket_cap_mb * 2**20
        self._calls: Calls
        if options.device == opt.CPU:
            self._calls = CpuCalls(native, cap_bytes)
        else:
            self._calls = CudaCalls(native, options.device, cap_bytes, options.timeout_s)
        self._requests: dict[tuple[type, object, object, object], opt.Request] = {}
        self._closed = False
        self._built = native  # None where there is one rank only
        self._native = native  # None also once closed
        self._native_of_cpu = native if options.device == opt.CPU else None  # the same, for the shortest way
        self._finalizer = None
        if native is not None:
            # Runs when the last reference goes, or at exit.
            in_use = self._calls.in_use if isinstance(self._calls, CpuCalls) else None
            self._finalizer = weakref.finalize(self, _close_native, native, os.getpid(), in_use)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def allreduce(
        self,
        x: Any,
        op: Any = "sum",
        *,
        codec: str | None = None,
        algorithm: str | None = None,
        async_op: bool = False,
    ) -> Any:
        """Reduces x over all ranks, in place; all ranks hold the same bytes afterwards.

        Args:
            x: A tensor or array, or a list of them; the same shapes, dtypes and order on all ranks.
            op: "sum", "mean", "min", "max" or the torch.distributed.ReduceOp of that meaning.
            codec, algorithm: None takes the communicator's own.
            async_op: Returns at once with a Work; x must not be touched until it is completed.

        Returns:
            x, or a Work.

        Raises:
            ArgumentError, UnsupportedError: x or an option cannot work; nothing was sent.
            MismatchError, PeerLostError, CommTimeoutError, AbortedError: On all ranks; the communicator is poisoned.
        """
        try:
            request = self._requests[type(op), op, codec, algorithm]
        except (KeyError, TypeError):
            request = self._request(op, codec, algorithm)
        native = self._native_of_cpu
        if native is not None and not async_op:
            plain = arrays.direct(x)
            if plain is not None:
                address, count, dtype = plain
                served = request.dtypes.get(dtype)
                if served is None:
                    raise opt.refuse_dtype(dtype, request)
                native.run([address], [count * served[1]], served[0], request.op, request.codec, request.algorithm, -1)
                return x
        return self._allreduce_any(x, request, async_op)

    def describe(self) -> dict[str, Any]:
        """What this communicator is: engine and why, which algorithm and bit class at which size, versions, arena."""
        native = self._built.describe() if self._built is not None else {"arena_bytes": 0}
        return {
            **native,
            "engine": self.engine,
            "why": self._why,
            "rank": self.rank,
            "nranks": self.nranks,
            "codec": self.codec,
            "algorithm": self.algorithm,
            "timeout_s": self.timeout_s,
            "bucket_cap_mb": self._options.bucket_cap_mb,
            "bit_classes": self._bit_classes(),
            "versions": {"dpcomm": _native.version, "layout": _native.LAYOUT, "torch": str(torch.__version__)},
        }

    def stats(self, reset: bool = False) -> dict[str, float]:
        """Sums since construction or the last reset: calls, bytes, seconds per phase, groups that were not finite."""
        return self._built.stats(reset) if self._built is not None else dict.fromkeys(STATS, 0)

    def check(self) -> None:
        """Raises what has gone wrong since the last call; returns at once if nothing has."""
        self._refuse_closed()
        if self._native is not None:
            self._native.check()

    def close(self) -> None:
        """Gives everything back; local and idempotent. Waits 5 s at most for own work, then aborts it on all ranks."""
        self._close(CLOSE_GRACE_S)

    def __enter__(self) -> Communicator:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError("cannot pickle or copy a dpcomm.Communicator: it is bound to this process. Make one in each.")

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"engine={self.engine}, codec={self.codec}, algorithm={self.algorithm}"
        return f"<dpcomm.Communicator rank {self.rank}/{self.nranks}, {state}>"

    def _request(self, op: object, codec: str | None, algorithm: str | None) -> opt.Request:
        """Validates one combination of options, and remembers it."""
        made = opt.request(
            op, self.codec if codec is None else codec, self.algorithm if algorithm is None else algorithm
        )
        engine = self.engine if self._built is not None else self._options.engine
        if engine != "auto":  # one rank of engine "auto": any would do
            made = opt.narrowed(made, engine)
        with contextlib.suppress(TypeError):  # a ReduceOp that cannot be hashed is validated each time
            self._requests[type(op), op, codec, algorithm] = made  # the type: ReduceOp.SUM == 0
        return made

    def _allreduce_any(self, x: Any, request: opt.Request, async_op: bool) -> Any:
        """Lists, arrays that need copies, asynchronous calls, one rank, and GPUs."""
        self._refuse_closed()
        if async_op:
            return self._submit(self._prepare(x, request), request)
        if not self._calls.run_plainly(x, request):
            self._calls.run(self._prepare(x, request), request)
        return x

    def _prepare(self, x: Any, request: opt.Request) -> arrays.Parts:
        """Validates x against the request; nothing is sent."""
        self._refuse_closed()
        parts = self._calls.parts(x)
        for dtype in dict.fromkeys(parts.dtypes):
            if dtype not in request.dtypes:
                raise opt.refuse_dtype(dtype, request)
        if len(parts.dtypes) > 1:
            check_overlap([parts])
        return parts

    def _submit(self, parts: arrays.Parts, request: opt.Request) -> Work:
        """Starts what `_prepare` accepted."""
        return self._calls.submit(parts, request, self)

    def _submit_bucket(self, x: torch.Tensor, request: opt.Request, bucket: int) -> _native.Job | None:
        """Queues one DDP bucket on CPU: see `CpuCalls.submit_bucket`."""
        self._refuse_closed()
        if not isinstance(self._calls, CpuCalls):
            raise InternalError(f"a bucket on CPU for a communicator on {self.device}")
        return self._calls.submit_bucket(x, request, bucket)

    def _enqueue_bucket(self, x: torch.Tensor, request: opt.Request, bucket: int) -> torch.cuda.Stream | None:
        """Starts one DDP bucket on a GPU: see `CudaCalls.enqueue_bucket`."""
        self._refuse_closed()
        if not isinstance(self._calls, CudaCalls):
            raise InternalError("a bucket on a GPU for a communicator on CPU")
        return self._calls.enqueue_bucket(x, request, bucket)

    def _settle(self, timeout_s: float) -> None:
        """On a GPU, the host waits for what is under way, timeout_s at most; raises the first error of it."""
        if isinstance(self._calls, CudaCalls):
            self._calls.settle(timeout_s)

    def _abort(self, reason: str) -> None:
        """Poisons the communicator on all ranks."""
        if self._native is not None:
            self._native.abort(reason)

    def _refuse_closed(self) -> None:
        if self._closed:
            raise ArgumentError("the communicator has been closed. Make a new dpcomm.Communicator.")

    def _close(self, grace_s: float) -> None:
        if self._closed:
            return
        self._closed = True
        native, self._native, self._native_of_cpu = self._native, None, None
        if self._finalizer is not None:
            self._finalizer.detach()
        if native is not None:
            native.close(grace_s)
        self._calls.release()

    def _bit_classes(self) -> list[dict[str, object]]:
        """From which number of float32 elements on which algorithm, and so which bits."""
        names = {code: name for name, code in _native.ALGORITHMS.items()}
        codec, dtype = _native.CODECS[self.codec], _native.DTYPES["float32"]
        about: Any = self._built.describe() if self._built is not None else {}
        network = self.engine in opt.NETWORK_ENGINES
        aside_bytes = about.get("aside_bytes", 0) if network else 0
        table: list[dict[str, object]] = []
        for exponent in range(41):
            name = self.algorithm
            if name == "auto" and self.engine == "two_level":
                name = "two_level"
            elif name == "auto":
                name = names[_native.choose_algorithm(1 << exponent, dtype, codec, self.nranks, network)]
                if self.codec == "none" and aside_bytes and 4 << exponent >= aside_bytes:
                    name = "native"
            if not table or table[-1]["algorithm"] != name:
                bit_class = name if name in ("ring", "native") else "rank_order"
                if name == "two_level":
                    bit_class = f"two_level({about.get('hosts')})"
                table.append({"from_elems": 1 << exponent, "algorithm": name, "bit_class": bit_class})
        return table


def _close_native(native: _native.Comm, pid: int, in_use: object) -> None:
    """in_use: what calls under way work on; it must live until they have ended."""
    if os.getpid() != pid:  # a forked child that exits leaves its parent's communicator alone
        return
    if threading.current_thread().name in OWN_THREADS:  # the collector came by there
        threading.Thread(target=_close_native, args=(native, pid, in_use)).start()
    else:
        native.close(EXIT_GRACE_S)
