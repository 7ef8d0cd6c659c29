"""The one line that says which engine a communicator has, why, and why not the others. Knows records, no memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dpcomm.records import Hello, hosts_as_said

MOST_HOSTS = 8  # that a line names

# Why not the others, where nobody named an engine: by what was taken, and the algorithm that was asked for if only some
# engines have it.
HERE = "shm and p2p need one host"
ONE_EACH = "gloo is for hosts with one rank each"
OTHERS = {
    ("shm", ""): "gloo and two_level are for several hosts, torch only where asked for, p2p and nccl need GPUs",
    ("two_level", ""): f"{HERE}, {ONE_EACH}, nccl needs GPUs, torch is only where asked for",
    ("two_level", "two_level"): "no other has it",
    ("gloo", ""): f"{HERE}, two_level ranks that share one, nccl GPUs, torch is only where asked for",
    ("gloo", "native"): "shm and torch have no all-reduce of a library, two_level has gloo's, p2p and nccl need GPUs",
    ("p2p", ""): "nccl is for several hosts; shm, gloo, two_level and torch are for data on CPU",
    ("nccl", ""): "p2p needs one host; shm, gloo, two_level and torch are for data on CPU",
    ("nccl", "two_level"): "engine two_level is for data on CPU, no other has it",
    ("nccl", "native"): "p2p has no all-reduce of a library; shm, gloo, two_level and torch are for data on CPU",
}
OF_SOME_ENGINES = ("native", "two_level")


def line(
    number: int,
    hellos: Sequence[Hello],
    engine: str,
    why: str,
    apart: tuple[int, int] | None = None,
    hosts: Sequence[Sequence[int]] = (),
) -> str:
    """What rank 0 logs once a communicator is built.

    Args:
        number: Of the communicator.
        hellos: Of all ranks.
        engine: That serves.
        why: In words, as `describe()` has it.
        apart: Two ranks that share no memory, where that decided.
        hosts: The ranks of each, where that was proven; else a host is what has a name, a boot and a network namespace.
    """
    asked, algorithm = hellos[0].engine, hellos[0].algorithm
    if apart is not None:
        low, high = (f"rank {rank} on {hellos[rank].hostname}" for rank in sorted(apart))
        why = f"no shared memory between {low} and {high}"
    others = "no other was considered"
    if asked == "auto":
        others = OTHERS[engine, algorithm if algorithm in OF_SOME_ENGINES else ""]
    return f"communicator #{number} of {len(hellos)} ranks: engine {engine} {_places(hellos, hosts)}: {why}; {others}"


def _places(hellos: Sequence[Hello], hosts: Sequence[Sequence[int]]) -> str:
    """Which ranks are where; a host has the name of its first rank."""
    hosts = hosts or hosts_as_said(hellos)
    firsts = [hellos[ranks[0]] for ranks in hosts]
    names = [first.hostname for first in firsts]
    if len(names) == 1:
        return f"on {names[0]}"
    texts = []
    for first, ranks in zip(firsts, hosts, strict=True):
        alone = names.count(first.hostname) == 1
        place = first.hostname if alone else f"{first.hostname} in network namespace {first.net_namespace}"
        texts.append(f"{place}: rank{'s' * (len(ranks) > 1)} {spans(ranks)}")
    if len(texts) > MOST_HOSTS:
        texts[MOST_HOSTS:] = [f"and {len(texts) - MOST_HOSTS} more"]
    return f"between {len(hosts)} hosts ({'; '.join(texts)})"


def spans(numbers: Iterable[int]) -> str:
    """Ascending numbers in short: [0, 1, 4, 5, 6] is "0 1 4-6"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return " ".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else " ".join(map(str, run)) for run in runs)
