"""The exceptions users meet. Every message begins with "[dpcomm:CODE]"; `code` is that word.

Knows nothing of torch or the extension: the binding builds its errors with `from_native`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar


class Error(RuntimeError):
    """Base of all errors of dpcomm.

    Args:
        message: The text; the "[dpcomm:CODE] " in front of it is added where it lacks.
        code: Overrides the class's code (CUDA errors are plain `Error`s with code "CUDA").
    """

    default_code: ClassVar[str] = "INTERNAL"

    def __init__(self, message: str = "", *, code: str | None = None) -> None:
        self.code = code or self.default_code
        if not message.startswith("[dpcomm:"):
            message = f"[dpcomm:{self.code}] {message}"
        super().__init__(message)

    def __str__(self) -> str:
        # Spelled out because OSError, a base of two classes below, formats errno and strerror instead.
        return str(self.args[0])

    def __reduce__(self) -> tuple[Callable[..., Error], tuple[Any, ...]]:
        return _rebuild, (type(self), str(self), dict(self.__dict__), getattr(self, "errno", None))


class ArgumentError(Error, ValueError):
    """What was passed cannot work. Raised locally, or on every rank by a collective constructor."""

    default_code = "ARGUMENT"


class UnsupportedError(Error, NotImplementedError):
    """A valid request that this build, engine or codec does not serve."""

    default_code = "UNSUPPORTED"


class MismatchError(Error):
    """The ranks disagree: on a count, dtype, operation, codec or option, or (`verify`) on a tensor's bytes."""

    default_code = "MISMATCH"


class PeerLostError(Error):
    """A rank ended or its connection broke. `rank` is that rank, -1 where it is not known."""

    default_code = "PEER_LOST"

    def __init__(self, message: str = "", *, rank: int = -1) -> None:
        super().__init__(message)
        self.rank = rank


class CommTimeoutError(Error, TimeoutError):
    """A wait ran out of time. `waiting_for` holds the ranks that did not come."""

    default_code = "TIMEOUT"

    def __init__(self, message: str = "", *, waiting_for: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.waiting_for = tuple(waiting_for)


class AbortedError(Error):
    """The communicator was poisoned earlier; the message names the first cause."""

    default_code = "ABORTED"


class SystemResourceError(Error, OSError):
    """The system refused memory, a descriptor or a permission. `errno` says which way."""

    default_code = "RESOURCE"

    def __init__(self, message: str = "", *, errno: int = 0) -> None:
        super().__init__(message)
        self.errno = errno


class P2PUnavailableError(Error):
    """GPU peer-to-peer memory was asked for and does not work here."""

    default_code = "P2P"


class VersionError(Error):
    """Two versions that cannot work together: dpcomm on two ranks, a library, a GPU architecture."""

    default_code = "VERSION"


class ForkError(Error):
    """A communicator was used in a forked child of the process that made it."""

    default_code = "FORK"


class InternalError(Error):
    """An invariant of dpcomm is broken, or a peer sent something malformed."""

    default_code = "INTERNAL"


CLASSES: dict[str, type[Error]] = {
    c.default_code: c
    for c in (
        ArgumentError,
        UnsupportedError,
        MismatchError,
        PeerLostError,
        CommTimeoutError,
        AbortedError,
        SystemResourceError,
        P2PUnavailableError,
        VersionError,
        ForkError,
        InternalError,
    )
}


def from_native(code: str, message: str, rank: int = -1, waiting_for: tuple[int, ...] = (), errno: int = 0) -> Error:
    """Builds the exception that stands for an error of the extension or of another rank.

    Args:
        code: One of the codes, for example "PEER_LOST". An unknown one gives a plain `Error` that carries it.
        message: The text, with or without its "[dpcomm:CODE]".
        rank: For PEER_LOST, the rank that was lost, else ignored.
        waiting_for: For TIMEOUT, the ranks that did not come, else ignored.
        errno: For RESOURCE, the system's error number, else ignored.
    """
    if code == "PEER_LOST":
        return PeerLostError(message, rank=rank)
    if code == "TIMEOUT":
        return CommTimeoutError(message, waiting_for=tuple(waiting_for))
    if code == "RESOURCE":
        return SystemResourceError(message, errno=errno)
    if code in CLASSES:
        return CLASSES[code](message)
    return Error(message, code=code)


def bare_message(error: BaseException) -> str:
    """An error's text without the "[dpcomm:CODE] " in front, for quoting it inside another message."""
    text = str(error) or type(error).__name__
    head, bracket, rest = text.partition("] ")
    return rest if bracket and head.startswith("[dpcomm:") else text


def _rebuild(cls: type[Error], message: str, attributes: dict[str, Any], errno: int | None) -> Error:
    """Unpickles an error: the constructors' keywords differ, the attributes hold what they set."""
    error = cls(message)
    error.__dict__.update(attributes)
    if isinstance(error, OSError):
        error.errno = errno
    return error
