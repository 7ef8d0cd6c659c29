"""What needs a GPU, in one go: builds the extension, runs the tests marked gpu, times the loopback, writes a JSON.

Exit status: 0, 1 where a test failed or none ran, 2 where there is no GPU. Nothing is imported or built before that is
known.
"""

import ctypes
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TESTS_DEADLINE_S = 1800
RANKS = (2, 4, 8)
SIZES = tuple(mib << 20 for mib in (1, 4, 16, 64))
CODECS = ("none", "fp16")
CALLS = 20  # in one timing, after WARMUP untimed ones
WARMUP = 3
HEADS = (("ranks", 5), ("size(B)", 9), ("codec", 5), ("time(us)", 10), ("algbw(GB/s)", 11), ("busbw(GB/s)", 11))


@dataclass(frozen=True)
class Gpu:
    """The first device, as the driver names it; `reason` says why there is none."""

    reason: str = ""
    name: str = ""
    driver: str = ""  # of the kernel module, "580.95.05"
    driver_cuda: str = ""  # the newest CUDA that this driver serves, "13.0"


@dataclass(frozen=True)
class Outcome:
    """What became of the tests marked gpu."""

    passed: int
    failed: int
    skipped: int

    @property
    def ok(self) -> bool:
        return self.passed > 0 and self.failed == 0

    def __str__(self) -> str:
        return f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"


@dataclass(frozen=True)
class Row:
    """One timing. Bandwidths in 10^9 bytes per second, of unencoded bytes; bus bandwidth as nccl-tests defines it."""

    nranks: int
    size_bytes: int
    codec: str
    time_us: float
    algbw_gb_s: float
    busbw_gb_s: float


def find_gpu() -> Gpu:
    """Asks the driver's library: neither torch nor the extension need be there yet."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return Gpu(reason=str(error))
    count, version, device = ctypes.c_int(0), ctypes.c_int(0), ctypes.c_int(0)
    name = ctypes.create_string_buffer(128)
    status = (
        driver.cuInit(0)
        or driver.cuDeviceGetCount(ctypes.byref(count))
        or driver.cuDriverGetVersion(ctypes.byref(version))
    )
    if status or count.value == 0:
        return Gpu(reason=f"the CUDA driver answers error {status}" if status else "the CUDA driver finds no device")
    if driver.cuDeviceGet(ctypes.byref(device), 0) or driver.cuDeviceGetName(name, len(name), device):
        return Gpu(reason="the CUDA driver does not name its first device")
    module = Path("/proc/driver/nvidia/version")
    found = re.search(r"\d+\.\d+(?:\.\d+)?", module.read_text()) if module.exists() else None
    cuda = f"{version.value // 1000}.{version.value % 1000 // 10}"
    return Gpu("", name.value.decode(), found.group() if found else "", cuda)


def build() -> None:
    """Makes sure that this Python's dpcomm has its CUDA half; builds it in place where it lacks.

    Raises:
        SystemExit: It has none after the build either.
    """
    question = [sys.executable, "-c", "from dpcomm import _native; assert _native.cuda_built"]
    if subprocess.run(question, cwd=ROOT, stderr=subprocess.DEVNULL, check=False).returncode == 0:
        return
    install = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-e", "."]
    subprocess.run(install, cwd=ROOT, env={**os.environ, "DPCOMM_CUDA": "ON"}, check=True)
    if subprocess.run(question, cwd=ROOT, check=False).returncode != 0:
        raise SystemExit("gpu-check: dpcomm was built, but its extension cannot be imported or has no CUDA half.")


def run_tests() -> Outcome:
    """The tests marked gpu, in a process of their own; their output goes to the terminal."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", f"--junitxml={report}"]
        status = subprocess.run(command, cwd=ROOT, timeout=TESTS_DEADLINE_S, check=False).returncode
        outcome = read_report(report) if report.exists() else Outcome(0, 0, 0)
    # pytest may fail without a failed test: a crash, a broken collection.
    return outcome if status == 0 or outcome.failed else Outcome(outcome.passed, outcome.failed + 1, outcome.skipped)


