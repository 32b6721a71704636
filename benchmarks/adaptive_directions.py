"""A measured number of directions against fixed ones: final accuracy, and the queries it takes.

    python -m benchmarks.adaptive_directions [--workers N]

Three recipes. Every fixed number spends the whole budget, `AdaptiveDirections` three quarters of
it; all with the same first weights for a seed, and each with the best of two learning rates. The
best fixed number is the one with the best mean accuracy over the seeds. Writes
records/allocation/adaptive.json.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch
from torch import nn

from benchmarks.allocation import RECORD, centred, interval, network, start
from benchmarks.results import write
from fwdlearn.allocator import Allocator
from fwdlearn.allocators import AdaptiveDirections, Uniform
from fwdlearn.data import Data
from fwdlearn.estimator import Estimator
from fwdlearn.estimators import LikelihoodRatio, RandomPerturbation
from fwdlearn.models import mlp
from fwdlearn.objectives import cross_entropy
from fwdlearn.trainer import Trainer

SEEDS, FIXED, SHARE = range(3), (1, 2, 4, 8, 16), 0.75


@dataclass(frozen=True)
class Task:
    """A recipe: constant learning rate, Adam, 64 rows a step."""

    model: Callable[[Data, int], nn.Module]
    estimator: Estimator
    rates: tuple[float, ...]
    queries: int
    target: float


def linear(data: Data, seed: int) -> nn.Module:
    return mlp(data.info, hidden=(), seed=seed).module


TASKS = {
    "mlp from scratch, noise in activations": Task(
        network, LikelihoodRatio(), (1e-3, 3e-3), 100_000, 0.003
    ),
    "mlp from 94 %, noise in activations": Task(
        start, LikelihoodRatio(), (3e-4, 1e-3), 60_000, 0.003
    ),
    "linear from scratch, noise in weights": Task(
        linear, RandomPerturbation(), (1e-2, 3e-2), 100_000, 0.003
    ),
}


def run(job: tuple[str, str, float, int]) -> dict[str, Any]:
    """One run: task, rule (a number or "adaptive"), learning rate, seed."""
    torch.set_num_threads(1)
    name, rule, rate, seed = job
    task, data = TASKS[name], centred()
    model = task.model(data, seed)
    allocator: Allocator
    if rule == "adaptive":
        allocator, queries = AdaptiveDirections(1, task.target), int(SHARE * task.queries)
    else:
        allocator, queries = Uniform(int(rule)), task.queries
    trainer = Trainer(
        model,
        data,
        cross_entropy,
        task.estimator,
        allocator,
        torch.optim.Adam(model.parameters(), lr=rate),
        batch_size=64,
        queries=queries,
        seed=seed,
    )
    summary = trainer.train()
    return {
        "task": name,
        "rule": rule,
        "lr": rate,
        "seed": seed,
        "steps": summary["steps"],
        "queries": summary["queries"],
        "accuracy": summary["eval.accuracy"],
        "train_loss": trainer.evaluate(data.train)["loss"],
    }


def show(results: list[dict[str, Any]]) -> None:
    for name in TASKS:
        print(
            f"\n{name}\n{'rule':10}{'lr':>8}{'queries':>10}{'steps':>7}{'accuracy':>10}{'loss':>8}"
        )
        best: dict[str, list[dict[str, Any]]] = {}
        mine = [r for r in results if r["task"] == name]
        for rule, rate in dict.fromkeys((r["rule"], r["lr"]) for r in mine):
            runs = [r for r in mine if (r["rule"], r["lr"]) == (rule, rate)]
            figures = {f: mean(r[f] for r in runs) for f in ("queries", "steps", "accuracy")}
            loss = mean(r["train_loss"] for r in runs)
            print(f"{rule:10}{rate:8}{figures['queries']:10.0f}{figures['steps']:7.0f}", end="")
            print(f"{figures['accuracy']:10.4f}{loss:8.4f}")
            kind = "adaptive" if rule == "adaptive" else "fixed"
            if kind not in best or mean(r["accuracy"] for r in best[kind]) < figures["accuracy"]:
                best[kind] = runs
        if len(best) == 2:
            pairs = zip(best["adaptive"], best["fixed"], strict=True)
            gap = [one["accuracy"] - other["accuracy"] for one, other in pairs]
            print(f"adaptive minus the best fixed number, {best['fixed'][0]['rule']}:", end=" ")
            print(f"{interval(gap)} accuracy, at {SHARE:.0%} of its queries")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adaptive_directions")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    asked = parser.parse_args()
    rules = [*map(str, FIXED), "adaptive"]
    jobs = [
        job
        for name, task in TASKS.items()
        for job in itertools.product((name,), rules, task.rates, SEEDS)
    ]
    with ProcessPoolExecutor(asked.workers) as pool:
        results = list(pool.map(run, jobs))
    write(RECORD / "adaptive.json", results)
    show(results)


if __name__ == "__main__":
    main()
