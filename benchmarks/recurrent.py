"""Recurrent networks without backpropagation through time, at equal queries.

    python -m benchmarks.recurrent [--only TASK]

Recipes of sequence tasks, each method with the same budget of queries: noise on weights with the
readout exact, noise on weights alone, exact slopes, node perturbation with credit for all later
losses, node perturbation as published (credit for the losses of the same step alone). Beside them
true BPTT and BPTT cut after each step, a row of which counts three queries, and a frozen reservoir
whose readout is solved for, which passes once over the rows that BPTT sees. Of the learning rates
the one that does best on seed 0 is run with three seeds; a reservoir's radius and input scale are
chosen by the error on a quarter of its training rows. Writes figures and a plot.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.options import chosen, options
from benchmarks.results import merge
from fwdlearn.baselines import fit_readout, reservoir
from fwdlearn.metrics import Scores
from fwdlearn.recipe.build import assemble
from fwdlearn.recipe.load import load_recipe

SEEDS = (0, 1, 2)
# Task -> its figure, and the queries of a run.
TASKS = {
    "delayed-recall": ("nmse", 57_600),
    "mackey-glass": ("nmse", 57_600),
    "copying-memory": ("accuracy", 432_000),
    "adding-problem": ("nmse", 960_000),
}
# As published: credit for the loss of the same step, noise in the readout too.
_NODES = "estimator={name: CausalNodePerturbation, horizon: 0, exact_head: false}"
_ACTIVITY = "estimator={name: StepwiseActivityPerturbation}"
_WEIGHTS = "estimator={name: StepwiseWeightPerturbation, sigma: 0.001}"
_DECORRELATED = "model.decorrelation=0.01"
METHODS: Mapping[str, list[str]] = {
    "weights, readout exact": ["estimator={name: LikelihoodRatio, noise: weights, sigma: 0.001}"],
    "the same, decorrelated": [
        "estimator={name: LikelihoodRatio, noise: weights, sigma: 0.001}",
        _DECORRELATED,
    ],
    "weights": ["estimator={name: RandomPerturbation, sigma: 0.001}"],
    "exact slopes": ["estimator={name: ForwardGradient}"],
    "nodes, later losses": ["estimator={name: CausalNodePerturbation}"],
    "NP": [_NODES],
    "DNP": [_NODES, _DECORRELATED],
    "ANP": [_ACTIVITY],
    "DANP": [_ACTIVITY, _DECORRELATED],
    "WP": [_WEIGHTS],
    "DWP": [_WEIGHTS, _DECORRELATED],
    "truncated BPTT": ['estimator={name: "fwdlearn.baselines:TruncatedBackpropagation"}'],
    "BPTT": ['estimator={name: "fwdlearn.baselines:Backpropagation"}'],
}
# Times the rate of the recipe, which was chosen for the first method.
RATES = (1.0, 0.3)
GRID = [(radius, scale) for radius in (0.9, 1.0) for scale in (0.05, 0.3, 1.0)]


class Evaluations:
    """A sink that keeps a figure."""

    def __init__(self, figure: str) -> None:
        self.figure = f"eval.{figure}"
        self.points: list[tuple[int, float]] = []

    def start(self, meta: Mapping[str, Any]) -> None: ...

    def log(self, record: Mapping[str, Any]) -> None:
        if self.figure in record:
            self.points.append((record["queries"], record[self.figure]))

    def finish(self, summary: Mapping[str, Any]) -> None: ...


def run(task: str, method: str, factor: float, seed: int) -> dict[str, Any]:
    """One training run."""
    figure, queries = TASKS[task]
    budget = ["trainer.steps=null", f"trainer.queries={queries}", "trainer.device=cpu"]
    rate = factor * float(load_recipe(task).components["optimizer"].arguments["lr"])
    words = [*budget, *METHODS[method], f"optimizer.lr={rate}", f"seed={seed}"]
    curve = Evaluations(figure)
    trainer = assemble(load_recipe(task, words), [curve]).trainer
    trainer.evaluate_every = max(1, trainer._planned() // 12)
    summary = trainer.train()
    found = {"lr": rate, "seed": seed, "steps": summary["steps"], "queries": summary["queries"]}
    return found | {"seconds": summary["seconds"], "curve": curve.points}


def frozen(task: str, seed: int) -> dict[str, Any]:
    """A reservoir as wide as the network of the recipe, or of 64 units."""
    figure, queries = TASKS[task]
    trainer = assemble(load_recipe(task, [f"seed={seed}"])).trainer
    steps = queries // (3 * trainer.batch_size)
    batches = [trainer.batch(step) for step in range(steps)]
    best = min(GRID, key=lambda pair: _readout_error(trainer, batches, pair, seed))
    model = reservoir(trainer.data.info, 64, *best, seed)
    fit_readout(model, batches)
    value = _figures(model, trainer.data.evaluation)[figure]
    return {"seed": seed, "radius": best[0], "scale": best[1], "curve": [(queries, value)]}


def _readout_error(trainer: Any, batches: list[Any], made: tuple[float, float], seed: int) -> float:
    """Of the rows of every fourth batch, when the others are fitted; made: radius and scale."""
    model = reservoir(trainer.data.info, 64, *made, seed)
    fit_readout(model, [batch for i, batch in enumerate(batches, 1) if i % 4])
    with torch.no_grad():
        losses = [trainer.objective(model(*b.args), b.targets).mean() for b in batches[3::4]]
    return float(torch.stack(losses).mean())


@torch.no_grad()
def _figures(model: Any, dataset: Any) -> dict[str, float]:
    scores = Scores()
    for index in torch.arange(len(dataset)).split(256):
        batch = dataset.batch(index)
        scores.add(torch.zeros(len(batch)), model(*batch.args), batch.targets)
    return scores.result()


def measured(task: str) -> list[dict[str, Any]]:
    """All methods on one task; prints a table."""
    figure, queries = TASKS[task]
    better = max if figure == "accuracy" else min
    print(f"\n{task}, {queries:,} queries, {figure} of seeds 0, 1, 2\n", flush=True)
    print("| method | lr | steps | of each seed | mean |\n|---|---|---|---|---|", flush=True)
    entries = []
    for method in METHODS:
        tried = [run(task, method, factor, SEEDS[0]) for factor in RATES]
        first = better(tried, key=lambda one: one["curve"][-1][1])
        factor = RATES[tried.index(first)]
        runs = [first, *(run(task, method, factor, seed) for seed in SEEDS[1:])]
        entries.append({"task": task, "method": method, "figure": figure, "runs": runs})
        entries[-1]["tried"] = [(one["lr"], one["curve"][-1][1]) for one in tried]
        _line(method, f"{first['lr']:g}", f"{first['steps']:,}", runs)
    runs = [frozen(task, seed) for seed in SEEDS]
    entries.append({"task": task, "method": "reservoir", "figure": figure, "runs": runs})
    _line("reservoir", "", "", runs)
    return entries


def _line(method: str, rate: str, steps: str, runs: list[dict[str, Any]]) -> None:
    last = [one["curve"][-1][1] for one in runs]
    told = " ".join(f"{value:.4f}" for value in last)
    print(f"| {method} | {rate} | {steps} | {told} | {mean(last):.4f} |", flush=True)


def draw(entries: list[dict[str, Any]], path: Path) -> None:
    """Means over seeds against queries, one picture a task."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = [task for task in TASKS if any(entry["task"] == task for entry in entries)]
    figure: Any = Figure(figsize=(5 * len(tasks), 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        names = [*METHODS, "reservoir"]
        for entry in (entry for entry in entries if entry["task"] == task):
            colour = f"C{names.index(entry['method'])}"
            curves = [one["curve"] for one in entry["runs"]]
            middle = [mean(p[1] for p in points) for points in zip(*curves, strict=False)]
            if len(middle) == 1:
                axis.axhline(middle[0], color=colour, linestyle=":", label=entry["method"])
                continue
            dashed = "--" if "BPTT" in entry["method"] else "-"
            across = [point[0] for point in curves[0]][: len(middle)]
            axis.plot(across, middle, dashed, color=colour, label=entry["method"])
        axis.set(title=task, xlabel="queries", ylabel=TASKS[task][0])
        if TASKS[task][0] == "nmse":
            axis.set_yscale("log")
    axis.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def main() -> None:
    torch.set_num_threads(1)
    asked = options("recurrent", 1)
    for task in chosen(TASKS, asked.only):
        entries = [entry | {"work": task} for entry in measured(task)]
        found = merge(asked.output, entries, TASKS, asked.rounds)
        draw(found, asked.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
