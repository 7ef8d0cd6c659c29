"""Times one configuration: a model, a number of ranks, a bucket size. It knows no command line and prints nothing.

All contestants live in the same processes and take turns of a few steps, so that all meet the same state of the
machine. So do two that show what the others pay for communication: steps under no_sync(), and steps with a hook that
leaves buckets as they are. Each step's time is the slowest rank's. The first step of a turn, where the ranks meet, is
not timed.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from lm.training import gather_bytes, parameters_digest, slowest_rank
from measure import percentile
from torch import Tensor
from train_models import BUCKETS, COMPUTE, Contestant, Method, Task

WARMUP_STEPS = 3  # the first steps build and rebuild DDP's buckets
TURN_STEPS = 4
LEAST_TURNS = 2
BASELINES = [COMPUTE, BUCKETS]
Progress = Callable[[int, float], object]  # told how many turns were made, and the seconds


@dataclasses.dataclass(frozen=True)
class Row:
    """One contestant in one configuration, over all ranks. Times in milliseconds, of the slowest rank."""

    model: str
    ranks: int
    batch: int  # samples that a rank takes in one step
    bucket_cap_mb: float
    buckets: int
    contestant: str
    steps: int  # that were timed
    step_ms: float  # median
    step_p95_ms: float
    samples_per_s: float  # of all ranks together, from the median
    compute_ms: float  # median of the same steps under no_sync()
    copies_ms: float  # what DDP's copies into its buckets and back add: median with buckets only - compute
    exposed_ms: float  # step - compute - copies: what a step pays for communication
    alone_ms: float  # median of the step's buckets reduced with nothing else to do
    hidden: float  # 1 - exposed/alone; negative where a step pays more than the communication alone takes
    speedup: float | None  # stock DDP's median over this one's; None where stock DDP did not run
    final_loss: float  # mean over ranks
    loss_difference: float | None  # largest difference of any step's loss on any rank from stock DDP's
    same_bits_as_stock: bool | None  # all losses and the parameters
    replicas_identical: bool
    parameters_sha256: str


@dataclasses.dataclass
class Times:
    """Seconds on this rank."""

    step: list[float] = dataclasses.field(default_factory=list)
    alone: list[float] = dataclasses.field(default_factory=list)


def measure(
    task: Task, methods: Sequence[Method], bucket_cap_mb: float, budget_s: float, progress: Progress
) -> tuple[list[Row], list[Contestant]]:
    """Trains all methods in turns until the next turn would pass `budget_s`, but LEAST_TURNS at least. Collective.

    Returns:
        A row for each method, and the contestants, which the caller closes.
    """
    begin = time.monotonic()
    data = task.data(dist.get_rank(), dist.get_world_size())
    contestants = [Contestant(method, task, data, bucket_cap_mb) for method in [*BASELINES, *methods]]
    for contestant in contestants:
        for _ in range(WARMUP_STEPS):
            contestant.step()
    sources = [torch.randn(size // 4) for size in contestants[-1].bucket_bytes()]
    times = [Times() for _ in contestants]
    turns, turn_s = 0, 0.0
    while turns < LEAST_TURNS or agreed(time.monotonic() - begin + turn_s < budget_s):
        start = time.monotonic()
        for contestant, its in zip(contestants, times, strict=True):
            take_turn(contestant, its, sources)
        turns, turn_s = turns + 1, time.monotonic() - start
        progress(turns, time.monotonic() - begin)
    return rows_of(task, contestants, times, bucket_cap_mb), contestants[len(BASELINES) :]


def agreed(mine: bool) -> bool:
    """Rank 0's word. Collective."""
    word = torch.tensor([int(mine)])
    dist.broadcast(word, 0)
    return bool(word.item())


def take_turn(contestant: Contestant, times: Times, sources: list[Tensor]) -> None:
    """TURN_STEPS timed steps, then the communication alone. Collective."""
    clock = time.perf_counter
    contestant.step()
    for _ in range(TURN_STEPS):
        if not contestant.method.communicates:
            dist.barrier()  # nothing else keeps the ranks together
        start = clock()
        contestant.step()
        times.step.append(clock() - start)
    buckets = [source.clone() for source in sources]  # new values each time: sums of sums would grow without bound
    dist.barrier()
    start = clock()
    contestant.reduce_alone(buckets)
    times.alone.append(clock() - start)


def rows_of(task: Task, contestants: list[Contestant], times: list[Times], bucket_cap_mb: float) -> list[Row]:
    """The figures of all contestants but the baselines, which come first. Collective."""
    stepped = [slowest_rank(its.step) for its in times]
    alone = [slowest_rank(its.alone) for its in times]
    digests = [gather_bytes(parameters_digest(contestant.ddp)) for contestant in contestants]
    stock = next((i for i, c in enumerate(contestants) if c.method.name.startswith("stock")), None)
    nranks = dist.get_world_size()
    compute_s, with_buckets_s = (statistics.median(its) for its in stepped[: len(BASELINES)])
    rows = []
    for i, contestant in list(enumerate(contestants))[len(BASELINES) :]:
        step_s, alone_s = statistics.median(stepped[i]), statistics.median(alone[i])
        difference = None if stock is None else loss_difference(contestant, contestants[stock])
        rows.append(
            Row(
                model=task.name,
                ranks=nranks,
                batch=task.batch,
                bucket_cap_mb=bucket_cap_mb,
                buckets=len(contestant.bucket_bytes()),
                contestant=contestant.method.name,
                steps=len(stepped[i]),
                step_ms=1e3 * step_s,
                step_p95_ms=1e3 * percentile(stepped[i], 95),
                samples_per_s=task.batch * nranks / step_s,
                compute_ms=1e3 * compute_s,
                copies_ms=1e3 * (with_buckets_s - compute_s),
                exposed_ms=1e3 * (step_s - with_buckets_s),
                alone_ms=1e3 * alone_s,
                hidden=1 - (step_s - with_buckets_s) / alone_s,
                speedup=None if stock is None else statistics.median(stepped[stock]) / step_s,
                final_loss=mean_over_ranks(contestant.losses[-1]),
                loss_difference=difference,
                same_bits_as_stock=None if stock is None else difference == 0 and digests[i] == digests[stock],
                replicas_identical=len(set(digests[i])) == 1,
                parameters_sha256=digests[i][0].hex(),
            )
        )
    return rows


def loss_difference(one: Contestant, other: Contestant) -> float:
    """The largest difference of two contestants' losses at any step on any rank; NaN where one is not finite."""
    largest = torch.tensor(one.losses, dtype=torch.float64).sub_(torch.tensor(other.losses)).abs_().max()
    return slowest_rank([float(largest)])[0]


def mean_over_ranks(value: float) -> float:
    total = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()
