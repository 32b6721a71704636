"""Directions private to a row against directions shared by the batch, at equal queries.

    python -m benchmarks.private_directions

Digits, an MLP, 64 rows, 2 directions and a clean pass a row, 1,500 Adam steps, three seeds, three
learning rates each; backpropagation with the same steps beside them. Writes the record.
"""

from __future__ import annotations

import itertools
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.logs import Log
from benchmarks.results import write
from fwdlearn.recipe.build import assemble
from fwdlearn.recipe.load import load_recipe

RECORD = Path(__file__).parent.parent / "records" / "private-directions"
SEEDS = (0, 1, 2)
RATES = {
    "shared": (0.001, 0.003, 0.01),
    "private": (0.001, 0.003, 0.01),
    "backprop": (0.001, 0.003),
}


def run(job: tuple[str, float, int]) -> dict[str, Any]:
    """One training run: method, learning rate, seed."""
    method, rate, seed = job
    torch.set_num_threads(1)
    words = [f"optimizer.lr={rate}", f"seed={seed}"]
    if method != "backprop":
        words.append(f"allocator.sharing={method}")
    log = Log()
    assembly = assemble(load_recipe(str(RECORD / "recipe.yaml"), words), [log])
    if method == "backprop":
        curve = _backprop(assembly.trainer)
    else:
        assembly.trainer.train()
        curve = log.curve("eval.accuracy")
    return {"method": method, "lr": rate, "seed": seed, "curve": curve}


def _backprop(trainer: Any) -> list[tuple[int, float]]:
    """The same model, batches and optimizer with true gradients. A step counts its rows once."""
    points = []
    for step in range(1, trainer.steps + 1):
        batch = trainer.batch(step - 1)
        loss = trainer.objective(trainer.model(*batch.args), batch.targets).mean()
        trainer.optimizer.zero_grad()
        loss.backward()
        trainer.optimizer.step()
        if step % trainer.evaluate_every == 0:
            points.append((step * len(batch), trainer.evaluate()["accuracy"]))
    return points


def main() -> None:
    jobs = [
        (method, rate, seed)
        for method, rates in RATES.items()
        for rate, seed in itertools.product(rates, SEEDS)
    ]
    with ProcessPoolExecutor(2) as pool:
        results = list(pool.map(run, jobs))
    print(f"{'method':10}{'lr':>8}   test accuracy of each seed        mean")
    for method, rates in RATES.items():
        for rate in rates:
            last = [r["curve"][-1][1] for r in results if (r["method"], r["lr"]) == (method, rate)]
            print(f"{method:10}{rate:8}   {'  '.join(f'{a:.4f}' for a in last)}   {mean(last):.4f}")
    write(RECORD / "results.json", results)
    _plot(results)


def _plot(results: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for method, colour in (("private", "C0"), ("shared", "C1")):
        best = max(
            RATES[method],
            key=lambda rate, m=method: mean(
                r["curve"][-1][1] for r in results if (r["method"], r["lr"]) == (m, rate)
            ),
        )
        curves = [r["curve"] for r in results if (r["method"], r["lr"]) == (method, best)]
        for number, curve in enumerate(curves):
            label = f"{method}, lr {best}" if number == 0 else None
            axes.plot(*zip(*curve, strict=True), colour, label=label, alpha=0.8)
    axes.set(
        xlabel="queries", ylabel="test accuracy", title="Digits, MLP, 64 rows, 2 directions a row"
    )
    axes.legend()
    figure.tight_layout()
    figure.savefig(RECORD / "curves.png", dpi=110)


if __name__ == "__main__":
    main()
