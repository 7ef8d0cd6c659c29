"""What `python -m dpcomm plan` is held against: measured rows of benchmarks/results, each with its prediction.

Hosts of network.json are ranks that share the processors of one machine, and so are the ranks of the others.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from measure import percentile
from network_plan import FLAT, shape_of

from dpcomm.plan import counts
from dpcomm.plan.constants import SHM
from dpcomm.plan.counts import MIB, Load, Place
from dpcomm.plan.cpu import Gloo, Shm, gloo_us, shm_us, two_level_us

RESULTS = Path(__file__).resolve().parent / "results"
HOOK = "fp16_compress_hook"  # casts, gloo's own all-reduce of half the bytes, casts back
WISHED = 0.15  # of the measured time


class Measured(NamedTuple):
    """One row of a results file."""

    file: str
    name: str  # contestant
    place: Place
    load: Load
    algorithm: str
    us: float

    @property
    def large(self) -> bool:
        return self.load.plain >= 4 * MIB

    @property
    def shaped(self) -> bool:
        return self.place.network is not None


def between_hosts(folder: Path = RESULTS) -> list[Measured]:
    """The rows of network.json (of float32) that have a prediction: gloo, the hook, dpcomm's auto, and with several
    ranks a host also engine gloo between all of them.

    Raises:
        ValueError: There are none.
    """
    found = _rows_between(folder)
    if not found:
        raise ValueError(f"no measurements between hosts in {folder}")
    return found


def _rows_between(folder: Path) -> list[Measured]:
    found = []
    for file in sorted(folder.glob("network*.json")):
        document = json.loads(file.read_text())
        if document.get("benchmark") == "network":
            cores = document["environment"]["cores"]
            found += [row for each in document["rows"] if (row := _between(file.name, each, cores))]
    return found


def _between(file: str, row: dict[str, Any], cores: int) -> Measured | None:
    hosts, each = shape_of(row)
    n, gbit = hosts * each, row["gbit"]
    codec, _, algorithm = row["variant"].partition("/")
    if row["contender"] not in ("gloo", HOOK, "dpcomm", FLAT):
        return None
    if row["contender"] in ("gloo", HOOK):
        codec, algorithm = ("fp16" if row["contender"] == HOOK else "none"), "native"
    load = Load(row["size_bytes"] // 4, "float32", codec)
    place = Place(hosts, each, gbit and gbit * 1e9 / 8, cores / hosts)
    name = f"{row['contender']} {row['variant']}".strip()
    if algorithm == "auto" and each > 1 and row["contender"] == "dpcomm":
        algorithm = "two_level"
    chosen = counts.auto(load, n, network=True) if algorithm == "auto" else algorithm
    if chosen not in ("direct", "oneshot", "ring", "native", "two_level"):
        return None
    return Measured(file, name, place, load, chosen, 1e3 * row["median_ms"])


def within_a_host(pattern: str, folder: Path = RESULTS) -> list[Measured]:
    """dpcomm's rows of python-*.json, rivals-*.json or allreduce-*.json, in calls one behind the other on the same
    memory.

    Raises:
        ValueError: There are none.
    """
    found = []
    for file in sorted(folder.glob(pattern)):
        document = json.loads(file.read_text())
        n, cores = document["ranks"], document["environment"]["cores"]
        for row in document["rows"]:
            if row.get("contender", "dpcomm") != "dpcomm" or row.get("cache", "hot") != "hot":
                continue
            codec, _, algorithm = row.get("variant", f"{row.get('codec')}/auto").partition("/")
            load = Load(row["size_bytes"] // 4, "float32", codec)
            chosen = counts.auto(load, n, network=False) if algorithm == "auto" else algorithm
            name = f"shm {codec}/{algorithm}"
            found.append(Measured(file.name, name, Place(1, n, None, cores), load, chosen, row["median_us"]))
    if not found:
        raise ValueError(f"no measurements in {folder / pattern}")
    return found


def predicted_us(row: Measured, fitted: Gloo | Shm, within: Shm = SHM) -> float:
    """What the model says of a row; the kind of constants says which model. `within`: of engine shm, in two levels."""
    if isinstance(fitted, Shm):
        return shm_us(row.place, row.load, row.algorithm, fitted)
    if row.algorithm == "two_level":
        return two_level_us(row.place, row.load, fitted, within)
    return gloo_us(row.place, row.load, row.algorithm, fitted)


def off(row: Measured, fitted: Gloo | Shm) -> float:
    """Predicted over measured, less 1."""
    return predicted_us(row, fitted) / row.us - 1


class Errors(NamedTuple):
    """How far off the predictions of some rows are; shares of what was measured."""

    rows: int
    median: float
    most_of: float  # nine tenths are within this
    largest: float
    beyond: int  # rows that are further off than WISHED


def errors(rows: Sequence[Measured], fitted: Gloo | Shm) -> Errors:
    """Of these rows.

    Raises:
        ValueError: There are none.
    """
    if not rows:
        raise ValueError("no rows to compare with")
    sizes = sorted(abs(off(row, fitted)) for row in rows)
    beyond = sum(size > WISHED for size in sizes)
    return Errors(len(sizes), percentile(sizes, 50), percentile(sizes, 90), sizes[-1], beyond)


def misfit(rows: Sequence[Measured], fitted: Gloo | Shm, within: Shm = SHM) -> float:
    """What a fit makes least. Between hosts the cubes of the logarithms, since a bound on each row is wanted;
    shaped rows count twice, and so do large ones. Within one host, where single rows differ by half from run to
    run, a power below 2, and rows with a processor a rank four times."""
    total = 0.0
    for row in rows:
        size = abs(math.log(predicted_us(row, fitted, within) / row.us))
        if isinstance(fitted, Shm):
            total += (4 if row.place.crowded == 1 else 1) * min(size, 1.0) ** 1.5
        else:
            total += (2 if row.shaped else 1) * (2 if row.large else 1) * size**3
    return total
