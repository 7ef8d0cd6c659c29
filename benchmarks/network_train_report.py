"""Table, page and goals of the training across hosts. It knows rows of results only, not how they were measured."""

import statistics
from typing import Any

from gpu_goals import Outcome
from network_plan import TrainPlan, rate_text
from network_report import goals_table
from render import environment_text, table

Row = dict[str, Any]  # of train_measure.Row, and the seed
Document = dict[str, Any]
STOCK, NONE, FP16 = "stock DDP, gloo", "dpcomm none", "dpcomm fp16"
LEAST_SHARE, LEAST_SPEEDUP = 0.75, 1.6
HEADS = [
    ("seed", 4),
    ("contestant", 18),
    ("step(ms)", 9),
    ("p95(ms)", 9),
    ("speed-up", 8),
    ("compute(ms)", 11),
    ("share", 6),
    ("alone(ms)", 9),
    ("loss", 10),
    ("vs stock", 10),
    ("replicas", 8),
]
LEGEND = """\
# step: median of the slowest rank; compute: median of steps under no_sync(); share: 1 - compute/step, what
# communication takes of it; alone: its buckets reduced with nothing else to do; loss: of the last step"""
HEAD = """# Training across hosts

Written by `benchmarks/network.py` from the JSON file beside it; do not edit. How it is measured and how to read it:
[docs/benchmarks.md](../../docs/benchmarks.md#between-hosts). Every seed has weights and data of its own, the same for
all contestants, and as many steps."""


def header() -> str:
    """The names of the columns."""
    return "  ".join(name.rjust(width) for name, width in HEADS)


def line(row: Row, stock_loss: float | None) -> str:
    """One row of the table."""
    return "  ".join(cell.rjust(width) for cell, (_, width) in zip(cells(row, stock_loss), HEADS, strict=True))


def cells(row: Row, stock_loss: float | None) -> list[str]:
    """One row as text, in the order of HEADS."""
    return [
        str(row["seed"]),
        row["contestant"],
        f"{row['step_ms']:.1f}",
        f"{row['step_p95_ms']:.1f}",
        "-" if row["speedup"] is None else f"{row['speedup']:.2f}",
        f"{row['compute_ms']:.1f}",
        f"{share(row):.0%}",
        f"{row['alone_ms']:.1f}",
        f"{row['final_loss']:.6f}",
        "-" if stock_loss is None else f"{row['final_loss'] - stock_loss:+.1e}",
        "equal" if row["replicas_identical"] else "DIFFER",
    ]


def share(row: Row) -> float:
    """What communication takes of the step."""
    return float(1 - row["compute_ms"] / row["step_ms"])


def by_contestant(rows: list[Row]) -> dict[str, dict[int, Row]]:
    """Each one's rows by seed."""
    return {
        name: {row["seed"]: row for row in rows if row["contestant"] == name}
        for name in dict.fromkeys(row["contestant"] for row in rows)
    }


def seed_noise(rows: list[Row]) -> float | None:
    """Standard deviation of stock DDP's final loss over the seeds; None of fewer than two."""
    losses = [row["final_loss"] for row in rows if row["contestant"] == STOCK]
    return statistics.stdev(losses) if len(losses) > 1 else None


def loss_differences(rows: list[Row], name: str) -> list[float]:
    """One contestant's final losses minus stock DDP's, seed by seed."""
    found = by_contestant(rows)
    stock = found.get(STOCK, {})
    return [row["final_loss"] - stock[seed]["final_loss"] for seed, row in found.get(name, {}).items() if seed in stock]


def outcomes(rows: list[Row]) -> list[Outcome]:
    """All goals, in order. The first is a condition: with less communication the others would say little."""
    stock = [share(row) for row in rows if row["contestant"] == STOCK]
    goal = f"communication at least {LEAST_SHARE:.0%} of stock DDP's step (a condition)"
    found = [_at_least(goal, stock, LEAST_SHARE, "{:.1%}")]
    speedups = [row["speedup"] for row in rows if row["contestant"] == FP16 and row["speedup"] is not None]
    found.append(_at_least(f"a step at least {LEAST_SPEEDUP}x as fast with fp16", speedups, LEAST_SPEEDUP, "{:.2f}x"))
    noise = seed_noise(rows)
    for name in (NONE, FP16):
        differences = loss_differences(rows, name)
        goal = f"{name}: final loss within the seeds' standard deviation of stock DDP's, on every seed"
        if noise is None or not differences:
            found.append(Outcome(goal, "", None))
            continue
        largest = max(abs(difference) for difference in differences)
        reached = all(abs(difference) <= noise for difference in differences)  # never of a NaN
        found.append(Outcome(goal, f"at most {largest:.1e} off, deviation {noise:.1e}", reached))
    return found


def _at_least(goal: str, values: list[float], bound: float, form: str) -> Outcome:
    """By the median over the seeds."""
    if not values:
        return Outcome(goal, "", None)
    median = statistics.median(values)
    spread = f"median of {len(values)} seeds, {form.format(min(values))} to {form.format(max(values))}"
    return Outcome(goal, f"{form.format(median)} ({spread})", median >= bound)


def summary(rows: list[Row]) -> str:
    """A line for each contestant, over all seeds."""
    lines = []
    for name, by_seed in by_contestant(rows).items():
        own = list(by_seed.values())
        speedups = [row["speedup"] for row in own if row["speedup"] is not None]
        differences = loss_differences(rows, name)
        lines.append(
            [
                name,
                f"{statistics.median(row['step_ms'] for row in own):.1f}",
                f"{statistics.median(speedups):.2f}" if speedups else "-",
                f"{statistics.median(share(row) for row in own):.0%}",
                f"{statistics.mean(row['final_loss'] for row in own):.6f}",
                f"{max(differences, key=abs):+.1e}" if differences else "-",
                "equal" if all(row["replicas_identical"] for row in own) else "**DIFFER**",
            ]
        )
    heads = ["contestant", "step (ms)", "speed-up", "share of communication", "mean final loss"]
    return table([*heads, "largest difference from stock", "replicas"], lines)


def markdown(document: Document) -> str:
    """The page: goals, contestants, every seed."""
    rows, plan = document["rows"], TrainPlan(**document["settings"])
    stock = by_contestant(rows).get(STOCK, {})
    noise = seed_noise(rows)
    said = f"{document['ranks']} hosts, {rate_text(plan.gbit)} each way: MLP of {plan.layers} layers of {plan.width}, "
    said += f"{plan.batch} samples a rank and step, {plan.seeds} seeds, buckets of {plan.bucket_cap_mb:g} MB. "
    said += "Standard deviation of stock DDP's final loss over the seeds: "
    said += "-" if noise is None else f"{noise:.1e}"
    every = [cells(row, stock[row["seed"]]["final_loss"] if row["seed"] in stock else None) for row in rows]
    parts = [HEAD, environment_text(document["environment"]), said + ".", goals_table(outcomes(rows)), summary(rows)]
    parts += ["## Every seed", table([name for name, _ in HEADS], every)]
    return "\n\n".join(parts) + "\n"


def differing(rows: list[Row]) -> list[str]:
    """A line for each row whose replicas differ."""
    wrong = [row for row in rows if not row["replicas_identical"]]
    return [f"seed {row['seed']}, {row['contestant']}: replicas differed" for row in wrong]
