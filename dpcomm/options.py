"""What may be asked for: operations, codecs, algorithms, engines, and which of them go together.

Knows names only; no tensor, no rank, no memory.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed import ReduceOp

from dpcomm import _native, environment, nccl_library
from dpcomm.errors import ArgumentError, UnsupportedError

MAX_TIMEOUT_S = environment.MAX_TIMEOUT_S
FLOATS = ("float32", "float64", "float16", "bfloat16")
ENCODED = ("float32", "float16", "bfloat16")  # what a codec other than none serves
# Engines whose library has an all-reduce of its own (algorithm "native"), and codecs that it adds up.
NATIVE = {"gloo": ("none",), "two_level": ("none",), "nccl": ("none", "fp16", "bf16")}
# Complex numbers travel as twice as many real ones: sum and mean act on the parts alike.
COMPLEX = {"complex64": "float32", "complex128": "float64"}
ENGINES = ("auto", "shm", "p2p", "gloo", "two_level", "torch", "nccl")
CARRIED_ENGINES = ("gloo", "two_level", "torch")  # on CPU, through torch
TWO_LEVEL = ("two_level", "nccl")  # engines that have algorithm two_level
INTRA_CODECS = ("none", "fp16")
NETWORK_ENGINES = (*CARRIED_ENGINES, "nccl")
GPU_ENGINES = ("p2p", "nccl")
CPU = -1  # the ordinal of no GPU


class Request(NamedTuple):
    """One validated combination of operation, codec and algorithm, as the numbers the extension takes."""

    op: int
    codec: int
    algorithm: int
    dtypes: dict[str, tuple[int, int]]  # name of the dtype -> (native dtype, native elements per element)
    op_name: str
    codec_name: str
    algorithm_name: str = "auto"


class Options(NamedTuple):
    """A communicator's validated options."""

    codec: str
    engine: str  # as asked for: "auto" or an engine's name
    algorithm: str
    timeout_s: float
    bucket_cap_mb: float
    arena_bytes: int
    simd: str
    channels: int  # 0: measured
    device: int = CPU  # ordinal of the GPU
    max_ctas: int = 0  # at most this many CTAs a rank on a GPU; 0: as many as perform best
    arena: str = "auto"  # of engine p2p: "auto", "device" or "pinned"
    intra_codec: str = "none"  # of two levels

    @property
    def serving(self) -> str:
        """The engine to try: what was asked for, or what serves ranks of one host on this device."""
        if self.engine != "auto":
            return self.engine
        if self.algorithm == "two_level":
            return "two_level" if self.device == CPU else "nccl"
        if self.algorithm == "native":
            return "gloo" if self.device == CPU else "nccl"
        return "shm" if self.device == CPU else "p2p"

    @property
    def wants_hosts(self) -> bool:
        """Whether the ranks of each host must be known: for two levels."""
        return self.serving == "two_level" or self.algorithm == "two_level"

    @property
    def device_name(self) -> str:
        """The device as torch spells it."""
        return "cpu" if self.device == CPU else f"cuda:{self.device}"


def op_name(op: object) -> str:
    """The name of an operation given by name or as a torch.distributed.ReduceOp.

    Raises:
        ArgumentError: Not an operation.
        UnsupportedError: A ReduceOp that dpcomm does not offer.
    """
    if isinstance(op, str):
        if op in _native.OPS:
            return op
        raise ArgumentError(f"allreduce: unknown op {op!r}. Use one of {', '.join(_native.OPS)}.")
    if isinstance(op, (ReduceOp, type(ReduceOp.SUM))):
        named = (("sum", ReduceOp.SUM), ("mean", ReduceOp.AVG), ("min", ReduceOp.MIN), ("max", ReduceOp.MAX))
        for name, value in named:
            if op == value:
                return name
        raise UnsupportedError(f"allreduce: {op} is not offered. Use SUM, AVG, MIN or MAX.")
    raise ArgumentError(f"allreduce: op must be a name or a torch.distributed.ReduceOp, got {type(op).__name__}")


def request(op: object, codec: object, algorithm: object) -> Request:
    """Validates one combination, and lists the dtypes that it serves.

    Raises:
        ArgumentError: A name that does not exist.
        UnsupportedError: min or max with a codec, or codec bf16 with an algorithm of dpcomm's own.
    """
    op_str = op_name(op)
    codec_str, algorithm_str = _coding(codec, algorithm)
    if codec_str != "none" and op_str in ("min", "max"):
        raise UnsupportedError(f"allreduce: op={op_str} with codec={codec_str}. Use codec='none'.")
    return Request(
        _native.OPS[op_str],
        _native.CODECS[codec_str],
        _native.ALGORITHMS[algorithm_str],
        _dtypes(op_str, codec_str),
        op_str,
        codec_str,
        algorithm_str,
    )


