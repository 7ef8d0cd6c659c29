"""What an environment lets a program do with its GPU, asked before anything is built or blamed.

Each probe is a process of its own with a deadline (`python benchmarks/gpu_probe.py NAME` prints a line of JSON), since
a driver that refuses may also hang or crash. They speak to the driver: neither torch nor dpcomm need be there.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_steps import Done, last_line

PYTHON = (sys.executable, str(Path(__file__).resolve()))
CUDA_TOOLS = "/usr/local/cuda/bin"
SANITIZER_STATUS = 86  # what compute-sanitizer exits with where it has found something
CHILD_S = 20.0
BYTES = 2 << 20
COMPUTE_MODES = {0: "default", 2: "prohibited", 3: "exclusive process"}
COMPUTE_MODE, COOPERATIVE_LAUNCH = 20, 95  # CUdevice_attribute
PTX = b"""
.version 7.0
.target sm_80
.address_size 64
.visible .entry nothing() { ret; }
.visible .entry overrun() {
  .reg .u64 %a;
  .reg .u32 %v;
  mov.u64 %a, 16;
  mov.u32 %v, 1;
  st.global.u32 [%a], %v;
  ret;
}
"""


class Refused(Exception):
    """The environment does not allow it; the text says what answered so."""


@dataclass(frozen=True)
class Probe:
    """The answer to one question."""

    name: str
    what: str
    allowed: bool
    reason: str
    seconds: float


class IpcHandle(ctypes.Structure):
    """CUipcMemHandle, which travels by value."""

    _fields_ = (("reserved", ctypes.c_ubyte * 64),)


class Driver:
    """The first device's primary context, through libcuda."""

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise Refused(str(error)) from None
        self.device, context = ctypes.c_int(0), ctypes.c_void_p()
        self("cuInit", ctypes.c_uint(0))
        self("cuDeviceGet", ctypes.byref(self.device), ctypes.c_int(0))
        self("cuDevicePrimaryCtxRetain", ctypes.byref(context), self.device)
        self("cuCtxSetCurrent", context)

    def __call__(self, function: str, *arguments: Any) -> None:
        """Calls a function of the driver.

        Raises:
            Refused: It returns an error.
        """
        status = getattr(self._library, function)(*arguments)
        if status:
            name = ctypes.c_char_p()
            self._library.cuGetErrorName(ctypes.c_int(status), ctypes.byref(name))
            raise Refused(f"{function} answers {(name.value or b'an unknown error').decode()} ({status})")

    def attribute(self, which: int) -> int:
        value = ctypes.c_int(0)
        self("cuDeviceGetAttribute", ctypes.byref(value), ctypes.c_int(which), self.device)
        return value.value

    def allocate(self, size: int) -> ctypes.c_uint64:
        address = ctypes.c_uint64(0)
        self("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
        return address

    def launch(self, kernel: bytes) -> None:
        """One cooperative launch of a kernel of PTX, and its end."""
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self("cuModuleLoadData", ctypes.byref(module), ctypes.c_char_p(PTX))
        self("cuModuleGetFunction", ctypes.byref(function), module, ctypes.c_char_p(kernel))
        sizes = [ctypes.c_uint(n) for n in (2, 1, 1, 32, 1, 1, 0)]
        self("cuLaunchCooperativeKernel", function, *sizes, ctypes.c_void_p(), ctypes.c_void_p())
        self("cuCtxSynchronize")


# --- inside a probe's process; each returns a remark or raises Refused ------------------------------------------------


def probe_ipc() -> str:
    """This process exports memory, a child writes into it."""
    driver, handle = Driver(), IpcHandle()
    address = driver.allocate(BYTES)
    driver("cuMemsetD8_v2", address, ctypes.c_ubyte(0), ctypes.c_size_t(BYTES))
    driver("cuIpcGetMemHandle", ctypes.byref(handle), address)
    child = [*PYTHON, "ipc-child", bytes(handle.reserved).hex()]
    done = subprocess.run(child, capture_output=True, text=True, timeout=CHILD_S, check=False)
    answer = read_answer(done.stdout)
    if not answer["allowed"]:
        raise Refused(f"in the second process: {answer['reason']}")
    seen = (ctypes.c_ubyte * BYTES)()
    driver("cuMemcpyDtoH_v2", seen, address, ctypes.c_size_t(BYTES))
    if bytes(seen) != b"\x5a" * BYTES:
        raise Refused("what the second process wrote does not arrive")
    return ""


def probe_ipc_child() -> str:
    driver, handle, address = Driver(), IpcHandle(), ctypes.c_uint64(0)
    ctypes.memmove(ctypes.byref(handle), bytes.fromhex(sys.argv[2]), ctypes.sizeof(handle))
    driver("cuIpcOpenMemHandle_v2", ctypes.byref(address), handle, ctypes.c_uint(1))  # lazy peer access
    driver("cuMemsetD8_v2", address, ctypes.c_ubyte(0x5A), ctypes.c_size_t(BYTES))
    driver("cuCtxSynchronize")
    driver("cuIpcCloseMemHandle", address)
    return ""


def probe_cooperative() -> str:
    driver = Driver()
    if not driver.attribute(COOPERATIVE_LAUNCH):
        raise Refused("the device has no cooperative launch")
    driver.launch(b"nothing")
    return ""


def probe_overrun() -> str:
    """A planted fault, for tools that must find it."""
    Driver().launch(b"overrun")
    return ""


def probe_memfd() -> str:
    """Shared memory without a name, mapped here and seen by the device: the page that ranks watch each other in."""
    driver = Driver()
    file = os.memfd_create("dpcomm-probe")
    os.ftruncate(file, BYTES)
    memory = mmap.mmap(file, BYTES)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    seen = ctypes.c_uint64(0)
    driver("cuMemHostRegister_v2", ctypes.c_void_p(start), ctypes.c_size_t(BYTES), ctypes.c_uint(3))  # portable, mapped
    driver("cuMemHostGetDevicePointer_v2", ctypes.byref(seen), ctypes.c_void_p(start), ctypes.c_uint(0))
    driver("cuMemsetD8_v2", seen, ctypes.c_ubyte(0x5A), ctypes.c_size_t(BYTES))
    driver("cuCtxSynchronize")
    if memory[:] != b"\x5a" * BYTES:
        raise Refused("what the device wrote does not arrive")
    return ""


def probe_mode() -> str:
    """Whether several processes may use the device at once, and whether MPS serves them."""
    mode = Driver().attribute(COMPUTE_MODE)
    pipes = Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps"))
    served = "MPS runs" if (pipes / "control").exists() else "no MPS"
    if mode:
        raise Refused(f"compute mode {COMPUTE_MODES.get(mode, mode)}, {served}")
    return f"compute mode default, {served}"


def probe_sanitizer() -> str:
    """memcheck passes a kernel that does nothing and finds a write that goes astray."""
    tool = [find_tool("compute-sanitizer"), "--tool", "memcheck", "--error-exitcode", str(SANITIZER_STATUS), *PYTHON]
    clean = _run_tool([*tool, "cooperative"])
    if clean.returncode != 0:
        raise Refused(f"status {clean.returncode} for a program without fault: {last_line(clean.stdout)}")
    planted = _run_tool([*tool, "overrun"])
    if planted.returncode != SANITIZER_STATUS:
        raise Refused(f"status {planted.returncode} for a planted fault: {last_line(planted.stdout)}")
    return ""


def probe_counters() -> str:
    """ncu reads a performance counter. Clocks are left alone."""
    tool = [find_tool("ncu"), "--clock-control", "none", "--metrics", "sm__cycles_elapsed.max", *PYTHON]
    done = _run_tool([*tool, "cooperative"])
    bad = [line for line in done.stdout.splitlines() if "ERR_NVGPUCTRPERM" in line or "==ERROR==" in line]
    if bad or done.returncode != 0:
        raise Refused(bad[0] if bad else f"status {done.returncode}: {last_line(done.stdout)}")
    if "sm__cycles_elapsed.max" not in done.stdout:
        raise Refused("ncu saw no kernel")
    return ""


def find_tool(name: str) -> str:
    """The path of a tool of the CUDA toolkit."""
    found = shutil.which(name) or shutil.which(name, path=CUDA_TOOLS)
    if found is None:
        raise Refused(f"{name} is not installed")
    return found


def _run_tool(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=CHILD_S, check=False
    )


# What is asked: name -> (in words, seconds it may take).
PROBES = {
    "mode": ("several processes on one GPU", 15.0),
    "ipc": ("CUDA IPC between two processes", 30.0),
    "cooperative": ("cooperative launch", 15.0),
    "memfd": ("host registration of a memfd", 15.0),
    "sanitizer": ("compute-sanitizer memcheck", 45.0),
    "counters": ("performance counters (ncu)", 25.0),
}
INSIDE: dict[str, Callable[[], str]] = {
    "mode": probe_mode,
    "ipc": probe_ipc,
    "ipc-child": probe_ipc_child,
    "cooperative": probe_cooperative,
    "overrun": probe_overrun,
    "memfd": probe_memfd,
    "sanitizer": probe_sanitizer,
    "counters": probe_counters,
}


# --- outside ---------------------------------------------------------------------------------------------------------


def probe_all(call: Callable[[Sequence[str], float], Done], left_s: Callable[[], float]) -> list[Probe]:
    """Asks all questions in turn. `call` runs a command with a deadline; left_s() is the time that is left in all."""
    probes = []
    for name, (what, limit_s) in PROBES.items():
        seconds = min(limit_s, left_s())
        done = call([*PYTHON, name], seconds) if seconds > 0 else Done(None, 0.0, "")
        answer = (
            {"allowed": False, "reason": f"no answer within {seconds:.0f} s"}
            if done.status is None
            else read_answer(done.output, done.status)
        )
        probes.append(Probe(name, what, bool(answer["allowed"]), str(answer["reason"]), done.seconds))
    return probes


def read_answer(output: str, status: int = 0) -> dict[str, Any]:
    """The line of JSON that a probe ends with; a process that died without one is a refusal too."""
    for line in reversed(output.splitlines()):
        if line.startswith('{"allowed"'):
            answer: dict[str, Any] = json.loads(line)
            return answer
    return {"allowed": False, "reason": f"the probe ended with status {status}: {last_line(output)}"}


def main() -> int:
    try:
        answer = {"allowed": True, "reason": INSIDE[sys.argv[1]]()}
    except Refused as refusal:
        answer = {"allowed": False, "reason": str(refusal)}
    except subprocess.TimeoutExpired as error:
        answer = {"allowed": False, "reason": f"{Path(error.cmd[0]).name} did not end within {error.timeout:.0f} s"}
    print(json.dumps(answer), flush=True)
    return 0 if answer["allowed"] else 1


if __name__ == "__main__":
    sys.exit(main())
