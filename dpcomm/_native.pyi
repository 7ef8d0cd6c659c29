"""What the C++ extension offers (csrc/bindings.cpp). No torch type crosses this line.

Errors: every call here may raise the exceptions of `dpcomm.errors`; the binding builds them with
`dpcomm.errors.from_native`. Enums cross as the integers of the tables below, whose names are the C++ names.
"""

version: str
cuda_built: bool
cuda_version: str  # "13.0", or "" where the extension was built without CUDA
LAYOUT: int  # version of wire and arena layout; ranks compare it before they share memory
MAX_RANKS: int  # of one communicator
MAX_CHANNELS: int  # threads a rank may move one tensor with
MAX_CTAS: int  # of one rank on a GPU

DTYPES: dict[str, int]  # "float32" "float64" "float16" "bfloat16" "int32" "int64"
OPS: dict[str, int]  # "sum" "mean" "min" "max"
CODECS: dict[str, int]  # "none" "fp16" "bf16"
ALGORITHMS: dict[str, int]  # "auto" "direct" "oneshot" "ring" "native"
ARRIVALS: dict[str, int]  # how an exchange ended: "here" "late" "broken"

def simd() -> list[str]:
    """Instruction sets usable on this processor, best first; the last is always "portable"."""

def wire_bytes(elems: int, dtype: int, codec: int, native: bool = False) -> int:
    """Bytes one copy of a segment of `elems` elements takes on the wire (whole groups of 256).

    native: codes of algorithm "native", which have no exponents.
    """

def choose_algorithm(elems: int, dtype: int, codec: int, nranks: int, network: bool) -> int:
    """What "auto" stands for at this size: the fixed table of docs/design.md."""

class Job:
    """One asynchronous call. Holds addresses only: the caller keeps the memory alive until it is done."""

    def wait(self, timeout_s: float) -> bool:
        """True when done, False when timeout_s ran out (negative: no limit); raises its error. Releases the GIL."""
    def is_completed(self) -> bool: ...
    def exception(self) -> Exception | None:
        """The call's error, None if it succeeded or still runs."""

class Pending:
    """One call on a GPU's streams. Holds addresses only: the caller keeps the memory alive until it is done.

    Only where cuda_built is true, as are P2pWish, P2pBuilder and the functions p2p_* and cuda_devices.
    """

    def join(self, stream: int, timeout_s: float) -> None:
        """Makes the stream wait for the call's end.

        The host waits only until all ranks of this process that share the GPU have entered the call, timeout_s at most
        (CommTimeoutError). Releases the GIL.
        """
    def synchronize(self, timeout_s: float) -> bool:
        """The host waits for the call's end; False when timeout_s ran out. Raises its error. Releases the GIL."""
    def is_completed(self) -> bool: ...
    def exception(self) -> Exception | None:
        """The call's error, None if it succeeded or still runs."""

class Comm:
    """A communicator's native half: an engine and the queue in front of it. Calls run in their order."""

    rank: int
    nranks: int
    device: int  # CUDA ordinal of the GPU; -1 where data is on the CPU
    stream: int  # that calls run on (cudaStream_t); 0 on the CPU

    def run(
        self, addresses: list[int], counts: list[int], dtype: int, op: int, codec: int, algorithm: int, bucket: int
    ) -> None:
        """All-reduces the segments in place in the caller's thread. Releases the GIL; Ctrl-C ends it within 200 ms.

        bucket: DDP's bucket index, -1 outside DDP; ranks compare it. Addresses are aligned to the dtype.
        """
    def submit(
        self, addresses: list[int], counts: list[int], dtype: int, op: int, codec: int, algorithm: int, bucket: int
    ) -> Job:
        """The same on the communicator's own C++ thread. Like `run`, on a GPU's communicator an InternalError."""
    def run_on(
        self,
        addresses: list[int],
        counts: list[int],
        dtype: int,
        op: int,
        codec: int,
        algorithm: int,
        bucket: int,
        stream: int,
        timeout_s: float,
    ) -> None:
        """As `run`, on a GPU: behind the stream's earlier work and before its later. Does not wait for the device.

        stream: a cudaStream_t as an integer, 0 is the legacy default stream. timeout_s: see `Pending.join`. On a CPU's
        communicator an InternalError.
        """
    def enqueue(
        self,
        addresses: list[int],
        counts: list[int],
        dtype: int,
        op: int,
        codec: int,
        algorithm: int,
        bucket: int,
        stream: int,
    ) -> Pending:
        """As `run_on`, but later work of the stream does not wait for the call: see `Pending.join`."""
    def check(self) -> None:
        """Raises the first failure of the communicator, if there is one."""
    def abort(self, reason: str) -> None:
        """Poisons the communicator on all ranks: calls in flight and later ones raise AbortedError."""
    def close(self, grace_s: float) -> None:
        """Local, idempotent. Waits grace_s for this rank's own queued work, then aborts."""
    closed: bool
    def stats(self, reset: bool) -> dict[str, float]:
        """calls input_bytes wire_bytes put_s reduce_s get_s wait_s nonfinite_groups."""
    def describe(self) -> dict[str, object]:
        """engine name simd store arena_bytes slots channels slot_bytes pids sequence rejected_connections
        aside_bytes (from which size on a carrier adds up itself what no codec encodes; 0: never).

        Of engine p2p also device device_name arena ("device" or "pinned") max_ctas peers (a text for each rank).
        """

