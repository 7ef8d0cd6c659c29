"""dpcomm: the all-reduce of data-parallel training, fast where the link is the limit and trustworthy everywhere.

Importing it starts nothing; a communicator is made by the first call that needs one.
"""

from dpcomm._native import version as __version__
from dpcomm.communicator import Communicator
from dpcomm.consistency import verify
from dpcomm.ddp import HookState, allreduce_hook, recover, register_ddp_hook
from dpcomm.default import allreduce
from dpcomm.errors import (
    AbortedError,
    ArgumentError,
    CommTimeoutError,
    Error,
    ForkError,
    InternalError,
    MismatchError,
    P2PUnavailableError,
    PeerLostError,
    SystemResourceError,
    UnsupportedError,
    VersionError,
)
from dpcomm.info import info
from dpcomm.local import allreduce_local, init_local
from dpcomm.work import Work

__all__ = [
    "AbortedError",
    "ArgumentError",
    "CommTimeoutError",
    "Communicator",
    "Error",
    "ForkError",
    "HookState",
    "InternalError",
    "MismatchError",
    "P2PUnavailableError",
    "PeerLostError",
    "SystemResourceError",
    "UnsupportedError",
    "VersionError",
    "Work",
    "__version__",
    "allreduce",
    "allreduce_hook",
    "allreduce_local",
    "info",
    "init_local",
    "recover",
    "register_ddp_hook",
    "verify",
]
