"""How much of a small change of the weights is left in losses that are computed in short dtypes.

    python -m benchmarks.precision [--only PATTERN]

Differences of losses along random directions, beside those of the same rounded weights in float64:
in the fold, which adds what a direction contributes where a weight is used, and in place, where
the perturbed weight is rounded to its dtype as the published recipes round it. `one-sided` is
L(+sigma) - L(0), `two-sided` is L(+sigma) - L(-sigma). The error is that of all differences,
relative to their size: |found - truth| / |truth|; `slope` is how much of the truth is found.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.models import Parts, Transformer, minilm, vectors
from fwdlearn.batch import Batch
from fwdlearn.directions import Directions
from fwdlearn.engine import Engine
from fwdlearn.errors import MissingError
from fwdlearn.keys import Key
from fwdlearn.objectives import cross_entropy

DIRECTIONS = 16
SIGMAS = (1e-4, 1e-3, 1e-2)
DTYPES = (torch.float16, torch.bfloat16)
MODELS: dict[str, Callable[[], Parts]] = {
    "blocks d=128 L=3, 4 x 32": partial(vectors, partial(Transformer, 128, 3), 4, 32, 128),
    "MiniLM, 2 x 16": partial(minilm, "float32", 2, 16),
}


def differences(engine: Engine, batch: Batch, sigma: float) -> dict[str, Tensor]:
    """Kind -> float64 [directions * rows]."""
    rows = len(batch)
    row = torch.arange(rows).repeat(DIRECTIONS)
    direction = torch.arange(DIRECTIONS).repeat_interleave(rows)
    family = Directions(Key.root(0), dict(engine.params), DIRECTIONS)
    with torch.inference_mode():
        clean = engine.losses(batch, row).double()
        up, down = (
            engine.losses(batch, row, family, direction, scale).double()
            for scale in (sigma, -sigma)
        )
    return {"one-sided": up - clean, "two-sided": up - down}


def rounded(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    return copy.deepcopy(model).to(dtype)


def main() -> None:
    asked = argparse.ArgumentParser(prog="python -m benchmarks.precision")
    asked.add_argument("--only", default="*", help="pattern of the models")
    chosen = asked.parse_args().only
    print(f"{'model':26}{'dtype':10}{'sigma':>8}  {'kind':11}{'way':10}{'error':>8}{'slope':>8}")
    for name in fnmatch.filter(MODELS, chosen):
        try:
            model, batch = MODELS[name]()
        except MissingError as error:
            print(f"{name:26}skipped: {error}")
            continue
        for dtype in DTYPES:
            short = batch.to("cpu", dtype)
            exact = Engine(rounded(model, dtype).double(), cross_entropy, "fold")
            ways = {
                way: Engine(rounded(model, dtype), cross_entropy, rung)
                for way, rung in (("fold", "fold"), ("in place", "sequential"))
            }
            for sigma in SIGMAS:
                truth = differences(exact, short.to("cpu", torch.float64), sigma)
                for way, engine in ways.items():
                    for kind, found in differences(engine, short, sigma).items():
                        true = truth[kind]
                        error = (found - true).norm() / true.norm()
                        slope = (found * true).sum() / true.square().sum()
                        print(f"{name:26}{str(dtype)[6:]:10}{sigma:8.0e}  ", end="")
                        print(f"{kind:11}{way:10}{error:8.3f}{slope:8.3f}", flush=True)


if __name__ == "__main__":
    main()
