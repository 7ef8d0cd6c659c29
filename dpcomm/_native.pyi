"""What the C++ extension offers (csrc/bindings.cpp). No torch type crosses this line.

Errors: every call here may raise the exceptions of `dpcomm.errors`; the binding builds them with
`dpcomm.errors.from_native`. Enums cross as the integers of the tables below, whose names are the C++ names.
"""

version: str
cuda_built: bool
cuda_version: str  # "13.0", or "" where the extension was built without CUDA
LAYOUT: int  # version of wire and arena layout; ranks compare it before they share memory
MAX_RANKS: int  # of the shm engine
MAX_CHANNELS: int  # threads a rank may move one tensor with

DTYPES: dict[str, int]  # "float32" "float64" "float16" "bfloat16" "int32" "int64"
OPS: dict[str, int]  # "sum" "mean" "min" "max"
CODECS: dict[str, int]  # "none" "fp16"
ALGORITHMS: dict[str, int]  # "auto" "direct" "oneshot" "ring"

def simd() -> list[str]:
    """Instruction sets usable on this processor, best first; the last is always "portable"."""

def wire_bytes(elems: int, dtype: int, codec: int) -> int:
    """Bytes one copy of a segment of `elems` elements takes on the wire (whole groups of 256)."""

def choose_algorithm(elems: int, dtype: int, codec: int, nranks: int) -> int:
    """What "auto" stands for at this size: the fixed table of docs/design.md."""

class Job:
    """One asynchronous call. Holds addresses only: the caller keeps the memory alive until it is done."""

    def wait(self, timeout_s: float) -> bool:
        """True when done, False when timeout_s ran out (negative: no limit); raises its error. Releases the GIL."""
    def is_completed(self) -> bool: ...
    def exception(self) -> Exception | None:
        """The call's error, None if it succeeded or still runs."""

class Comm:
    """A communicator's native half: an engine and the queue in front of it. Calls run in their order."""

    rank: int
    nranks: int

    def run(
        self, addresses: list[int], counts: list[int], dtype: int, op: int, codec: int, algorithm: int, bucket: int
    ) -> None:
        """All-reduces the segments in place in the caller's thread. Releases the GIL; Ctrl-C ends it within 200 ms.

        bucket: DDP's bucket index, -1 outside DDP; ranks compare it. Addresses are aligned to the dtype.
        """
    def submit(
        self, addresses: list[int], counts: list[int], dtype: int, op: int, codec: int, algorithm: int, bucket: int
    ) -> Job:
        """The same on the communicator's own C++ thread."""
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
        """engine simd store arena_bytes slots channels slot_bytes pids sequence rejected_connections."""

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

class LoopbackCall:
    """What `loopback_allreduce` shall do. Only where cuda_built is true, as is that function."""

    addresses: list[list[int]]  # [rank][segment] device memory, aligned to the dtype
    counts: list[int]
    dtype: int  # float32; with codec none also bfloat16, by algorithm direct
    op: int
    codec: int
    algorithm: int  # direct (the default), oneshot or ring
    timeout_s: float  # of one wait on the device
    slots: int
    slot_bytes: int
    first_message: int  # where all message counters start, 0 ... 2^32 - 1
    calls: int  # in a row, each on the result of the one before
    absent_rank: int  # -1, or a rank that never comes
    disagreeing_rank: int  # -1, or a rank that announces another bucket than the others

def loopback_allreduce(call: LoopbackCall) -> tuple[float, int]:
    """All-reduces in place between ranks that are CTAs of one cooperative launch; checks the core on one GPU.

    Returns:
        Microseconds of one call by the device's clock, and the encoded groups that held a NaN or Inf.
    """
