"""One rank of the training across hosts: stock DDP and dpcomm from the same seeds, several times over.

network.py starts it, on a host of its own, with a plan in JSON as its only argument. Steps are timed as
train_measure.py says, but every seed makes the same number of them, so that final losses can be compared.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from network_plan import TrainPlan, rate_text
from network_rank import checked, end, join
from tqdm import tqdm

import dpcomm

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))  # train_models knows its GPT
from network_train_report import STOCK, line
from train_measure import BASELINES, WARMUP_STEPS, Row, Times, rows_of, take_turn
from train_models import METHODS, Contestant, Method, mlp_task


def main(plan: dict[str, Any]) -> None:
    rank = join(plan)
    how = TrainPlan(**plan["train"])
    methods = [METHODS[name] if name not in plan["codecs"] else over_network(name) for name in plan["methods"]]
    rows: list[dict[str, Any]] = []
    with tqdm(total=how.seeds * how.turns, unit="turn", leave=False, disable=None if rank == 0 else True) as bar:
        for seed in range(how.seeds):
            bar.set_description(f"{plan['hosts']} hosts, {rate_text(how.gbit)}, training, seed {seed}")
            new = [dataclasses.asdict(row) | {"seed": seed} for row in train(how, seed, methods, bar)]
            rows += new
            stock = next((row["final_loss"] for row in new if row["contestant"] == STOCK), None)
            for row in new if rank == 0 else []:
                bar.write(line(row, stock), file=sys.stdout)
            sys.stdout.flush()
    end({"rows": rows}, plan)


def over_network(codec: str) -> Method:
    """dpcomm's method, with the engine that is to be measured."""

    def register(ddp: Any, bucket_cap_mb: float) -> dpcomm.HookState:
        state = dpcomm.register_ddp_hook(ddp, codec=codec, bucket_cap_mb=bucket_cap_mb, engine="gloo")
        assert state.comm is not None
        checked(state.comm, dist.get_rank())
        return state

    return dataclasses.replace(METHODS[codec], register=register)


def train(plan: TrainPlan, seed: int, methods: list[Method], bar: Any) -> list[Row]:
    """Trains all methods in turns from one seed. Collective."""
    task = mlp_task(plan.layers, plan.width, plan.batch, seed)
    data = task.data(dist.get_rank(), dist.get_world_size())
    contestants = [Contestant(method, task, data, plan.bucket_cap_mb) for method in [*BASELINES, *methods]]
    try:
        for contestant in contestants:
            for _ in range(WARMUP_STEPS):
                contestant.step()
        sources = [torch.randn(size // 4) for size in contestants[-1].bucket_bytes()]
        times = [Times() for _ in contestants]
        for _ in range(plan.turns):
            for contestant, its in zip(contestants, times, strict=True):
                take_turn(contestant, its, sources)
            bar.update()
        return rows_of(task, contestants, times, plan.bucket_cap_mb)
    finally:
        for contestant in contestants:
            contestant.close()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
