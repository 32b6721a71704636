"""Fashion-MNIST by likelihood ratio: the recipe of the record, from scratch.

    python -m benchmarks.likelihood_ratio_fashion FOLDER

FOLDER holds the four IDX files. One seed, which says what the recipe reaches and compares nothing.
Writes the record.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from time import process_time

import torch

from benchmarks.logs import Log
from benchmarks.results import write
from fwdlearn.recipe.build import assemble
from fwdlearn.recipe.load import load_recipe

RECORD = Path(__file__).parent.parent / "records" / "likelihood-ratio-fashion-mnist"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    torch.set_num_threads(1)
    log, words = Log(), [f"data.path={parser.parse_args().folder}", "trainer.device=cpu"]
    begun = process_time()
    assemble(load_recipe(str(RECORD / "recipe.yaml"), words), [log]).trainer.train()
    evaluations = [dict(one) for one in log.records if "eval.accuracy" in one]
    results = {
        "cpu_seconds": process_time() - begun,
        "summary": log.summary,
        "evaluations": evaluations,
    }
    write(RECORD / "results.json", results)
    plot(evaluations)


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
