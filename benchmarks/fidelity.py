"""Cosine of estimates with the exact gradient against queries, for every registered estimator.

    python -m benchmarks.fidelity [--rounds N] [--only PATTERN] [--output FILE]

Digits, 64 rows: a perceptron (64-64-32-10), a small CNN and a small ViT, with their first weights
and after 200 steps of Adam along exact gradients. Every estimator with its defaults, and the
settings of `VARIANTS`, as many private directions a row as the queries pay for, clean passes
included; a round is a batch of its own with noise of its own. An estimator with a state first makes
`WARM` estimates on other batches, with the same weights. The share is the projection of the
estimate on the gradient, 1 on average where the mean of estimates is the gradient; batches with
hardly a gradient left are in the mean like any other. Draws a plot beside the results where
matplotlib is installed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor

from benchmarks.options import chosen, options
from benchmarks.results import merge
from fwdlearn.allocator import Plan
from fwdlearn.allocators import Uniform
from fwdlearn.baselines import Backpropagation, BaselineTrainer, ReverseOracle
from fwdlearn.batch import Batch
from fwdlearn.data import Data, digits
from fwdlearn.engine import Engine
from fwdlearn.errors import UsageError
from fwdlearn.estimator import Estimator
from fwdlearn.keys import Key
from fwdlearn.memory import keep_freed_pages
from fwdlearn.models import Built, cnn, mlp, vit
from fwdlearn.objectives import cross_entropy
from fwdlearn.oracle import TimeOracle
from fwdlearn.registry import entries, load

ROWS, STEPS, WARM = 64, 200, 8
QUERIES = (6, 12, 24, 48, 96, 192)
"""Of a row, at most."""

MODELS: Mapping[str, Callable[[Data], Built]] = {
    "MLP": lambda data: mlp(data.info, hidden=(64, 32)),
    "CNN": lambda data: cnn(data.info, channels=(8, 16)),
    "ViT": lambda data: vit(data.info, patch=2, width=32, depth=2),
}
VARIANTS: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("RandomPerturbation", {"baseline": "leave-one-out"}),
    ("ForwardGradient", {"combination": "projection"}),
    ("LikelihoodRatio", {"baseline": "antithetic"}),
    ("LikelihoodRatio", {"noise": "hybrid"}),
)


@dataclass(frozen=True)
class Work:
    """A model at a point of its training, and where its batches come from."""

    engine: Engine
    trainer: BaselineTrainer

    def batch(self, number: int) -> Batch:
        # None that it was trained on lately.
        return self.trainer.batch(STEPS + number)


def work(model: str, trained: bool) -> Work:
    data = digits()
    module = MODELS[model](data).module
    optimizer = torch.optim.Adam(module.parameters(), lr=0.003)
    parts = (module, data, cross_entropy, Backpropagation(), Uniform(1), optimizer)
    trainer = BaselineTrainer(*parts, batch_size=ROWS, steps=STEPS)
    if trained:
        accuracy = trainer.train()["eval.accuracy"]
        print(f"{model} after {STEPS} steps: accuracy {accuracy:.3f}")
    return Work(Engine(module, cross_entropy), trainer)


def estimators() -> Iterator[tuple[str, Estimator]]:
    """Label -> estimator."""
    for name, entry in entries("estimator").items():
        if load(entry.target)().traits.needs is TimeOracle:
            # Of recurrent networks: `benchmarks.recurrent`.
            continue
        yield name, load(entry.target)()
        for other, settings in VARIANTS:
            if other == name:
                shown = ", ".join(str(value) for value in settings.values())
                yield f"{name}, {shown}", load(entry.target)(**settings)


def measure(name: str, at: Work, rounds: int) -> Iterator[dict[str, Any]]:
    """Every estimator at every number of queries."""
    exact = [ReverseOracle(at.engine, at.batch(number)).gradient()[0] for number in range(rounds)]
    for label, estimator in estimators():
        traits = estimator.traits
        for most in QUERIES:
            directions = (most - traits.queries_per_row) // traits.queries_per_direction
            if directions < 1:
                continue
            try:
                entry = average(at, estimator, directions, exact)
            except UsageError as error:
                print(f"{name:14}{label:42}{most:8}  skipped: {error}")
                break
            yield {"work": name, "estimator": label, "directions": directions, **entry}


def average(
    at: Work, estimator: Estimator, directions: int, exact: Sequence[Mapping[str, Tensor]]
) -> dict[str, float]:
    """Means over batches 0, 1, ..., of which the exact gradients are given."""
    plan, state = Plan.uniform(ROWS, directions), estimator.init(at.engine.params)
    cosines, shares, queries, seconds = [], [], 0, 0.0
    warm = WARM if state is not None else 0
    for number in (*range(len(exact), len(exact) + warm), *range(len(exact))):
        oracle = ReverseOracle(at.engine, at.batch(number))
        started = time.perf_counter()
        found, state = estimator.estimate(
            oracle, oracle.params, state, key=Key.root(number), plan=plan
        )
        if number >= len(exact):
            continue
        # Building the tensors is a part of the estimate.
        gradient = exact[number]
        pairs = [(found.grad[name].double(), gradient[name].double()) for name in gradient]
        seconds += time.perf_counter() - started
        inner = sum(float((one * other).sum()) for one, other in pairs)
        squares = [sum(float(pair[side].square().sum()) for pair in pairs) for side in (0, 1)]
        cosines.append(inner / math.sqrt(squares[0] * squares[1]))
        shares.append(inner / squares[1])
        queries = found.queries
    return {
        "queries_per_row": queries / ROWS,
        "cosine": mean(cosines),
        "spread": stdev(cosines) if len(cosines) > 1 else 0.0,
        "share": mean(shares),
        "seconds": seconds / len(exact),
    }


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """A panel for each model and state that was measured. Nothing where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    works = list(dict.fromkeys(entry["work"] for entry in results))
    columns = -(-len(works) // 2)
    figure: Any = Figure(figsize=(1 + 4 * columns, 8), layout="constrained")
    panels = list(figure.subplots(2, columns, sharey=True, squeeze=False).T.flat)
    for panel in panels[len(works) :]:
        panel.remove()
    axes = dict(zip(works, panels, strict=False))
    labels = list(dict.fromkeys(entry["estimator"] for entry in results))
    for number, label in enumerate(labels):
        # Ten colours, then the same ones dashed.
        style = {"color": f"C{number % 10}", "linestyle": ("-", "--", ":")[number // 10 % 3]}
        for name, axis in axes.items():
            line = [e for e in results if (e["work"], e["estimator"]) == (name, label)]
            across = [entry["queries_per_row"] for entry in line]
            axis.plot(across, [entry["cosine"] for entry in line], label=label, **style)
    for name, axis in axes.items():
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.set(title=name, xlabel="queries of a row", ylabel="cosine with the gradient")
    handles, _ = next(iter(axes.values())).get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=100)


def _works() -> dict[str, Callable[[], Work]]:
    def maker(model: str, trained: bool) -> Callable[[], Work]:
        return lambda: work(model, trained)

    return {
        f"{model}, {state}": maker(model, state == "trained")
        for model in MODELS
        for state in ("first", "trained")
    }


def main() -> None:
    asked = options("fidelity", rounds=4)
    keep_freed_pages()
    head = f"{'queries':>8}{'cosine':>9}{'spread':>8}{'share':>8}{'seconds':>9}"
    print(f"{'work':14}{'estimator':42}{head}")
    for name, made in chosen(_works(), asked.only).items():
        results = []
        for entry in measure(name, made(), asked.rounds):
            results.append(entry)
            cells = f"{entry['queries_per_row']:8.0f}{entry['cosine']:9.3f}{entry['spread']:8.3f}"
            cells += f"{entry['share']:8.2f}{entry['seconds']:9.3f}"
            print(f"{name:14}{entry['estimator']:42}{cells}", flush=True)
        # After each, so that a run that is stopped has not been for nothing.
        plot(merge(asked.output, results, _works(), asked.rounds), asked.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
