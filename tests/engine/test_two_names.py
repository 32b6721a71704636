"""A module under two names: every rung gives its losses and slopes, and gives the weights back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fwdlearn.batch import Batch
from fwdlearn.directions import Directions
from fwdlearn.engine import Engine
from fwdlearn.keys import Key
from fwdlearn.models.built import weights_from
from fwdlearn.oracle import ModelOracle

ROW, NUMBER = torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 1, 2])


class TwoNames(nn.Module):
    """One layer that is used twice, a weight that is tied into another module, statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.again = self.layer
        self.norm = nn.BatchNorm1d(3)
        self.other = nn.Linear(3, 3)
        self.other.weight = self.layer.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.norm(self.again(self.layer(x).tanh())))


@pytest.mark.parametrize("rung", ["auto", "fold", "copies", "sequential"])
def test_losses_and_slopes(rung: str) -> None:
    with weights_from(0):
        model = TwoNames().double().eval()
    x = torch.linspace(-1, 1, 12).double().view(4, 3)
    before = dict(model.named_parameters())
    kept = {name: value.detach().clone() for name, value in before.items()}
    engine = Engine(model, lambda output, targets: output.square().sum(1), rung)
    oracle = ModelOracle(engine, Batch((x,), torch.zeros(4)))
    family = Directions(Key.root(0), oracle.params, 3)
    losses = oracle.losses(ROW, family, NUMBER, 0.1)
    _, slopes = oracle.slopes(ROW, family, NUMBER)
    for name, value in model.named_parameters():
        assert value is before[name] and torch.equal(value, kept[name]), name
    for query, number in enumerate(NUMBER):

        def loss(scale: Tensor, query: int = query, number: Tensor = number) -> Tensor:
            step = {name: family.dense(name, number[None])[0] for name in family.params}
            w = kept["layer.weight"] + scale * step["again.weight"]
            b = kept["layer.bias"] + scale * step["again.bias"]
            c = kept["other.bias"] + scale * step["other.bias"]
            gain = kept["norm.weight"] + scale * step["norm.weight"]
            offset = kept["norm.bias"] + scale * step["norm.bias"]
            hidden = (x[query] @ w.T + b).tanh() @ w.T + b
            hidden = hidden / (1 + model.norm.eps) ** 0.5 * gain + offset
            return (hidden @ w.T + c).square().sum()

        at, zero = torch.tensor([0.1, 0.0], dtype=torch.float64).unbind()
        torch.testing.assert_close(losses[query], loss(at), rtol=1e-9, atol=1e-12)
        slope = torch.func.jvp(loss, (zero,), (torch.ones_like(zero),))[1]
        torch.testing.assert_close(slopes[query], slope, rtol=1e-6, atol=1e-9)
