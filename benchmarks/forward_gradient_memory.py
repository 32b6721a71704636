"""Memory of forward gradients against depth, beside backpropagation and gradient checkpointing.

    python -m benchmarks.forward_gradient_memory

The peak of live tensor bytes beside weights and input (`benchmarks/live.py`) of one gradient of a
chain of dense layers; every method drops each parameter's gradient as soon as it is final, so what
is left are activations, tangents and the numbers of the directions. Writes the record.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.backprop import backpropagate, prepared
from benchmarks.chains import WIDTH, losses, perceptron, rows
from benchmarks.live import LiveBytes
from benchmarks.results import write
from fwdlearn.allocator import Plan
from fwdlearn.batch import Batch
from fwdlearn.engine import Engine
from fwdlearn.estimators import ForwardGradient
from fwdlearn.keys import Key
from fwdlearn.moonwalk import Chain
from fwdlearn.objectives import cross_entropy
from fwdlearn.oracle import ModelOracle

RECORD = Path(__file__).parent.parent / "records" / "forward-gradient-memory"
DEPTHS = (6, 12, 24, 48, 96)
ROWS = 1024

Run = Callable[[], object]


def forward(chain: Chain, x: Tensor, targets: Tensor, tangents: int, sharing: int) -> Run:
    """One estimate, and each of its tensors formed and dropped."""
    engine, batch = Engine(chain, cross_entropy), Batch((x,), targets)
    plan, estimator = Plan.uniform(len(x), tangents, sharing), ForwardGradient()

    def run() -> None:
        oracle = ModelOracle(engine, batch)
        estimate, _ = estimator.estimate(oracle, oracle.params, None, key=Key.root(0), plan=plan)
        for name in estimate.grad:
            estimate.grad[name]

    # The choice of a rung, which runs every one of them on two rows, comes first.
    run()
    return run


def inference(chain: Chain, x: Tensor) -> Run:
    def run() -> None:
        with torch.inference_mode():
            chain(x)

    return run


def runs(chain: Chain, x: Tensor, targets: Tensor) -> Mapping[str, list[Run]]:
    """Name -> ways of one gradient, of which the least memory counts."""
    objective = losses(targets)

    def reverse(segment: float | None) -> Run:
        return lambda: backpropagate(chain, x, objective, segment)

    return {
        "backpropagation": [reverse(None)],
        "checkpointing, square root": [reverse(0.6), reverse(1.0)],
        "forward gradient, 8 tangents": [forward(chain, x, targets, 8, ROWS)],
        "forward gradient, 1 tangent": [forward(chain, x, targets, 1, ROWS)],
        "forward gradient, 1 a row": [forward(chain, x, targets, 1, 1)],
        "inference": [inference(chain, x)],
    }


def measure() -> list[dict[str, Any]]:
    """Peak against depth."""
    found = []
    x, targets = rows((WIDTH,), ROWS)
    for depth in DEPTHS:
        chain = prepared(perceptron(depth))
        weights = sum(p.numel() * p.element_size() for p in chain.parameters())
        for name, ways in runs(chain, x, targets).items():
            sizes = []
            for run in ways:
                with LiveBytes() as live:
                    run()
                sizes.append(live.peak)
            seen = {"peak_bytes": min(sizes), "weights_bytes": weights}
            found.append({"method": name, "depth": depth, **seen})
    return found


def table(sizes: list[dict[str, Any]]) -> None:
    print(f"{'MiB at depth':32}" + "".join(f"{depth:8}" for depth in DEPTHS))
    for name in dict.fromkeys(size["method"] for size in sizes):
        peaks = [size["peak_bytes"] / 2**20 for size in sizes if size["method"] == name]
        print(f"{name:32}" + "".join(f"{peak:8.1f}" for peak in peaks))


def plot(sizes: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for name in dict.fromkeys(size["method"] for size in sizes):
        mine = [size for size in sizes if size["method"] == name]
        peaks = [size["peak_bytes"] / 2**20 for size in mine]
        axes.plot([size["depth"] for size in mine], peaks, marker="o", markersize=3, label=name)
    for axis, log in ((axes.xaxis, axes.set_xscale), (axes.yaxis, axes.set_yscale)):
        log("log", base=2)
        axis.set_major_formatter("{x:g}")
    axes.set(xlabel="layers", ylabel="peak of live tensors, MiB")
    axes.set_title(f"Dense {WIDTH} and leaky ReLU, {ROWS:,} rows, float32", fontsize=10)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(RECORD / "memory.png", dpi=110)


def main() -> None:
    sizes = measure()
    write(RECORD / "results.json", sizes)
    table(sizes)
    plot(sizes)


if __name__ == "__main__":
    main()
