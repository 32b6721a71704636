"""Seconds of a query with noise in the activations against plain inference, and of whole steps.

    python -m benchmarks.activation_noise [--rounds N] [--only PATTERN] [--device DEVICE]
        [--output FILE]

The denominator is the fastest plain inference over the same rows at any batch size, objective
included. Noise is drawn anew in every round, from a key of its own; drawing and adding count. A
step is a clean pass, the noisy queries, the sum over them and the gradient from it, and its
denominator counts the clean pass as queries too.
"""

from __future__ import annotations

from itertools import count
from typing import Any

import torch

from benchmarks import steps
from benchmarks.models import Work, cross_entropy, works
from benchmarks.options import chosen, options
from benchmarks.results import merge
from benchmarks.timing import interleaved
from fwdlearn.allocator import Plan
from fwdlearn.engine import Engine
from fwdlearn.keys import Key
from fwdlearn.memory import keep_freed_pages
from fwdlearn.noise import NoiseSum, SiteNoise
from fwdlearn.oracle import ModelOracle

SIGMA = 1e-2


class Noisy:
    """The parts of a step that perturbs activations."""

    def __init__(self, work: Work, law: str = "rademacher", linear: bool = False) -> None:
        self.engine, self.batch, self.law = Engine(work.model, cross_entropy), work.batch, law
        self.plan = Plan.uniform(work.rows, work.directions).to(work.device)
        self.numbers = count()
        sites = dict(ModelOracle(self.engine, self.batch).sites)
        matrices = (name for name, value in self.engine.params.items() if value.dim() > 1)
        self.only = tuple(set(matrices) & set(sites)) if linear else None

    def losses(self) -> None:
        """Noisy queries alone."""
        self._asked(ModelOracle(self.engine, self.batch))

    def step(self) -> None:
        """A gradient, and descent so small that the next round starts from the same weights."""
        oracle, plan = ModelOracle(self.engine, self.batch), self.plan
        clean = oracle.clean()
        noise, losses = self._asked(oracle)
        slopes = plan.weight * (losses - clean.losses[plan.row]) / SIGMA
        gradients = clean.gather(NoiseSum(noise, plan.row, plan.direction, slopes, plan.rows))
        with torch.no_grad():
            for name, gradient in gradients.items():
                self.engine.params[name].add_(gradient, alpha=-1e-9)

    def _asked(self, oracle: ModelOracle) -> tuple[SiteNoise, torch.Tensor]:
        plan, key = self.plan, Key.root(0).fold(next(self.numbers))
        noise = SiteNoise(key, dict(oracle.sites), plan.directions, self.law, only=self.only)
        return noise, oracle.noisy_losses(plan.row, noise, plan.direction, SIGMA)


def measure(work: Work, rounds: int) -> list[dict[str, Any]]:
    """Every variant of one work."""
    rows, queries = work.rows, work.rows * work.directions
    index = torch.arange(rows).repeat_interleave(work.directions)
    sizes = {rows // 4, rows, 2 * rows, 4 * rows}
    variants = steps.plain(work.model, work.batch, index, sizes)
    counts = dict.fromkeys(variants, queries)
    every, linear = Noisy(work), Noisy(work, linear=True)
    variants |= {
        "signs, all layers": every.losses,
        "signs, matrices alone": linear.losses,
        "normal, matrices alone": Noisy(work, "gaussian", linear=True).losses,
        "step, all layers": every.step,
        "step, matrices alone": linear.step,
    }
    seconds = interleaved(variants, rounds, work.device.type)
    each = {
        name: total / (queries + rows * name.startswith("step")) for name, total in seconds.items()
    }
    best = min(each[name] for name in counts)
    return [
        {"work": work.name, "variant": name, "seconds": value, "of_inference": best / value}
        for name, value in each.items()
    ]


def main() -> None:
    asked = options("activation_noise", rounds=15)
    keep_freed_pages()
    everything = {name: make for name, make in works().items() if "256 L=4" in name}
    print(f"{asked.device}, {torch.get_num_threads()} threads")
    print(f"{'work':40}{'variant':26}{'ms/query':>10}{'of inference':>14}")
    results = []
    for make in chosen(everything, asked.only).values():
        for entry in measure(make().to(asked.device), asked.rounds):
            results.append(entry)
            ms, ratio = 1e3 * entry["seconds"], entry["of_inference"]
            print(f"{entry['work']:40}{entry['variant']:26}{ms:10.4f}{ratio:14.3f}", flush=True)
    merge(asked.output, results, everything, asked.rounds, asked.device)


if __name__ == "__main__":
    main()
