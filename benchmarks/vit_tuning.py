"""A vision transformer that knows some classes of Fashion-MNIST learns the others forward-only.

    python -m benchmarks.vit_tuning FOLDER [--save FILE]

FOLDER holds the four IDX files. The model is pretrained by backpropagation on classes 0 to 4. Then
all its weights and a new head are tuned on 400 images of classes 5 to 9, once for each allocator,
at equal queries, with the same images, batches and first weights for a seed. At the start and at
the end of the tuning the squared error of each allocator's estimates is measured. Writes
records/allocation/vit.json; --save keeps the pretrained weights, for the recipe.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import nn

from benchmarks.allocation import RECORD, Bench, Known, _backprop, descend, interval
from benchmarks.results import write
from fwdlearn.allocator import Allocator
from fwdlearn.allocators import BernoulliAllocator, GaussianAllocator, Neyman, Uniform
from fwdlearn.data import Data, Rows, idx
from fwdlearn.estimators import LikelihoodRatio
from fwdlearn.keys import Key
from fwdlearn.models import vit
from fwdlearn.objectives import cross_entropy
from fwdlearn.trainer import Trainer

SIZES: dict[str, Any] = {"patch": 7, "width": 32, "depth": 2, "heads": 4}
SEEDS, DIRECTIONS, ROWS, STEPS, RATE = range(3), 8, 32, 250, 3e-3


def rules() -> dict[str, Allocator]:
    return {
        "uniform": Uniform(DIRECTIONS),
        "residual": Neyman(DIRECTIONS),
        "gaussian": GaussianAllocator(DIRECTIONS),
        "bernoulli": BernoulliAllocator(DIRECTIONS),
    }


def pretrained(folder: str) -> nn.Module:
    data = idx(folder, classes=range(5), train_rows=10000, evaluation_rows=2000)
    model = vit(data.info, **SIZES).module
    assert isinstance(data.train, Rows) and isinstance(data.evaluation, Rows)
    descend(model, data.train, 600, 2e-3, Key.root(0))
    with torch.inference_mode():
        batch = data.evaluation.batch(torch.arange(len(data.evaluation)))
        right = float((model(*batch.args).argmax(1) == batch.targets).float().mean())
    print(f"pretrained: {right:.3f} of the test images of classes 0 to 4", flush=True)
    return model


def begun(data: Data, weights: dict[str, Any], seed: int) -> nn.Module:
    """The pretrained model with a new head."""
    model = vit(data.info, seed=seed, **SIZES).module
    kept = {name: value for name, value in weights.items() if not name.startswith("head.")}
    model.load_state_dict(kept, strict=False)
    return model


def tuned(data: Data, model: nn.Module, rule: Allocator, seed: int) -> Trainer:
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    return Trainer(
        model,
        data,
        cross_entropy,
        LikelihoodRatio(),
        rule,
        optimizer,
        schedule=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS),
        batch_size=ROWS,
        steps=STEPS,
        seed=seed,
    )


def errors(model: nn.Module, data: Rows) -> dict[str, float]:
    """Squared errors over that of uniform counts, and the least there can be."""
    bench = Bench(model, data, LikelihoodRatio(), batches=3, rows=ROWS)
    base = mean(bench.errors(Uniform(DIRECTIONS), passes=4, warm=0))
    found = {"uniform's own": base, "best": bench.best()}
    for name, rule in {**rules(), "oracle": Known(DIRECTIONS)}.items():
        warm = 16 if name in ("gaussian", "bernoulli") else 0
        found[name] = mean(bench.errors(rule, passes=4, warm=warm)) / base
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vit_tuning")
    parser.add_argument("folder", help="of the IDX files")
    parser.add_argument("--save", type=Path, help="keeps the pretrained weights, as safetensors")
    asked = parser.parse_args()
    model = pretrained(asked.folder)
    if asked.save:
        from safetensors.torch import save_file

        save_file(model.state_dict(), asked.save)
    data = idx(asked.folder, classes=range(5, 10), train_rows=400, evaluation_rows=2000)
    assert isinstance(data.train, Rows)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    results: dict[str, Any] = {"runs": [], "errors": {}}
    results["errors"]["start"] = errors(begun(data, weights, 0), data.train)
    for seed in SEEDS:
        for name, rule in {"backprop": Uniform(DIRECTIONS), **rules()}.items():
            trainer = tuned(data, begun(data, weights, seed), rule, seed)
            if name == "backprop":
                _backprop(trainer, rule)
            else:
                trainer.train()
            if name == "uniform" and seed == 0:
                results["errors"]["end"] = errors(trainer.model, data.train)
            scores, fitted = trainer.evaluate(), trainer.evaluate(data.train)
            run = {"rule": name, "seed": seed, "train_loss": fitted["loss"], **scores}
            results["runs"].append(run)
            print(json.dumps(run), flush=True)
    write(RECORD / "vit.json", results)
    show(results)


def show(results: dict[str, Any]) -> None:
    for when, found in results["errors"].items():
        print(when, {name: round(value, 3) for name, value in found.items()})
    by: dict[str, list[Any]] = {}
    for run in results["runs"]:
        by.setdefault(run["rule"], []).append(run)
    print(f"{'rule':12}{'train loss':>12}{'test loss':>11}{'test':>8}  minus uniform's:", end=" ")
    print("train loss, test accuracy")
    for name, runs in by.items():
        gaps = [
            [run[figure] - other[figure] for run, other in zip(runs, by["uniform"], strict=True)]
            for figure in ("train_loss", "accuracy")
        ]
        figures = [mean(run[figure] for run in runs) for figure in ("train_loss", "loss")]
        accuracy = mean(run["accuracy"] for run in runs)
        print(f"{name:12}{figures[0]:12.4f}{figures[1]:11.4f}{accuracy:8.3f}  ", end="")
        print("   ".join("" if name == "uniform" else interval(gap) for gap in gaps))


if __name__ == "__main__":
    main()
