"""Discrete units by forward passes, beside straight-through and ReinMax, at equal forwards.

    python -m benchmarks.discrete_units

Digits, two layers of 16 units that take one of 4 values each, and a linear head. The references
sample the units and pass gradients through the samples (24 forward and 24 backward passes a row and
step); the estimators see a network that takes the largest logit, whose derivative is zero wherever
there is one, and put noise into the logits (24 forward passes a row and step). Three seeds, two
learning rates, two noise sizes. Accuracy is that of the largest logits. Writes the record.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.private_directions import Curve
from benchmarks.references import one_hot, one_hot_sample, reinmax, straight_through
from benchmarks.results import write
from fwdlearn.allocators import Uniform
from fwdlearn.data import digits
from fwdlearn.estimator import Estimator
from fwdlearn.estimators import LikelihoodRatio, NodePerturbation
from fwdlearn.models.built import weights_from
from fwdlearn.objectives import cross_entropy
from fwdlearn.trainer import Trainer

RECORD = Path(__file__).parent.parent / "records" / "discrete-units"
SEEDS, RATES, SIGMAS = (0, 1, 2), (0.003, 0.01), (0.3, 1.0)
FORWARDS, STEPS, EVERY = 24, 300, 50
UNITS, CHOICES = 16, 4
REFERENCES = {"straight-through": straight_through, "ReinMax": reinmax}
# Noise is absolute for the one and relative to a layer's output for the other.
ESTIMATORS: dict[str, Callable[[float], Estimator]] = {
    "NodePerturbation": lambda sigma: NodePerturbation(sigma, law="gaussian"),
    "LikelihoodRatio": lambda sigma: LikelihoodRatio(sigma, law="gaussian"),
}


class DiscreteNet(nn.Module):
    """Two layers of units that each take one of several values, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        width = UNITS * CHOICES
        self.layers = nn.ModuleList([nn.Linear(64, width), nn.Linear(width, width)])
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor, unit: Callable[[Tensor], Tensor] = one_hot) -> Tensor:
        x = x.flatten(1)
        for layer in self.layers:
            x = unit(layer(x).unflatten(1, (UNITS, CHOICES))).flatten(1)
        out: Tensor = self.head(x)
        return out


def run(method: str, sigma: float | None, rate: float, seed: int) -> dict[str, Any]:
    """One training run."""
    with weights_from(seed):
        model = DiscreteNet().eval()
    curve = Curve()
    estimator = ESTIMATORS[method](sigma) if sigma is not None else NodePerturbation()
    trainer = Trainer(
        model,
        digits(),
        cross_entropy,
        estimator,
        Uniform(FORWARDS - 1),
        torch.optim.Adam(model.parameters(), lr=rate),
        batch_size=64,
        steps=STEPS,
        seed=seed,
        evaluate_every=EVERY,
        sinks=[curve],
    )
    if sigma is None:
        curve.points = _passed_through(trainer, REFERENCES[method], seed)
    else:
        trainer.train()
    return {"method": method, "sigma": sigma, "lr": rate, "seed": seed, "curve": curve.points}


def _passed_through(
    trainer: Trainer, through: Callable[[Tensor, Tensor], Tensor], seed: int
) -> list[tuple[int, float]]:
    """The same steps with gradients that pass through samples."""
    generator, points = torch.Generator().manual_seed(seed), []

    def unit(logits: Tensor) -> Tensor:
        return through(logits, one_hot_sample(logits.detach(), generator))

    for step in range(1, STEPS + 1):
        batch = trainer.batch(step - 1)
        images = batch.args[0].repeat(FORWARDS, 1, 1, 1)
        output = trainer.model(images, unit)
        loss = cross_entropy(output, batch.targets.repeat(FORWARDS)).mean()
        trainer.optimizer.zero_grad()
        loss.backward()
        trainer.optimizer.step()
        if step % EVERY == 0:
            points.append((step * len(images), trainer.evaluate()["accuracy"]))
    return points


def main() -> None:
    torch.set_num_threads(1)
    settings = [
        *itertools.product(REFERENCES, (None,), RATES),
        *itertools.product(ESTIMATORS, SIGMAS, RATES),
    ]
    results = [run(*setting, seed) for setting in settings for seed in SEEDS]
    write(RECORD / "results.json", results)
    print("| method | sigma | lr | test accuracy of seeds 0, 1, 2 | mean |\n|---|---|---|---|---|")
    for setting in settings:
        last = [r["curve"][-1][1] for r in _chosen(results, *setting)]
        told = " ".join(f"{accuracy:.3f}" for accuracy in last)
        method, sigma, rate = setting
        print(f"| {method} | {sigma or ''} | {rate} | {told} | {mean(last):.3f} |")
    _plot(results)


def _chosen(
    results: list[dict[str, Any]], method: str, sigma: float | None, rate: float
) -> list[dict[str, Any]]:
    return [r for r in results if (r["method"], r["sigma"], r["lr"]) == (method, sigma, rate)]


def _plot(results: list[dict[str, Any]]) -> None:
    """Mean over seeds at the best setting of each method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for method in (*REFERENCES, *ESTIMATORS):
        sigmas = SIGMAS if method in ESTIMATORS else (None,)
        sets = [_chosen(results, method, s, r) for s, r in itertools.product(sigmas, RATES)]
        best = max(sets, key=lambda runs: mean(r["curve"][-1][1] for r in runs))
        forwards = [point[0] for point in best[0]["curve"]]
        heights = zip(*([a for _, a in r["curve"]] for r in best), strict=True)
        axes.plot(forwards, [mean(h) for h in heights], label=method)
    axes.set(
        xlabel="forward passes of a row", ylabel="test accuracy", title="Digits, categorical units"
    )
    axes.legend()
    figure.tight_layout()
    figure.savefig(RECORD / "curves.png", dpi=110)


if __name__ == "__main__":
    main()
