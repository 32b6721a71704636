"""Seconds of a query against plain inference, whole steps: noise, losses and update included.

    python -m benchmarks.throughput

The denominator is the fastest plain inference over the same rows at any batch size, objective
included. Beside the fold stand backpropagation (one gradient of the same rows, its cost in forward
passes) and the recipe of the published in-place method: a normal for every weight drawn again from
its seed, four sweeps over the weights for two forward passes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.results import FOLDER, write
from benchmarks.timing import interleaved
from fwdlearn.allocator import Plan
from fwdlearn.batch import Batch
from fwdlearn.engine import Engine
from fwdlearn.estimators import RandomPerturbation
from fwdlearn.keys import Key
from fwdlearn.oracle import ModelOracle

ESTIMATOR = RandomPerturbation(1e-3, "leave-one-out")


@dataclass(frozen=True)
class Work:
    """A model and its rows, and how many directions each row gets."""

    name: str
    model: nn.Module
    batch: Batch
    directions: int


class Encoder(nn.Module):
    """A transformer encoder on vectors, with a classifier on the mean."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            width, width // 32, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.body = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean(1))


class Wide(nn.Module):
    """One linear layer, applied to every token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).mean(1)


def cross_entropy(output: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(output, targets, reduction="none")


def works() -> list[Work]:
    """The workloads, with weights and rows that are not zero."""
    torch.manual_seed(0)

    def rows(count: int, tokens: int, width: int) -> Batch:
        return Batch((torch.randn(count, tokens, width),), torch.randint(0, 10, (count,)))

    return [
        Work("encoder d=256 L=4, 8 x (4 x 64)", Encoder(256, 4).eval(), rows(4, 64, 256), 8),
        Work("encoder d=384 L=6, 8 x (16 x 64)", Encoder(384, 6).eval(), rows(16, 64, 384), 8),
        Work("linear d=1024, 8 x (16 x 8)", Wide(1024), rows(16, 8, 1024), 8),
        Work("linear d=1024, 8 x (128 x 1)", Wide(1024), rows(128, 1, 1024), 8),
    ]


def fold(work: Work, sharing: int) -> Callable[[], None]:
    """A whole step: estimate and plain gradient descent."""
    engine = Engine(work.model, cross_entropy, rung="fold")
    plan = Plan.uniform(len(work.batch), work.directions, sharing)
    steps = iter(range(10**9))

    def step() -> None:
        oracle = ModelOracle(engine, work.batch)
        key = Key.root(0).fold(next(steps))
        estimate, _ = ESTIMATOR.estimate(oracle, oracle.params, None, key=key, plan=plan)
        with torch.no_grad():
            for name, parameter in engine.params.items():
                parameter.add_(estimate.grad[name], alpha=-1e-9)

    return step


def inference(work: Work, size: int) -> Callable[[], None]:
    """Plain losses of as many rows as the step has queries, `size` at a time."""
    index = torch.arange(len(work.batch) * work.directions) % len(work.batch)

    def run() -> None:
        with torch.inference_mode():
            for part in index.split(size):
                rows = work.batch.select(part)
                cross_entropy(work.model(*rows.args), rows.targets)

    return run


def backprop(work: Work) -> Callable[[], None]:
    """One gradient of the batch."""

    def step() -> None:
        loss = cross_entropy(work.model(*work.batch.args), work.batch.targets).mean()
        loss.backward()
        with torch.no_grad():
            for parameter in work.model.parameters():
                assert parameter.grad is not None
                parameter.add_(parameter.grad, alpha=-1e-9)
                parameter.grad = None

    return step


def in_place(work: Work) -> Callable[[], None]:
    """As many queries by the published in-place recipe, two forward passes a direction."""
    parameters = list(work.model.parameters())

    def sweep(seed: int, scale: float) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in parameters:
            noise = torch.empty_like(parameter).normal_(generator=generator)
            parameter.add_(noise, alpha=scale)

    def losses() -> Tensor:
        return cross_entropy(work.model(*work.batch.args), work.batch.targets).mean()

    def step() -> None:
        with torch.no_grad():
            for seed in range(work.directions // 2):
                sweep(seed, 1e-3)
                up = losses()
                sweep(seed, -2e-3)
                down = losses()
                sweep(seed, 1e-3)
                sweep(seed, -1e-9 * float(up - down))

    return step


def main() -> None:
    results = []
    print(f"{'work':36}{'variant':26}{'ms/query':>9}{'of inference':>14}")
    for work in works():
        rows, queries = len(work.batch), len(work.batch) * work.directions
        sizes = sorted({rows, 2 * rows, 4 * rows, queries, max(1, rows // 4)})
        variants = {f"inference by {size}": inference(work, size) for size in sizes}
        variants |= {
            "fold, private": fold(work, 1),
            "fold, shared": fold(work, rows),
            "in place, seed replay": in_place(work),
            "backprop, per row": backprop(work),
        }
        seconds = interleaved(variants)
        best = min(seconds[f"inference by {size}"] for size in sizes) / queries
        for name, total in seconds.items():
            each = total / (rows if name.startswith("backprop") else queries)
            print(f"{work.name:36}{name:26}{1e3 * each:9.3f}{best / each:14.2f}")
            results.append(
                {"work": work.name, "variant": name, "seconds": each, "of_inference": best / each}
            )
    write(FOLDER / "throughput.json", results)


if __name__ == "__main__":
    main()