class CarriedWish:
    """What to ask an engine for whose messages something else carries; equal on all ranks."""

    def __init__(self, scratch_bytes: int, slice_bytes: int = 0) -> None: ...

class CarriedComm(Comm):
    """A communicator whose messages a Python object carries (`carriers.Carrier`). Not usable before `verify`."""

    def __init__(
        self,
        rank: int,
        wish: CarriedWish,
        pids: list[int],
        hosts: list[str],
        sockets: list[tuple[int, int]],
        carrier: object,
        simd: str,
        engine: str,
        inside: ShmBuilder | None = None,
        inside_hosts: list[list[int]] = ...,
        intra_codec: int = ...,
    ) -> None:
        """Takes over the sockets: descriptors of two connections to each peer, control and headers; -1 for itself.

        hosts: empty for ranks whose process numbers mean something here.
        inside: of engine two_level, the memory of the ranks of this host, bound; it is used up. inside_hosts: the ranks
        of each host, ascending, hosts by their lowest rank. intra_codec: of CODECS, inside a host.
        """
    def verify(self, timeout_s: float, name: str) -> None:
        """The first call, on all ranks at once, in the caller's thread."""
    def serve(self) -> None:
        """Runs the calls of all threads, until the communicator is closed."""
    def wait_failed(self, timeout_s: float) -> bool:
        """Waits until the communicator has failed; False when the time is up or it was closed."""

class ShmWish:
    """What ranks ask the shm engine for; equal on all of them."""

    def __init__(
        self,
        arena_bytes: int,
        channels: int = 1,
        fewer_channels: bool = False,
        crowded: bool = False,
        slots: int = 0,
        slice_bytes: int = 0,
    ) -> None:
        """arena_bytes, channels: at most. fewer_channels: if they are faster at start. crowded: more ranks than
        processors. slots (a power of two, at least 4), slice_bytes: 0 takes what performs best. No bit depends on any.
        """

class ShmBuilder:
    """Builds one rank of an shm communicator in stages; Python compares the ranks' outcomes between them."""

    def __init__(self, rank: int, nranks: int, wish: ShmWish, simd: str) -> None:
        """Stage allocate: the sealed memfd and the listening abstract socket. simd "" takes the best."""
    def endpoint(self) -> bytes:
        """32 random bytes: the name this rank listens at."""
    def probe(self, endpoints: list[bytes]) -> list[bool]:
        """Stage probe: connects to every lower rank. True for those that answered, and for self and higher ranks."""
    def bind(self, secret: bytes, timeout_s: float) -> None:
        """Stage bind: authenticated handshakes (32-byte secret), descriptors exchanged, arenas mapped."""
    def warnings(self) -> list[str]:
        """Connections that `bind` dropped and why; the first few of them."""
    def finish(self, timeout_s: float, name: str) -> Comm:
        """Stage verify: first calls check the path and choose the store policy. name: the 4 hex digits in messages."""

def local_group(nranks: int, wish: ShmWish, timeout_s: float, simd: str, name: str) -> list[Comm]:
    """Ranks that are threads of this process."""

def cuda_reason() -> str:
    """Why no CUDA device can be used here; "" where one can."""

def cuda_device_of(address: int) -> int:
    """Ordinal of the GPU whose memory this is; -1 where the driver knows of none. Only where cuda_built is true."""

def cuda_devices() -> list[dict[str, object]]:
    """ordinal name uuid pci_bus_id capability ("9.0") sms of every GPU; [] where there is none."""

