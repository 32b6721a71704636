"""Delayed recall and Mackey-Glass without backpropagation through time: the record's runs.

    python -m benchmarks.recurrent_learning recall "static weights, 16" 0.003 0 1000
    python -m benchmarks.recurrent_learning                (all of them, hours)

Task, method, learning rate, seed and steps. An Elman network of 64 units, windows of 40 steps, 32
rows, Adam with a cosine schedule, 3,000 steps unless others are asked for. The figure is the error
on the evaluation rows over their variance. A run that is in the file already is not made again.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import write
from fwdlearn.allocators import Uniform
from fwdlearn.baselines import (
    Backpropagation,
    BaselineTrainer,
    TruncatedBackpropagation,
    is_baseline,
)
from fwdlearn.data import delayed_recall, mackey_glass
from fwdlearn.data.types import Data
from fwdlearn.estimator import Estimator
from fwdlearn.estimators import (
    CausalNodePerturbation,
    ForwardGradient,
    RandomPerturbation,
    StepwiseActivityPerturbation,
    StepwiseWeightPerturbation,
)
from fwdlearn.models.recurrent import recurrent
from fwdlearn.objectives import mean_squared_error
from fwdlearn.trainer import Trainer

RECORD = Path(__file__).parent.parent / "records" / "recurrent" / "learning.json"
TASKS: Mapping[str, Callable[[], Data]] = {"recall": delayed_recall, "mackey-glass": mackey_glass}
PUBLISHED = CausalNodePerturbation(1e-3, horizon=0, exact_head=False)
# Name -> estimator, directions a row.
METHODS: Mapping[str, tuple[Estimator, int]] = {
    "backpropagation": (Backpropagation(), 1),
    "truncated after one step": (TruncatedBackpropagation(), 1),
    "causal noise in layers, 16": (CausalNodePerturbation(1e-3), 16),
    "causal noise in layers, 64": (CausalNodePerturbation(1e-3), 64),
    "static weights, 1": (RandomPerturbation(1e-3), 1),
    "static weights, 16": (RandomPerturbation(1e-3), 16),
    "static weights, 64": (RandomPerturbation(1e-3), 64),
    "exact slopes and momentum, 64": (ForwardGradient(guess="momentum"), 64),
    "NP as published, 16": (PUBLISHED, 16),
    "ANP as published, 16": (StepwiseActivityPerturbation(1e-3), 16),
    "WP as published, 16": (StepwiseWeightPerturbation(1e-3), 16),
}
STEPS, ROWS, UNITS, SEEDS, RATES = 3000, 32, 64, (0, 1, 2), (1e-3, 3e-3)


def train(task: str, method: str, lr: float, seed: int, steps: int) -> dict[str, Any]:
    """One run."""
    data, (estimator, directions) = TASKS[task](), METHODS[method]
    model = recurrent(data.info, "elman", (UNITS,), seed=seed).module
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    made = (BaselineTrainer if is_baseline(estimator) else Trainer)(
        model,
        data,
        mean_squared_error,
        estimator,
        Uniform(directions),
        optimizer,
        schedule=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps),
        batch_size=ROWS,
        steps=steps,
        seed=seed,
    )
    summary = made.train()
    return {
        "task": task,
        "method": method,
        "lr": lr,
        "seed": seed,
        "steps": steps,
        "nmse": summary["eval.nmse"],
        "queries": summary["queries"],
        "seconds": summary["seconds"],
    }


def main(words: list[str]) -> None:
    wanted = [
        (task, method, lr, seed, STEPS)
        for task in TASKS
        for method in METHODS
        for lr in RATES
        for seed in SEEDS
    ]
    if words:
        task, method, lr, seed, steps = words
        wanted = [(task, method, float(lr), int(seed), int(steps))]
    for one in wanted:
        known = json.loads(RECORD.read_text("utf-8"))["results"] if RECORD.exists() else []
        if any((r["task"], r["method"], r["lr"], r["seed"], r["steps"]) == one for r in known):
            continue
        found = train(*one)
        print(found, flush=True)
        # Read again: other runs may have ended meanwhile.
        known = json.loads(RECORD.read_text("utf-8"))["results"] if RECORD.exists() else []
        write(RECORD, [*known, found])


if __name__ == "__main__":
    main(sys.argv[1:])
