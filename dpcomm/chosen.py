"""The one line that says which engine a communicator has, why, and why not the others. Knows records, no memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dpcomm.records import Hello

MOST_HOSTS = 8  # that a line names

# Why not the others, where nobody named an engine: by what was taken, and whether algorithm "native" was asked for.
OTHERS = {
    ("shm", False): "gloo is for several hosts, torch only where asked for, p2p and nccl need GPUs",
    ("gloo", False): "shm and p2p need one host, nccl GPUs, torch is only where asked for",
    ("gloo", True): "shm and torch have no all-reduce of a library, p2p and nccl need GPUs",
    ("p2p", False): "nccl is for several hosts; shm, gloo and torch are for data on CPU",
    ("nccl", False): "p2p needs one host; shm, gloo and torch are for data on CPU",
    ("nccl", True): "p2p has no all-reduce of a library; shm, gloo and torch are for data on CPU",
}


def line(number: int, hellos: Sequence[Hello], engine: str, why: str, apart: tuple[int, int] | None = None) -> str:
    """What rank 0 logs once a communicator is built.

    Args:
        number: Of the communicator.
        hellos: Of all ranks.
        engine: That serves.
        why: In words, as `describe()` has it.
        apart: Two ranks that share no memory, where that decided.
    """
    asked, algorithm = hellos[0].engine, hellos[0].algorithm
    if apart is not None:
        low, high = (f"rank {rank} on {hellos[rank].hostname}" for rank in sorted(apart))
        why = f"no shared memory between {low} and {high}"
    others = "no other was considered"
    if asked == "auto":
        others = OTHERS.get((engine, algorithm == "native"), "see docs/design.md for the others")
    return f"communicator #{number} of {len(hellos)} ranks: engine {engine} {_places(hellos)}: {why}; {others}"


def _places(hellos: Sequence[Hello]) -> str:
    """Which ranks say that they are where."""
    places: dict[tuple[str, str, int], list[int]] = {}
    for hello in hellos:
        places.setdefault((hello.hostname, hello.boot_id, hello.net_namespace), []).append(hello.rank)
    names = [name for name, _, _ in places]
    if len(names) == 1:
        return f"on {names[0]}"
    texts = []
    for (name, _, namespace), ranks in places.items():
        place = name if names.count(name) == 1 else f"{name} in network namespace {namespace}"
        texts.append(f"{place}: rank{'s' * (len(ranks) > 1)} {spans(ranks)}")
    if len(texts) > MOST_HOSTS:
        texts[MOST_HOSTS:] = [f"and {len(texts) - MOST_HOSTS} more"]
    return f"between {len(places)} hosts ({'; '.join(texts)})"


def spans(numbers: Iterable[int]) -> str:
    """Ascending numbers in short: [0, 1, 4, 5, 6] is "0 1 4-6"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return " ".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else " ".join(map(str, run)) for run in runs)
