"""Node perturbation with and without decorrelated inputs, at equal queries.

    python -m benchmarks.node_perturbation

Digits, an MLP (64-64-32-10), 64 rows, 24 noisy passes and a clean one a row and step, NP, ANP and
INP, three seeds; backpropagation with the same steps beside them. Where inputs are decorrelated,
what that takes comes out of the same budget. Writes the record.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.private_directions import Curve
from benchmarks.results import write
from fwdlearn.local import learn_locally
from fwdlearn.recipe.build import assemble
from fwdlearn.recipe.load import load_recipe
from fwdlearn.trainer import Trainer

RECORD = Path(__file__).parent.parent / "records" / "node-perturbation"
SEEDS = (0, 1, 2)
ESTIMATORS = {
    "NP": "NodePerturbation",
    "ANP": "ActivityNodePerturbation",
    "INP": "IterativeNodePerturbation",
}
METHODS = (*ESTIMATORS, "backprop")
RATES = (0.01,)
DECORRELATION = (None, 0.01)


def run(method: str, decorrelation: float | None, rate: float, seed: int) -> dict[str, Any]:
    """One training run."""
    words = [f"optimizer.lr={rate}", f"seed={seed}"]
    if decorrelation is not None:
        words.append(f"model.decorrelation={decorrelation}")
    if method in ESTIMATORS:
        words.append(f"estimator.name={ESTIMATORS[method]}")
    curve = Curve()
    trainer = assemble(load_recipe(str(RECORD / "recipe.yaml"), words), [curve]).trainer
    if method == "backprop":
        curve.points = backpropagated(trainer)
    else:
        trainer.train()
    settings = {"method": method, "decorrelation": decorrelation, "lr": rate, "seed": seed}
    return settings | {"curve": curve.points}


def backpropagated(trainer: Trainer) -> list[tuple[int, float]]:
    """As many steps with true gradients. A step counts its rows once, and those learned from."""
    points, spent = [], 0
    assert trainer.evaluate_every is not None
    for step in range(1, trainer._planned() + 1):
        batch = trainer.batch(step - 1)
        loss = trainer.objective(trainer.model(*batch.args), batch.targets).mean()
        trainer.optimizer.zero_grad()
        loss.backward()
        trainer.optimizer.step()
        spent += len(batch) + learn_locally(trainer.model, batch)
        if step % trainer.evaluate_every == 0:
            points.append((spent, trainer.evaluate()["accuracy"]))
    return points


def main() -> None:
    torch.set_num_threads(1)
    jobs = itertools.product(METHODS, DECORRELATION, RATES, SEEDS)
    results = [run(*job) for job in jobs]
    write(RECORD / "results.json", results)
    print("| method | inputs | lr | test accuracy of seeds 0, 1, 2 | mean |\n|---|---|---|---|---|")
    for method, decorrelation, rate in itertools.product(METHODS, DECORRELATION, RATES):
        last = [r["curve"][-1][1] for r in _chosen(results, method, decorrelation, rate)]
        inputs = "as they are" if decorrelation is None else f"decorrelated ({decorrelation})"
        told = " ".join(f"{accuracy:.3f}" for accuracy in last)
        print(f"| {method} | {inputs} | {rate} | {told} | {mean(last):.3f} |")
    _plot(results)


def _chosen(
    results: list[dict[str, Any]], method: str, decorrelation: float | None, rate: float
) -> list[dict[str, Any]]:
    wanted = (method, decorrelation, rate)
    return [r for r in results if (r["method"], r["decorrelation"], r["lr"]) == wanted]


def _plot(results: list[dict[str, Any]]) -> None:
    """Mean over seeds at the better of the two learning rates."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for number, method in enumerate(ESTIMATORS):
        for decorrelation, line in zip(DECORRELATION, ("-", "--"), strict=True):
            sets = [_chosen(results, method, decorrelation, rate) for rate in RATES]
            best = max(sets, key=lambda runs: mean(r["curve"][-1][1] for r in runs))
            queries = [point[0] for point in best[0]["curve"]]
            heights = zip(*([a for _, a in r["curve"]] for r in best), strict=True)
            label = method if decorrelation is None else f"{method}, decorrelated {decorrelation}"
            axes.plot(queries, [mean(h) for h in heights], f"C{number}{line}", label=label)
    axes.set(xlabel="queries", ylabel="test accuracy", title="Digits, MLP, 24 noisy passes a row")
    axes.legend()
    figure.tight_layout()
    figure.savefig(RECORD / "curves.png", dpi=110)


if __name__ == "__main__":
    main()
