"""Training by likelihood ratio, beside backpropagation with the same steps.

    python -m benchmarks.likelihood_ratio_training [PART or PART:SEED ...]

Parts: `digits`, an MLP (64-64-32-10), 24 noisy forwards a sample, 20 epochs, four seeds;
`quickstart`, the recipe of that name, three seeds. Writes the record, run by run.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean
from time import process_time
from typing import Any

import torch

from benchmarks.logs import Log
from benchmarks.results import write
from fwdlearn.recipe.build import assemble
from fwdlearn.recipe.load import load_recipe

RECORD = Path(__file__).parent.parent / "records" / "likelihood-ratio-training"
DIGITS = [
    "model.hidden=[64, 32]",
    "allocator.directions=24",
    "trainer.batch_size=64",
    # 22 steps are an epoch.
    "trainer.steps=440",
    "trainer.evaluate_every=44",
    "optimizer.lr=0.01",
]
# What a recipe is changed by, and how many seeds.
PARTS: dict[str, tuple[list[str], int]] = {"digits": (DIGITS, 4), "quickstart": ([], 3)}
METHODS = ("likelihood ratio", "backprop")


def run(part: str, method: str, seed: int) -> dict[str, Any]:
    """One training run."""
    log, words = Log(), [*PARTS[part][0], f"seed={seed}", "trainer.device=cpu"]
    trainer = assemble(load_recipe("quickstart", words), [log]).trainer
    begun, curve = process_time(), []
    if method == "backprop":
        for step in range(1, trainer.steps + 1):
            batch = trainer.batch(step - 1)
            loss = trainer.objective(trainer.model(*batch.args), batch.targets).mean()
            trainer.optimizer.zero_grad()
            loss.backward()
            trainer.optimizer.step()
            trainer.schedule.step()
            if step % trainer.evaluate_every == 0:
                curve.append((step * len(batch), trainer.evaluate()["accuracy"]))
    else:
        trainer.train()
        curve = log.curve("eval.accuracy")
    seconds = process_time() - begun
    return {
        "part": part,
        "method": method,
        "seed": seed,
        "cpu_seconds": seconds,
        "settings": words,
        "curve": curve,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=list(PARTS), metavar="PART")
    parts = parser.parse_args().parts
    torch.set_num_threads(1)
    path = RECORD / "results.json"
    results = json.loads(path.read_text("utf-8"))["results"] if path.exists() else []
    for word in parts:
        part, _, only = word.partition(":")
        for seed in [int(only)] if only else range(PARTS[part][1]):
            for method in METHODS:
                place = {"part": part, "method": method, "seed": seed}
                entry = run(part, method, seed)
                results = [old for old in results if not place.items() <= old.items()]
                results.append(entry)
                accuracy, seconds = entry["curve"][-1][1], entry["cpu_seconds"]
                print(f"{part:12}{method:18}{seed:3}{accuracy:8.4f}{seconds:8.1f} s", flush=True)
                write(path, results)
    plot(results)


def plot(results: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    parts = [part for part in PARTS if any(entry["part"] == part for entry in results)]
    figure, panels = pyplot.subplots(
        1, len(parts), figsize=(4.2 * len(parts), 3.6), sharey=True, squeeze=False
    )
    for part, axes in zip(parts, panels[0], strict=True):
        for method, colour in (("likelihood ratio", "C0"), ("backprop", "C7")):
            runs = [e for e in results if (e["part"], e["method"]) == (part, method)]
            for number, entry in enumerate(runs):
                steps = [(place + 1) / len(entry["curve"]) for place in range(len(entry["curve"]))]
                best = mean(e["curve"][-1][1] for e in runs)
                label = f"{method}, {best:.3f}" if number == 0 else None
                accuracy = [point[1] for point in entry["curve"]]
                axes.plot(steps, accuracy, colour, alpha=0.7, label=label)
        axes.set(xlabel="share of the steps", title=part, ylim=(0.3, 1))
        axes.legend(loc="lower right")
    panels[0][0].set_ylabel("test accuracy")
    figure.tight_layout()
    figure.savefig(RECORD / "curves.png", dpi=110)


if __name__ == "__main__":
    main()
