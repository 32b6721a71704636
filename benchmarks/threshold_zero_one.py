"""Hard thresholds and the 0-1 loss, with inputs of layers as they are and decorrelated.

    python -m benchmarks.threshold_zero_one

The recipe `digits-threshold` and changes of it, at equal queries, three seeds: noise at the outputs
of layers, noise on weights, and straight-through gradients as a reference. That one takes a
backward pass and the cross entropy, since the 0-1 loss has nothing to pass back, and the slope of
the logistic function in the place of the threshold's. Writes the record.
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.node_perturbation import backpropagated
from benchmarks.private_directions import Curve
from benchmarks.results import write
from fwdlearn.recipe.build import assemble
from fwdlearn.recipe.load import load_recipe

RECORD = Path(__file__).parent.parent / "records" / "threshold-zero-one"
SEEDS = (0, 1, 2)
# Absolute, where the noise of the recipe is relative to a layer's output.
WEIGHTS = "estimator={{name: RandomPerturbation, sigma: {}, baseline: leave-one-out}}"
METHODS = {
    "noise at outputs": [],
    "noise on weights, 0.05": [WEIGHTS.format(0.05)],
    "noise on weights, 0.2": [WEIGHTS.format(0.2)],
    "straight-through": ["objective=cross_entropy"],
}
# Method, whether inputs are decorrelated, learning rate.
SETTINGS = [
    ("noise at outputs", True, 0.002),
    ("noise at outputs", False, 0.002),
    ("noise at outputs", False, 0.001),
    ("noise on weights, 0.05", True, 0.002),
    ("noise on weights, 0.2", True, 0.002),
    ("straight-through", True, 0.002),
    ("straight-through", False, 0.002),
]


class ThroughThreshold(nn.Module):
    """1 above 0, else 0, with the derivative of the logistic function."""

    def forward(self, x: Tensor) -> Tensor:
        smooth = x.sigmoid()
        return (x > 0).to(x.dtype) + smooth - smooth.detach()


def run(method: str, decorrelated: bool, rate: float, seed: int) -> dict[str, Any]:
    """One training run."""
    words = [*METHODS[method], f"optimizer.lr={rate}", f"seed={seed}", "trainer.device=cpu"]
    if not decorrelated:
        words.append("model.decorrelation=null")
    curve = Curve()
    trainer = assemble(load_recipe("digits-threshold", words), [curve]).trainer
    if method == "straight-through":
        trainer.model.activation = ThroughThreshold()
        curve.points = backpropagated(trainer)
    else:
        trainer.train()
    settings = {"method": method, "decorrelated": decorrelated, "lr": rate, "seed": seed}
    return settings | {"training": trainer.evaluate(trainer.data.train), "curve": curve.points}


def main() -> None:
    torch.set_num_threads(1)
    results = []
    print("| method | inputs of layers | lr | queries | training | test, seeds 0, 1, 2 | mean |")
    print("|---|---|---|---|---|---|---|")
    for method, decorrelated, rate in SETTINGS:
        runs = [run(method, decorrelated, rate, seed) for seed in SEEDS]
        results += runs
        write(RECORD / "results.json", results)
        queries, inputs = runs[0]["curve"][-1][0], "decorrelated" if decorrelated else "as they are"
        train = mean(r["training"]["accuracy"] for r in runs)
        last = [r["curve"][-1][1] for r in runs]
        told = " ".join(f"{accuracy:.3f}" for accuracy in last)
        line = f"| {method} | {inputs} | {rate} | {queries:,} | {train:.3f} | {told} |"
        print(f"{line} {mean(last):.3f} |", flush=True)


if __name__ == "__main__":
    main()
