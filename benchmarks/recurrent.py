"""Recurrent networks without backpropagation through time, at equal queries.

    python -m benchmarks.recurrent [--only PATTERN]

Recipes of sequence tasks, each method with the same budget of queries: noise on weights with the
readout exact, noise on weights alone, exact slopes, node perturbation with credit for all later
losses, and the rules as they were published, with credit for the losses of the same step alone (NP,
ANP, WP, and on decorrelated inputs DNP, DANP, DWP). Beside them true BPTT and BPTT cut after each
step, a row of which counts three queries; the first weights of the recipe with a readout that is
solved for, one query a row; and a reservoir whose radius and input scale are chosen by the error on
a quarter of its training rows, which are those that BPTT sees. All others are trained by the
recipe's Adam, with its number of directions.

On recall each method has two rates, and the one that does best on seed 0 is run with three seeds;
on the other tasks it keeps the rate, as a multiple of the recipe's. Copying and adding are dearer:
fewer methods, and less than half of the recipe's queries. PATTERN is one of "TASK: METHOD". Writes
figures and a plot.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.logs import Log
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
    "copying-memory": ("accuracy", 96_000),
    "adding-problem": ("nmse", 400_000),
}
# Where each method tries every rate, and where all of them run.
FIRST, WHOLE = "delayed-recall", ("delayed-recall", "mackey-glass")
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
    "first weights, ridge": ['estimator={name: "fwdlearn.baselines:RidgeReadout"}'],
}
RESERVOIR = "reservoir, ridge"
# Of the methods, those that run on every task.
EVERYWHERE = (
    *("weights, readout exact", "nodes, later losses", "NP"),
    *("truncated BPTT", "BPTT", "first weights, ridge"),
)
WORKS = {
    f"{task}: {method}": (task, method)
    for task in TASKS
    for method in (*METHODS, RESERVOIR)
    if task in WHOLE or method in (*EVERYWHERE, RESERVOIR)
}
# Times the rate of the recipe, which was chosen for the first method.
RATES = (1.0, 0.3)
GRID = [(radius, scale) for radius in (0.9, 1.0) for scale in (0.05, 0.3, 1.0)]


def run(task: str, method: str, factor: float, seed: int) -> dict[str, Any]:
    """One training run."""
    figure, queries = TASKS[task]
    budget = ["trainer.steps=null", f"trainer.queries={queries}", "trainer.device=cpu"]
    rate = factor * float(load_recipe(task).components["optimizer"].arguments["lr"])
    words = [*budget, *METHODS[method], f"optimizer.lr={rate}", f"seed={seed}"]
    log = Log()
    trainer = assemble(load_recipe(task, words), [log]).trainer
    trainer.evaluate_every = max(1, trainer._planned() // 12)
    summary = trainer.train()
    found = {"lr": rate, "seed": seed, "steps": summary["steps"], "queries": summary["queries"]}
    return found | {"seconds": summary["seconds"], "curve": log.curve(f"eval.{figure}")}


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


def measured(task: str, method: str, rates: Sequence[float]) -> dict[str, Any]:
    """One method on one task; prints a line of a table.

    Args:
        rates: to be tried, as multiples of the recipe's.
    """
    figure, _ = TASKS[task]
    entry: dict[str, Any] = {"task": task, "method": method, "figure": figure}
    if method == RESERVOIR:
        entry["runs"] = [frozen(task, seed) for seed in SEEDS]
    else:
        tried = [run(task, method, factor, SEEDS[0]) for factor in rates]
        better = max if figure == "accuracy" else min
        first = better(tried, key=lambda one: one["curve"][-1][1])
        factor = rates[tried.index(first)]
        entry["runs"] = [first, *(run(task, method, factor, seed) for seed in SEEDS[1:])]
        entry |= {"rate": factor, "tried": [(one["lr"], one["curve"][-1][1]) for one in tried]}
    print(line(entry), flush=True)
    return entry


def line(entry: Mapping[str, Any]) -> str:
    """A row of the table."""
    runs = entry["runs"]
    last = [one["curve"][-1][1] for one in runs]
    rate, steps = runs[0].get("lr", ""), runs[0].get("steps", "")
    told = " ".join(f"{value:.4f}" for value in last)
    cells = (entry["task"], entry["method"], rate and f"{rate:g}", steps and f"{steps:,}", told)
    return f"| {' | '.join(cells)} | {mean(last):.4f} |"


def draw(entries: list[dict[str, Any]], path: Path) -> None:
    """Means over seeds against queries, one picture a task."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = [task for task in TASKS if any(entry["task"] == task for entry in entries)]
    figure: Any = Figure(figsize=(4.5 * len(tasks), 5), layout="constrained")
    FigureCanvasAgg(figure)
    names, known = [*METHODS, RESERVOIR], {}
    for axis, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        for entry in (entry for entry in entries if entry["task"] == task):
            method, number = entry["method"], names.index(entry["method"])
            look = {"color": f"C{number % 10}", "label": method}
            curves = [one["curve"] for one in entry["runs"]]
            middle = [mean(p[1] for p in points) for points in zip(*curves, strict=False)]
            across = [point[0] for point in curves[0]][: len(middle)]
            if method == RESERVOIR:
                known[method] = axis.axhline(middle[0], linestyle=":", **look)
                continue
            style = ("-", "--")[number >= 10]
            (known[method],) = axis.plot(across, middle, style, marker=".", **look)
        axis.set(title=task, xlabel="queries", ylabel=TASKS[task][0])
        if TASKS[task][0] == "nmse":
            axis.set_yscale("log")
    figure.legend(
        handles=[known[n] for n in names if n in known], loc="outside lower center", ncol=5
    )
    figure.savefig(path, dpi=110)


def main() -> None:
    torch.set_num_threads(1)
    asked = options("recurrent", 1)
    chose: dict[str, float] = {}
    if asked.output.exists():
        old = json.loads(asked.output.read_text("utf-8"))["results"]
        chose = {
            one["method"]: one["rate"] for one in old if one["task"] == FIRST and "rate" in one
        }
    print("| task | method | lr | steps | of seeds 0, 1, 2 | mean |\n|---|---|---|---|---|---|")
    for work, (task, method) in chosen(WORKS, asked.only).items():
        rates = RATES if task == FIRST else (chose.get(method, RATES[0]),)
        entry = {"work": work, **measured(task, method, rates)}
        if task == FIRST and "rate" in entry:
            chose[method] = entry["rate"]
        found = merge(asked.output, [entry], WORKS, asked.rounds)
        draw(found, asked.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
