"""Small steps of short weights are seen in the losses, as well as rounded activations let them.

The truth is that of the same rounded weights in float64. The measure is what remains of it where
weights are perturbed exactly and every activation is rounded: no pass in a short dtype does better
but by chance.
"""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from fwdlearn.batch import Batch
from fwdlearn.directions import Directions
from fwdlearn.engine import Engine
from fwdlearn.keys import Key
from fwdlearn.objectives import cross_entropy

from .models import features
from .quantized_layers import quantized

COUNT, ROWS, WIDTH = 48, 6, 128


class Net(nn.Module):
    """Weights of size one, at which most steps of 1e-3 are less than half a bfloat16 step.

    Args:
        rounded: dtype to which activations are rounded, or None for what they are anyway.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rounded: torch.dtype | None = None
        sizes = (WIDTH, WIDTH, WIDTH, 10)
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(sizes))
        for layer in self.layers:
            nn.init.normal_(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.short(layer(self.short(torch.tanh(x) * WIDTH**-0.5)))
        return x

    def short(self, x: Tensor) -> Tensor:
        return x if self.rounded is None else x.to(self.rounded).to(x.dtype)


def model(dtype: torch.dtype) -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net().to(dtype)


def differences(net: Net, batch: Batch, sigma: float, virtual: list[str]) -> Tensor:
    """L(+sigma) - L(-sigma), float64 [directions * rows]."""
    engine = Engine(net, cross_entropy, "fold", virtual=virtual)
    row, direction = torch.arange(ROWS).repeat(COUNT), torch.arange(COUNT).repeat_interleave(ROWS)
    family = Directions(Key.root(0), dict(engine.params), COUNT)
    with torch.inference_mode():
        up, down = (engine.losses(batch, row, family, direction, s) for s in (sigma, -sigma))
    return (up - down).double()


@pytest.mark.parametrize("sigma", [1e-3, 1e-2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["plain", "quantised"])
def test_as_much_is_seen_as_rounded_activations_let_through(
    kind: str, dtype: torch.dtype, sigma: float
) -> None:
    net, virtual = model(dtype), ["*"] if kind == "quantised" else []
    net = quantized(net) if virtual else net
    short = features(ROWS, WIDTH).to("cpu", dtype)
    exact, wide = copy.deepcopy(net).double(), short.to("cpu", torch.float64)
    truth = differences(exact, wide, sigma, virtual)
    exact.rounded = dtype
    size = truth.norm()
    best = (differences(exact, wide, sigma, virtual) - truth).norm() / size
    found = differences(net, short, sigma, virtual)
    error, share = (found - truth).norm() / size, (found * truth).sum() / size**2
    # A quantised layer rounds its product, the scaled product and the sum: three times, not once.
    assert best > 0 and error < (2.5 if virtual else 1.5) * best
    # And without a bias: four standard errors, were only the directions independent.
    assert abs(share - 1) < 4 * error / COUNT**0.5
