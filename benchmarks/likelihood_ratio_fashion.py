"""Fashion-MNIST by likelihood ratio: the recipe of the record, from scratch.

    python -m benchmarks.likelihood_ratio_fashion FOLDER

FOLDER holds the four IDX files. One seed, which says what the recipe reaches and compares nothing.
Writes the record.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from time import process_time
from typing import Any

import torch

from benchmarks.results import write
from fwdlearn.recipe.build import assemble
from fwdlearn.recipe.load import load_recipe

RECORD = Path(__file__).parent.parent / "records" / "likelihood-ratio-fashion-mnist"


class Curve:
    """A sink that keeps what is logged."""

    def __init__(self) -> None:
        self.evaluations: list[dict[str, float]] = []
        self.summary: dict[str, Any] = {}

    def start(self, meta: Mapping[str, Any]) -> None: ...

    def log(self, record: Mapping[str, Any]) -> None:
        if "eval.accuracy" in record:
            self.evaluations.append(dict(record))

    def finish(self, summary: Mapping[str, Any]) -> None:
        self.summary = dict(summary)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    torch.set_num_threads(1)
    curve, words = Curve(), [f"data.path={parser.parse_args().folder}", "trainer.device=cpu"]
    begun = process_time()
    assemble(load_recipe(str(RECORD / "recipe.yaml"), words), [curve]).trainer.train()
    results = {
        "cpu_seconds": process_time() - begun,
        "summary": curve.summary,
        "evaluations": curve.evaluations,
    }
    write(RECORD / "results.json", results)
    plot(curve.evaluations)


def plot(evaluations: list[dict[str, float]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 3.6))
    axes.plot(*zip(*((e["queries"], e["eval.accuracy"]) for e in evaluations), strict=True), "o-")
    axes.set(xlabel="queries", ylabel="test accuracy", title="Fashion-MNIST, CNN, likelihood ratio")
    figure.tight_layout()
    figure.savefig(RECORD / "curve.png", dpi=110)


if __name__ == "__main__":
    main()
