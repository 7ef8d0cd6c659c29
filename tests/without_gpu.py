"""Runs a benchmark as a user does, on a machine that has no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run_without_gpu(script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """CUDA_VISIBLE_DEVICES hides the devices of a machine that has some."""
    return subprocess.run(
        [sys.executable, str(script), *arguments],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
