"""Memory against the length of a sequence, beside backpropagation through time; and what it buys.

    python -m benchmarks.recurrent_memory           memory, then training on 10,000 steps
    python -m benchmarks.recurrent_memory folding   time a query at 8 and 64 directions a row

The peak of live tensor bytes beside weights and the batch (`benchmarks/live.py`) of one estimate of
an Elman network of 64 units, 8 rows and 4 directions a row. Writes the record.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.live import LiveBytes
from benchmarks.results import write
from benchmarks.timing import interleaved
from fwdlearn.allocator import Plan
from fwdlearn.allocators import Uniform
from fwdlearn.batch import Batch
from fwdlearn.data import delayed_recall
from fwdlearn.engine.through_time import TimeEngine
from fwdlearn.estimator import Estimator
from fwdlearn.estimators import (
    SPSA,
    CausalNodePerturbation,
    ForwardGradient,
    RandomPerturbation,
)
from fwdlearn.keys import Key
from fwdlearn.models.recurrent import Recurrent
from fwdlearn.objectives import mean_squared_error
from fwdlearn.step_oracle import StepOracle
from fwdlearn.trainer import Trainer

RECORD = Path(__file__).parent.parent / "records" / "recurrent"
LENGTHS = (100, 300, 1000, 3000, 10_000)
ROWS, UNITS, DIRECTIONS, DELAY = 8, 64, 4, 3
ESTIMATORS: Mapping[str, Estimator] = {
    "causal node perturbation": CausalNodePerturbation(),
    "static weights, antithetic": SPSA(),
    "forward mode": ForwardGradient(),
}


def network(units: int = UNITS) -> Recurrent:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Recurrent("elman", 1, (units,), 1)


def recall(steps: int, rows: int = ROWS, number: int = 0) -> Batch:
    """Noise to be told again a few steps later."""
    x = Key.root(number).uniform(rows * steps).view(rows, steps, 1).float() * 2 - 1
    targets = torch.full_like(x, torch.nan)
    targets[:, DELAY:] = x[:, :-DELAY]
    return Batch((x,), targets)


def estimated(
    estimator: Estimator, engine: TimeEngine, batch: Batch, directions: int, seed: int = 0
) -> dict[str, torch.Tensor]:
    """One estimate, all of its tensors formed."""
    oracle = StepOracle(engine, batch)
    state, plan = estimator.init(oracle.params), Plan.uniform(len(batch), directions)
    made, _ = estimator.estimate(oracle, oracle.params, state, key=Key.root(seed), plan=plan)
    return {name: made.grad[name] for name in oracle.params} | {"loss": made.loss}


def through_time(model: nn.Module, batch: Batch) -> Callable[[], object]:
    def run() -> object:
        loss = mean_squared_error(model(*batch.args), batch.targets).mean()
        return torch.autograd.grad(loss, list(model.parameters()))

    return run


def memory() -> list[dict[str, Any]]:
    """Peak against length."""
    found, model = [], network()
    # Little enough that short sequences run step by step too, and not whole, which is faster.
    engine = TimeEngine(model, mean_squared_error, memory_budget=2**20)
    for steps in LENGTHS:
        batch = recall(steps)
        runs: dict[str, Callable[[], object]] = {
            "backpropagation through time": through_time(model, batch)
        }
        for name, estimator in ESTIMATORS.items():

            def run(estimator: Estimator = estimator, batch: Batch = batch) -> object:
                return estimated(estimator, engine, batch, DIRECTIONS)

            # The choice of a rung and the checks of slopes come first.
            estimated(estimator, engine, recall(8), DIRECTIONS)
            runs[name] = run
        for name, one in runs.items():
            with LiveBytes() as live:
                one()
            found.append({"method": name, "steps": steps, "peak_bytes": live.peak})
            print(f"{name:32} {steps:6} steps {live.peak / 2**20:8.2f} MiB", flush=True)
    return found


def training(steps: int = 10_000) -> list[dict[str, Any]]:
    """Recall in sequences of so many steps: updates of whole ones, and within them."""
    found: list[dict[str, Any]] = []
    data = delayed_recall(steps, DELAY, evaluation_rows=4)
    for every, updates, lr in ((None, 20, 0.03), (50, 400, 0.01)):
        model = network(16)
        optimizer = torch.optim.Adam(model.parameters(), lr=lr)
        trainer = Trainer(
            model,
            data,
            mean_squared_error,
            RandomPerturbation(),
            Uniform(32),
            optimizer,
            schedule=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates),
            batch_size=2,
            steps=updates,
            every=every,
        )
        first = trainer.evaluate()["nmse"]
        last = trainer.train()["eval.nmse"]
        found.append({"every": every or steps, "updates": updates, "first": first, "nmse": last})
        print(found[-1], flush=True)
    return found


def folding(rounds: int = 5) -> dict[str, dict[str, float]]:
    """Microseconds a query, at few directions a row and at many; interleaved."""
    engine, batch = TimeEngine(network(), mean_squared_error), recall(40, 32)
    found = {}
    for name, estimator in ESTIMATORS.items():
        variants = {
            str(directions): lambda e=estimator, d=directions: estimated(e, engine, batch, d)
            for directions in (8, 64)
        }
        seconds = interleaved(variants, rounds)
        found[name] = {count: s * 1e6 / (32 * int(count)) for count, s in seconds.items()}
        ratio = found[name]["64"] / found[name]["8"]
        print(f"{name:32} {found[name]} microseconds a query, 64 to 8: {ratio:.2f}")
    return found


def plot(sizes: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for name in dict.fromkeys(size["method"] for size in sizes):
        mine = [size for size in sizes if size["method"] == name]
        peaks = [size["peak_bytes"] / 2**20 for size in mine]
        axes.plot([size["steps"] for size in mine], peaks, marker="o", markersize=3, label=name)
    axes.set(xscale="log", yscale="log", xlabel="steps", ylabel="peak of live tensors, MiB")
    axes.set_title(f"Elman, {UNITS} units, {ROWS} rows, {DIRECTIONS} directions a row", fontsize=10)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(RECORD / "memory.png", dpi=110)


def main(parts: list[str]) -> None:
    path = RECORD / "memory.json"
    known = json.loads(path.read_text("utf-8"))["results"] if path.exists() else {}
    for part in parts or ["memory", "training"]:
        known[part] = {"memory": memory, "training": training, "folding": folding}[part]()
        write(path, known)
    plot(known["memory"])


if __name__ == "__main__":
    main(sys.argv[1:])