def _coding(codec: object, algorithm: object) -> tuple[str, str]:
    """Codec and algorithm, if they go together."""
    codec_str = choice("codec", codec, _native.CODECS)
    algorithm_str = choice("algorithm", algorithm, _native.ALGORITHMS)
    if codec_str == "bf16" and algorithm_str != "native":
        raise UnsupportedError(
            f"codec='bf16' with algorithm={algorithm_str!r}: only algorithm='native' of engine='nccl' has it. "
            "Use codec='fp16'."
        )
    return codec_str, algorithm_str


def check_native(engine: str, codec: str) -> None:
    """Refuses algorithm "native" where no library of the engine adds up such a codec.

    Raises:
        UnsupportedError: It does not.
    """
    if engine not in NATIVE:
        raise UnsupportedError(
            f"algorithm='native' with engine={engine!r}, which uses no library's all-reduce. Use engine='nccl' on GPUs "
            "or engine='gloo' on CPUs, or another algorithm."
        )
    if codec not in NATIVE[engine]:
        raise UnsupportedError(
            f"algorithm='native' with engine={engine!r} and codec={codec!r}: use codec {' or '.join(NATIVE[engine])}, "
            "or codec='fp16' with algorithm='auto'."
        )


def check_two_level(engine: str) -> None:
    """Refuses algorithm "two_level" of any other engine.

    Raises:
        UnsupportedError: It is another.
    """
    if engine not in TWO_LEVEL:
        raise UnsupportedError(
            f"algorithm='two_level' with engine={engine!r}: two levels are for several hosts with several ranks, of "
            "engine='two_level' for data on CPU, and of engine='nccl' on GPUs. Use algorithm='auto'."
        )


def narrowed(asked: Request, engine: str) -> Request:
    """A request for an algorithm of some engines, with the dtypes that are served so.

    Raises:
        UnsupportedError: The engine has no such algorithm, or serves nothing so.
    """
    if asked.algorithm_name == "two_level":
        check_two_level(engine)
    if asked.algorithm_name != "native":
        return asked
    check_native(engine, asked.codec_name)
    if asked.codec_name != "none":
        return asked
    extreme = asked.op_name in ("min", "max")
    served = set(asked.dtypes) if engine == "nccl" else {"float32", "float64", *COMPLEX}
    if extreme:  # NCCL's of real numbers lose NaNs
        served = {"int32", "int64"} if engine == "nccl" else set()
    if not served:
        raise UnsupportedError(
            f"allreduce: op={asked.op_name} with algorithm='native' of engine={engine!r}. Use 'auto'."
        )
    return asked._replace(dtypes={name: code for name, code in asked.dtypes.items() if name in served})


def _dtypes(op: str, codec: str) -> dict[str, tuple[int, int]]:
    native = _native.DTYPES
    if codec != "none":
        return {name: (native[name], 1) for name in ENCODED}
    served = {name: (code, 1) for name, code in native.items() if op != "mean" or name in FLOATS}
    if op in ("sum", "mean"):
        served |= {name: (native[part], 2) for name, part in COMPLEX.items()}
    return served


def refuse_dtype(dtype: str, asked: Request) -> UnsupportedError:
    """The error for a dtype that the request does not serve: says which are served, or which codec to take."""
    if asked.codec_name != "none" and dtype in _dtypes(asked.op_name, "none"):
        return UnsupportedError(f"allreduce: {dtype} with codec={asked.codec_name}; use codec='none'")
    how = " with algorithm='native'" if asked.algorithm_name == "native" else ""
    return UnsupportedError(
        f"allreduce: dtype {dtype} not supported for op={asked.op_name}{how}; supported: {', '.join(asked.dtypes)}"
    )


def choice(what: str, value: object, names: dict[str, int]) -> str:
    """Checks that a value is one of the names."""
    if isinstance(value, str) and value in names:
        return value
    raise ArgumentError(f"unknown {what} {value!r}. Use one of {', '.join(names)}.")


def engine_reason(engine: str) -> str:
    """Why an engine cannot be used here; "" where it can.

    Asks the CUDA driver about those of GPUs, and loads NCCL for engine nccl.
    """
    if engine in ("shm", "torch"):
        return ""
    if engine in ("gloo", "two_level"):
        return "" if dist.is_gloo_available() else "this torch was built without gloo"
    if engine in ("p2p", "nccl"):
        reason = _native.cuda_reason()
        if reason:
            return f"CUDA not available: {reason}"
        return "" if engine == "p2p" else nccl_library.reason()
    raise AssertionError(engine)


