"""How the cost of a query grows with directions, depth, tokens and width.

    python -m benchmarks.scaling [--rounds N] [--only PATTERN] [--output FILE]

Plain pre-norm blocks, four rows, whole steps; one number changes at a time, the others stay as in
`BASE`. Costs are those of a query relative to the fastest plain inference on the same rows. Draws
a plot beside the results where matplotlib is installed.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import steps
from benchmarks.models import Transformer, vectors
from benchmarks.options import chosen, options
from benchmarks.results import merge
from benchmarks.timing import interleaved
from fwdlearn.allocator import Plan
from fwdlearn.memory import keep_freed_pages

ROWS = 4
BASE = {"directions": 8, "depth": 4, "tokens": 32, "width": 256}
SWEEPS = {
    "directions": (1, 2, 4, 8, 16, 32, 64, 128, 256),
    "depth": (1, 2, 4, 8),
    "tokens": (8, 16, 32, 64, 128),
    "width": (64, 128, 256, 512),
}
FOLDS = {"private": 1, "shared": ROWS}

Results = list[dict[str, Any]]


def measure(sweep: str, value: int, rounds: int) -> dict[str, Any]:
    """One point: seconds of a query, and costs relative to inference."""
    at = BASE | {sweep: value}
    network = partial(Transformer, at["width"], at["depth"])
    model, batch = vectors(network, ROWS, at["tokens"], at["width"])
    plans = {name: Plan.uniform(ROWS, at["directions"], rows) for name, rows in FOLDS.items()}
    index = plans["private"].row
    variants = steps.plain(model, batch, index, {1, 4, 8, 16, 32, 64})
    variants |= {name: steps.fold(model, batch, plan) for name, plan in plans.items()}
    seconds = {k: total / len(index) for k, total in interleaved(variants, rounds).items()}
    best = min((name for name in seconds if name not in FOLDS), key=lambda name: seconds[name])
    costs = {f"cost_{name}": seconds[name] / seconds[best] for name in FOLDS}
    return {"work": sweep, "value": value, "best": best, "inference": seconds[best]} | costs


def plot(results: Results, path: Path) -> None:
    """A panel for each sweep that was measured. Nothing where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    sweeps = list(dict.fromkeys(entry["work"] for entry in results))
    size = (1 + 3 * len(sweeps), 3.4)
    figure, grid = pyplot.subplots(1, len(sweeps), figsize=size, sharey=True, squeeze=False)
    axes = grid[0]
    for axis, sweep in zip(axes, sweeps, strict=True):
        points = [entry for entry in results if entry["work"] == sweep]
        for name in FOLDS:
            costs = [entry[f"cost_{name}"] for entry in points]
            axis.plot([entry["value"] for entry in points], costs, marker="o", label=name)
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.set(xlabel=sweep if sweep != "directions" else "directions of a row")
    axes[0].set(ylabel="a query / plain inference", ylim=(0, None))
    axes[0].legend(title="directions", fontsize=8)
    fixed = ", ".join(f"{value} {name}" for name, value in BASE.items())
    figure.suptitle(f"{ROWS} rows; where not on the axis: {fixed}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    asked = options("scaling", rounds=5)
    keep_freed_pages()
    print(f"{torch.get_num_threads()} threads")
    print(f"{'sweep':12}{'value':>6}{'inference ms':>14}  {'best':18}{'private':>9}{'shared':>9}")
    results = []
    for sweep, values in chosen(SWEEPS, asked.only).items():
        for value in values:
            entry = measure(sweep, value, asked.rounds)
            print(
                f"{sweep:12}{value:6}{1e3 * entry['inference']:14.3f}  {entry['best']:18}", end=""
            )
            print(f"{entry['cost_private']:9.3f}{entry['cost_shared']:9.3f}", flush=True)
            results.append(entry)
    everything = merge(asked.output, results, SWEEPS, asked.rounds)
    plot(everything, asked.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
