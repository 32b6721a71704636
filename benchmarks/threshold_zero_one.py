"""Hard thresholds and the 0-1 loss, with inputs of layers as they are, centred and decorrelated.

    python -m benchmarks.threshold_zero_one

The recipe `digits-threshold` and changes of it, at equal queries, three seeds: noise at the outputs
of layers, noise on weights, and straight-through gradients as a reference. That one takes a
backward pass and the cross entropy, since the 0-1 loss has nothing to pass back, and the slope of
the logistic function in the place of the threshold's. "Centred" says what the decorrelation is for:
pixels less their means, and thresholds from -1/2 to 1/2. Writes the record.
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
# Method, inputs of layers, learning rate.
SETTINGS = [
    ("noise at outputs", "decorrelated", 0.002),
    ("noise at outputs", "centred", 0.002),
    ("noise at outputs", "as they are", 0.002),
    ("noise at outputs", "as they are", 0.001),
    ("noise on weights, 0.05", "decorrelated", 0.002),
    ("noise on weights, 0.2", "decorrelated", 0.002),
    ("straight-through", "decorrelated", 0.002),
    ("straight-through", "as they are", 0.002),
]


class ThroughThreshold(nn.Module):
    """1 above 0, else 0, with the derivative of the logistic function."""

    def forward(self, x: Tensor) -> Tensor:
        smooth = x.sigmoid()
        return (x > 0).to(x.dtype) + smooth - smooth.detach()


class CentredThreshold(nn.Module):
    """1/2 above 0, else -1/2."""

    def forward(self, x: Tensor) -> Tensor:
        return (x > 0).to(x.dtype) - 0.5


def run(method: str, inputs: str, rate: float, seed: int) -> dict[str, Any]:
    """One training run."""
    words = [*METHODS[method], f"optimizer.lr={rate}", f"seed={seed}", "trainer.device=cpu"]
    if inputs != "decorrelated":
        words.append("model.decorrelation=null")
    curve = Curve()
    trainer = assemble(load_recipe("digits-threshold", words), [curve]).trainer
    model, rows = trainer.model, trainer.data.train
    known = rows.batch(torch.arange(len(rows)))
    if inputs == "centred":
        middle = known.args[0].flatten(1).mean(0)
        model.layers[0].register_forward_pre_hook(lambda _, args: (args[0] - middle,))
        model.activation = CentredThreshold()
    if method == "straight-through":
        model.activation = ThroughThreshold()
        curve.points = backpropagated(trainer)
    else:
        trainer.train()
    with torch.no_grad():
        predicted = model(*known.args).argmax(1).bincount(minlength=10)
    return {
        "method": method,
        "inputs": inputs,
        "lr": rate,
        "seed": seed,
        "training": trainer.evaluate(rows)["accuracy"],
        "classes_never_predicted": int((predicted == 0).sum()),
        "curve": curve.points,
    }


def main() -> None:
    torch.set_num_threads(1)
    results = []
    print("| method | inputs of layers | lr | queries | training | missing | test | mean |")
    print("|---|---|---|---|---|---|---|---|")
    for method, inputs, rate in SETTINGS:
        runs = [run(method, inputs, rate, seed) for seed in SEEDS]
        results += runs
        write(RECORD / "results.json", results)
        last, train = [r["curve"][-1][1] for r in runs], mean(r["training"] for r in runs)
        missing = " ".join(str(r["classes_never_predicted"]) for r in runs)
        told = " ".join(f"{accuracy:.3f}" for accuracy in last)
        line = f"| {method} | {inputs} | {rate} | {runs[0]['curve'][-1][0]:,} | {train:.3f} |"
        print(f"{line} {missing} | {told} | {mean(last):.3f} |", flush=True)


if __name__ == "__main__":
    main()