class P2pWish:
    """What ranks ask the p2p engine for; equal on all of them."""

    def __init__(
        self, arena_bytes: int, max_ctas: int = 0, slots: int = 0, slice_bytes: int = 0, pinned: bool = False
    ) -> None:
        """arena_bytes, max_ctas (of a rank): at most. slots, slice_bytes, max_ctas: 0 takes what performs best.
        pinned: arenas in host memory instead of the GPUs' own. No bit depends on any.
        """

class P2pBuilder:
    """Builds one rank of a p2p communicator in stages, as ShmBuilder does."""

    def __init__(self, rank: int, nranks: int, device: int, wish: P2pWish, channels: int) -> None:
        """Stage allocate. channels: CTAs a rank, equal on all ranks (the least of `p2p_channels`)."""
    def endpoint(self) -> bytes:
        """32 random bytes: the name this rank listens at."""
    def probe(self, endpoints: list[bytes]) -> list[bool]:
        """Stage probe: True for the ranks that answered, and for self and higher ranks."""
    def bind(self, secret: bytes, timeout_s: float) -> None:
        """Stage bind: handshakes, peers' memory mapped; P2PUnavailableError where a GPU does not reach another's."""
    def warnings(self) -> list[str]:
        """Connections that `bind` dropped and why; the first few of them."""
    def finish(self, timeout_s: float, name: str) -> Comm:
        """Stage verify, with the real kernels; P2PUnavailableError where data does not arrive. name: see ShmBuilder."""

def p2p_channels(device: int, ranks_here: int, wish: P2pWish) -> int:
    """Stage validate: how many CTAs a rank may use where ranks_here ranks of this process share the GPU.

    Raises ArgumentError (no such GPU), SystemResourceError (too many CTAs are taken), VersionError (no kernel for it).
    """

def p2p_local(devices: list[int], wish: P2pWish, timeout_s: float, name: str) -> list[Comm]:
    """Ranks of this process, one for each ordinal, which may repeat; P2PUnavailableError as of P2pBuilder."""

NCCL_LEAST_VERSION: str  # "2.18.0"

def find_nccl(asked: str, wheels: list[str]) -> tuple[str, str, str]:
    """Finds NCCL and loads it, for the process: its version, path and how it was found (csrc/nccl/library.h).

    asked: the path to use, or "". wheels: paths to try where none is loaded. Raises VersionError. Releases the GIL.
    """

def nccl_unique_id() -> bytes:
    """The 128 bytes that the ranks of a new communicator share; after `find_nccl`. Starts a thread that awaits them."""

class NcclWish:
    """What to ask engine nccl for; equal on all ranks."""

    def __init__(self, scratch_bytes: int, slice_bytes: int = 0, max_ctas: int = 0) -> None: ...

class NcclComm(Comm):
    """A communicator between GPUs whose messages NCCL carries; after `find_nccl`. Not usable before `verify`."""

    def __init__(
        self,
        rank: int,
        device: int,
        wish: NcclWish,
        pids: list[int],
        hosts: list[str],
        sockets: list[tuple[int, int]],
        two_levels: list[list[int]] = ...,
        intra_codec: int = 0,
    ) -> None:
        """Takes over the sockets, as CarriedComm does. two_levels: each host's ranks, or []."""
    def connect(self, unique_id: bytes, timeout_s: float) -> None:
        """Joins the others, on all ranks at once. Waits until they have come, timeout_s at most; heeds Ctrl-C."""
    def verify(self, timeout_s: float, name: str) -> None:
        """The first calls, on all ranks at once."""

PASSES: dict[str, int]  # "encode" "decode" "add" "reduce" "cast" "widen" "copy" "memcpy" "empty"; only with kernels

class CudaPass:
    """One pass of a schedule alone, for benchmarks: csrc/cuda/passes.h says what each reads and writes."""

    kind: int  # of PASSES
    codec: int
    dtype: int  # float32; encode and decode also bfloat16
    counts: list[int]  # elements of each tensor
    tensors: list[list[int]]  # [set][tensor] device memory; repetitions rotate through the sets
    messages: list[list[int]]  # [set][message]
    message_bytes: int  # of each message, at least pass_message_bytes()
    slice_bytes: int  # that a CTA works on at a time, at most
    ctas: int
    repeats: int
    stream: int  # a cudaStream_t; 0 is the default stream

def pass_message_bytes(call: CudaPass) -> int:
    """Bytes that a message of this pass takes."""

def run_pass(call: CudaPass) -> float:
    """Microseconds a repetition by the device's clock, after one untimed run over each set. Waits for the stream."""
