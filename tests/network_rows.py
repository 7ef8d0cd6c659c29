"""Rows as benchmarks/network.py writes them, with made-up numbers; and its modules, which are no package."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
import hosts
import network
import network_picture as picture
import network_plan as plans
import network_report as report
import network_train_report as train_report
from analysis import label

__all__ = ["hosts", "label", "network", "picture", "plans", "report", "train_report"]

SCRIPT = Path(network.__file__)
KIB, MIB = 1 << 10, 1 << 20
ENVIRONMENT = {"cpu": "abacus", "cores": 2, "caches": {}, "kernel": "k", "torch": "t", "commit": "c0ffee"}
ENVIRONMENT |= {"date": "today", "load_average": 0.5}


def row(size: int, gbit: float | None, name: str, time_ms: float, ratio: float, **changed: Any) -> dict[str, Any]:
    """A row without ranks_per_host, as older files have them: one rank a host."""
    contender, _, variant = name.partition(" ")
    sent = size * (0.5 if variant.startswith("fp16") else 1.0)
    made = {"hosts": 2, "gbit": gbit, "contender": contender, "variant": variant, "size_bytes": size, "rounds": 3}
    made |= {"calls": 9, "median_ms": time_ms, "p95_ms": 2 * time_ms, "ratio": ratio, "ratio_least": ratio - 0.1}
    made |= {"ratio_most": ratio + 0.1, "sent_bytes": sent, "counted_bytes": 1.05 * sent, "wrong": 0, "error": 0.0}
    made |= {"line_share": plans.line_share(sent, time_ms / 1e3, gbit)}
    return made | changed


def good_rows(size: int = 25 * MIB) -> list[dict[str, Any]]:
    """Each contestant at 96 % of the line at 1 Gb/s, and unshaped; every goal is reached."""
    shaped_ms = 1e3 * plans.line_s(size, 1.0) / 0.96
    rows = [row(size, 1.0, "gloo", shaped_ms, 1.0), row(size, 1.0, "dpcomm none/auto", shaped_ms, 1.0)]
    rows.append(row(size, 1.0, "dpcomm fp16/auto", shaped_ms / 2, 2.0))
    rows += [row(size, None, "gloo", 30.0, 1.0), row(size, None, "dpcomm none/auto", 29.0, 1.03)]
    return [*rows, row(size, None, "dpcomm fp16/auto", 20.0, 1.5)]


def several_rows(hosts: int, size: int = 25 * MIB) -> list[dict[str, Any]]:
    """Two ranks on each host at 1 Gb/s; both goals of two levels are reached."""
    shape = {"hosts": hosts, "ranks_per_host": 2}
    ring, halves = plans.sent_plainly(size, 2 * hosts), plans.sent_plainly(size, hosts)
    gloo_ms = 1e3 * plans.line_s(ring, 1.0) / 0.96
    contestants = [("gloo", 1.0, ring, ""), ("dpcomm none/auto", 1.45, halves, "two_level")]
    contestants += [("dpcomm fp16/auto", 2.9, halves / 2, "two_level"), ("flat none/auto", 1.0, ring, "gloo")]
    contestants.append(("flat fp16/auto", 1.5, 2 * (hosts - 1) / hosts * size, "gloo"))
    return [
        row(size, 1.0, name, gloo_ms / ratio, ratio, sent_bytes=sent, counted_bytes=1.05 * sent, engine=engine, **shape)
        for name, ratio, sent, engine in contestants
    ]


def document(rows: list[dict[str, Any]], skipped: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    return {"benchmark": "network", "environment": ENVIRONMENT, "rows": rows, "skipped": skipped or []}


def trained(seed: int, name: str, step_ms: float, loss: float, **changed: Any) -> dict[str, Any]:
    made = {"seed": seed, "contestant": name, "step_ms": step_ms, "step_p95_ms": step_ms, "compute_ms": 60.0}
    made |= {"alone_ms": 250.0, "final_loss": loss, "replicas_identical": True, "speedup": 300.0 / step_ms}
    return made | changed


def good_training() -> list[dict[str, Any]]:
    """Final losses of the seeds vary by 0.02, those of the codecs by less."""
    rows = []
    for seed, loss in enumerate((2.30, 2.32, 2.34)):
        rows += [trained(seed, train_report.STOCK, 300.0, loss), trained(seed, train_report.NONE, 290.0, loss)]
        rows.append(trained(seed, train_report.FP16, 170.0, loss + 1e-4))
    return rows


def train_document(rows: list[dict[str, Any]]) -> dict[str, Any]:
    settings = plans.TrainPlan(seeds=3)._asdict()
    made = {"benchmark": "train-network", "ranks": 2, "environment": ENVIRONMENT, "settings": settings}
    return made | {"rows": rows}
