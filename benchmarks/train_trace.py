"""Chrome traces of training steps: when each bucket was on its way, and what backward did meanwhile.

The profiler records gloo's all-reduces on gloo's threads, and dpcomm's on the thread that started them (from the hook
to the completed future, the wait for earlier buckets included). Viewers expect the spans of a thread to be nested, so
dpcomm's get a track for each bucket. Open a trace in chrome://tracing or https://ui.perfetto.dev.
"""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile
from train_models import Contestant

TRACED_STEPS = 2
BUCKET = re.compile(r"dpcomm::allreduce bucket (\d+) ")
GLOO = "gloo:all_reduce"
FIRST_TRACK = 1 << 30  # beyond any thread's number
Interval = tuple[float, float]


class Overlap(NamedTuple):
    """Milliseconds of a trace."""

    communication_ms: float  # in which some bucket was on its way
    beside_backward_ms: float  # of these, in which backward computed

    def __str__(self) -> str:
        share = self.beside_backward_ms / self.communication_ms if self.communication_ms else 0.0
        return f"{share:.0%} of {self.communication_ms:.1f} ms of communication beside backward's arithmetic"


def trace(contestant: Contestant, file: Path) -> Overlap | None:
    """Takes TRACED_STEPS more steps; rank 0 records them and returns what it saw. Collective."""
    contestant.step()
    if dist.get_rank() != 0:
        for _ in range(TRACED_STEPS):
            contestant.step()
        return None
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(TRACED_STEPS):
            contestant.step()
    file.parent.mkdir(parents=True, exist_ok=True)
    recorded.export_chrome_trace(str(file))
    document = json.loads(file.read_text())
    give_buckets_tracks(document["traceEvents"])
    file.write_text(json.dumps(document))
    return overlap(document["traceEvents"])


def give_buckets_tracks(events: list[dict[str, Any]]) -> None:
    """Moves each of dpcomm's spans to a track of its bucket, named and below the threads."""
    tracks: dict[int, dict[str, Any]] = {}
    for event in events:
        if found := BUCKET.match(event.get("name", "")):
            bucket = int(found[1])
            event["tid"] = FIRST_TRACK + bucket
            tracks[bucket] = event
    for bucket, event in sorted(tracks.items()):
        track = {"ph": "M", "ts": event["ts"], "pid": event["pid"], "tid": event["tid"]}
        events.append({**track, "name": "thread_name", "args": {"name": f"dpcomm bucket {bucket}"}})
        events.append({**track, "name": "thread_sort_index", "args": {"sort_index": event["tid"]}})


def overlap(events: list[dict[str, Any]]) -> Overlap:
    """How much of the communication lies beside backward's arithmetic."""
    communication = union([span(e) for e in events if is_communication(e)])
    backward = union([span(e) for e in events if is_backward_arithmetic(e)])
    beside = sum(max(0.0, min(b, d) - max(a, c)) for a, b in communication for c, d in backward)
    return Overlap(sum(end - begin for begin, end in communication) / 1e3, beside / 1e3)


def is_communication(event: dict[str, Any]) -> bool:
    name = event.get("name", "")
    return event.get("ph") == "X" and (name == GLOO or BUCKET.match(name) is not None)


def is_backward_arithmetic(event: dict[str, Any]) -> bool:
    """A node of the backward graph; not AccumulateGrad, in which DDP copies gradients and calls hooks."""
    name = event.get("name", "")
    node = name.startswith("autograd::engine::evaluate_function: ")
    return event.get("ph") == "X" and node and "AccumulateGrad" not in name


def span(event: dict[str, Any]) -> Interval:
    """Begin and end in us."""
    return event["ts"], event["ts"] + event["dur"]


def union(intervals: list[Interval]) -> list[Interval]:
    """The same points of time in disjoint intervals, in order."""
    disjoint: list[Interval] = []
    for begin, end in sorted(intervals):
        if disjoint and begin <= disjoint[-1][1]:
            disjoint[-1] = (disjoint[-1][0], max(end, disjoint[-1][1]))
        else:
            disjoint.append((begin, end))
    return disjoint