def resolve(
    codec: object,
    engine: object,
    algorithm: object,
    timeout_s: object,
    bucket_cap_mb: object,
    device: object,
    max_ctas: object = None,
    intra_codec: object = "none",
) -> Options:
    """Validates a communicator's options and fills in what the environment says.

    Raises:
        ArgumentError: An unknown name, a number out of range, an engine or device that is not available or not served.
        UnsupportedError: A device that this version does not serve, or a codec and algorithm that exclude each other.
        VersionError: Engine nccl, and no NCCL that it can use.
    """
    env = environment.read()
    _check_engine(engine)
    ordinal = _ordinal(device, engine)
    seconds = positive("timeout_s", timeout_s, MAX_TIMEOUT_S)
    codec_str, algorithm_str = _coding(codec, algorithm)
    made = Options(
        codec=codec_str,
        engine=str(engine),
        algorithm=algorithm_str,
        timeout_s=env.timeout_s if seconds == environment.DEFAULT_TIMEOUT_S else seconds,
        bucket_cap_mb=positive("bucket_cap_mb", bucket_cap_mb, 1e9),
        arena_bytes=env.arena_bytes,
        simd=env.simd,
        channels=env.channels,
        device=ordinal,
        max_ctas=_max_ctas(max_ctas, ordinal),
        arena=env.p2p_arena,
        intra_codec=_intra_codec(intra_codec, engine, algorithm_str),
    )
    if algorithm_str == "native":
        check_native(made.serving, codec_str)
    if algorithm_str == "two_level":
        check_two_level(made.serving)
    return made


def positive(what: str, value: object, limit: float) -> float:
    """Checks that a value is a number in (0, limit]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ArgumentError(f"{what} must be a number, got {type(value).__name__}")
    if math.isnan(value) or not 0 < value <= limit:
        raise ArgumentError(f"{what}={value}: expected more than 0 and at most {limit:.0f}")
    return float(value)


def _check_engine(engine: object) -> None:
    if engine not in ENGINES:
        raise ArgumentError(f"unknown engine {engine!r}. Use one of {', '.join(ENGINES)}.")
    if engine in ("gloo", "two_level") and (reason := engine_reason("gloo")):
        raise ArgumentError(f"engine={engine!r}: {reason}. Use engine='torch', or another build of torch.")


def _intra_codec(intra_codec: object, engine: object, algorithm: str) -> str:
    if intra_codec not in INTRA_CODECS:
        raise ArgumentError(f"unknown intra_codec {intra_codec!r}. Use one of {', '.join(INTRA_CODECS)}.")
    if intra_codec == "none" or engine in ("auto", "two_level") or (engine == "nccl" and algorithm == "two_level"):
        return str(intra_codec)
    raise ArgumentError(
        f"intra_codec={intra_codec!r} with engine={engine!r} and algorithm={algorithm!r}: it is of engine='two_level', "
        "and on GPUs of algorithm='two_level'."
    )


def _ordinal(device: object, engine: object) -> int:
    """Which GPU, or CPU."""
    asked = f"device={device!r}"
    if device is None:
        kind, ordinal = ("cuda" if engine in GPU_ENGINES else "cpu"), None
        asked = f"engine={engine!r}"
    elif isinstance(device, int) and not isinstance(device, bool):
        kind, ordinal = "cuda", device
    else:
        kind, ordinal = _parsed(device)
    if kind not in ("cpu", "cuda"):
        raise UnsupportedError(f"{asked}: dpcomm serves memory of CPUs and CUDA devices. Use 'cpu' or 'cuda'.")
    if kind == "cpu":
        if engine in GPU_ENGINES:
            raise ArgumentError(
                f"engine={engine!r} moves data between GPUs, but {asked}. Use 'cuda', or engine='auto'."
            )
        return CPU
    if engine in ("shm", *CARRIED_ENGINES):
        raise ArgumentError(f"engine={engine!r} moves data between CPUs, but {asked}. Use 'cpu', or engine='auto'.")
    reason = engine_reason("p2p")
    if reason:
        raise ArgumentError(f"{asked}: {reason}")
    if engine == "nccl":
        nccl_library.find()
    if ordinal is None:
        return _current_gpu()
    if ordinal < 0:
        raise ArgumentError(f"{asked}: expected the ordinal of a GPU, 0 or more")
    return ordinal


def _parsed(device: object) -> tuple[str, int | None]:
    try:
        made = torch.device(device)  # type: ignore[call-overload]
    except (TypeError, RuntimeError) as error:
        raise ArgumentError(f"device={device!r} is not a device: {error}") from None
    return made.type, made.index


def _current_gpu() -> int:
    """What plain "cuda" stands for: torch's current device, 0 where torch has no CUDA."""
    return int(torch.cuda.current_device()) if torch.cuda.is_available() else 0


def _max_ctas(max_ctas: object, ordinal: int) -> int:
    if max_ctas is None:
        return 0
    if type(max_ctas) is not int or not 1 <= max_ctas <= _native.MAX_CTAS:
        raise ArgumentError(f"max_ctas={max_ctas!r}: expected None or a whole number, 1 to {_native.MAX_CTAS}")
    if ordinal == CPU:
        raise ArgumentError(f"max_ctas={max_ctas}: a communicator on CPU has no CTAs. Leave it out.")
    return max_ctas