def read_report(report: Path) -> Outcome:
    """The sums over all suites of a JUnit file."""
    suites = list(ET.parse(report).getroot().iter("testsuite"))
    tests, failed, errors, skipped = (
        sum(int(suite.get(kind, "0")) for suite in suites) for kind in ("tests", "failures", "errors", "skipped")
    )
    return Outcome(tests - failed - errors - skipped, failed + errors, skipped)


def time_loopback(nranks: int, size_bytes: int, codec: str) -> Row:
    """Means of unit Gaussians between virtual ranks; afterwards all must hold the same bytes."""
    import torch

    from dpcomm import _native

    count = size_bytes // 4
    generator = torch.Generator("cuda").manual_seed(nranks)
    xs = [torch.randn(count, device="cuda", generator=generator) for _ in range(nranks)]
    call = _native.LoopbackCall()
    call.addresses, call.counts = [[x.data_ptr()] for x in xs], [count]
    call.dtype, call.op = _native.DTYPES["float32"], _native.OPS["mean"]
    call.codec, call.algorithm = _native.CODECS[codec], _native.ALGORITHMS["direct"]
    call.slots = 8
    call.calls = WARMUP
    _native.loopback_allreduce(call)
    call.calls = CALLS
    time_us, _ = _native.loopback_allreduce(call)
    if not all(torch.equal(x.view(torch.int32), xs[0].view(torch.int32)) for x in xs):
        raise SystemExit(f"gpu-check: replicas differ after {codec}, {nranks} ranks, {size_bytes} bytes.")
    algbw = size_bytes / time_us / 1e3
    return Row(nranks, size_bytes, codec, time_us, algbw, algbw * 2 * (nranks - 1) / nranks)


def time_all() -> list[Row]:
    import torch

    if not torch.cuda.is_available():
        print("# no timings: this torch has no CUDA")
        return []
    print(" ".join(f"{head:>{width}}" for head, width in HEADS))
    rows = []
    for nranks in RANKS:
        for codec in CODECS:
            for size_bytes in SIZES:
                rows.append(time_loopback(nranks, size_bytes, codec))
                print(format_row(rows[-1]), flush=True)
    return rows


def format_row(row: Row) -> str:
    cells = (
        str(row.nranks),
        str(row.size_bytes),
        row.codec,
        f"{row.time_us:.1f}",
        f"{row.algbw_gb_s:.2f}",
        f"{row.busbw_gb_s:.2f}",
    )
    return " ".join(f"{cell:>{width}}" for cell, (_, width) in zip(cells, HEADS, strict=True))


def describe(gpu: Gpu) -> dict[str, Any]:
    """Where this was measured; fit for json.dump."""
    import torch
    from environment import describe_environment

    from dpcomm import _native

    nccl = torch.cuda.nccl.version() if torch.cuda.is_available() else ()  # type: ignore[no-untyped-call]
    return {
        **describe_environment(),
        "gpu": gpu.name,
        "driver": gpu.driver,
        "driver_cuda": gpu.driver_cuda,
        "cuda": _native.cuda_version,
        "torch_cuda": torch.version.cuda or "",
        "nccl": ".".join(map(str, nccl)),
    }


def write(gpu: Gpu, outcome: Outcome, rows: list[Row]) -> Path:
    RESULTS.mkdir(parents=True, exist_ok=True)
    day = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    path = RESULTS / f"gpu-check-{re.sub(r'[^A-Za-z0-9]+', '-', gpu.name)}-{day}.json"
    report = {"environment": describe(gpu), "tests": asdict(outcome), "loopback": [asdict(row) for row in rows]}
    path.write_text(json.dumps(report, indent=2) + "\n")
    return path


def main() -> int:
    gpu = find_gpu()
    if gpu.reason:
        print(f"gpu-check: there is no NVIDIA GPU to check on here ({gpu.reason}).", file=sys.stderr)
        return 2
    print(f"# {gpu.name}, driver {gpu.driver}", flush=True)
    build()
    outcome = run_tests()
    print(f"# tests marked gpu: {outcome}")
    if outcome.passed == 0:
        print("# none ran: see the reasons above (a torch with CUDA, or CuPy, is needed)")
    rows = time_all() if outcome.ok else []
    print(f"wrote {write(gpu, outcome, rows).relative_to(ROOT)}")
    return 0 if outcome.ok else 1


if __name__ == "__main__":
    sys.exit(main())
