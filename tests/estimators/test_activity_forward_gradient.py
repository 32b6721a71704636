"""Facts of activity-perturbed forward gradients; the rest is in the conformance suite."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fwdlearn.allocator import Plan
from fwdlearn.batch import Batch
from fwdlearn.engine import Engine
from fwdlearn.errors import UsageError
from fwdlearn.estimator import Estimator
from fwdlearn.estimators import ActivityForwardGradient, ProjectedForwardGradient
from fwdlearn.keys import Key
from fwdlearn.objectives import cross_entropy
from fwdlearn.oracle import ModelOracle


def _square_error(model: nn.Linear, batch: Batch, estimator: Estimator, repeats: int) -> float:
    """Mean squared error of the weight's gradient, relative to its square."""
    engine, plan = Engine(model, cross_entropy), Plan.uniform(len(batch), 1)
    losses = cross_entropy(model(*batch.args), batch.targets)
    (exact,) = torch.autograd.grad(losses.mean(), [model.weight])
    total = 0.0
    for repeat in range(repeats):
        oracle: Any = ModelOracle(engine, batch)
        key = Key.root(1).fold(repeat)
        grad = estimator.estimate(oracle, oracle.params, None, key=key, plan=plan)[0].grad
        total += float((grad["weight"] - exact).square().sum() / exact.square().sum())
    return total / repeats


def test_noise_in_activities_varies_less_than_tangents_of_weights() -> None:
    """One layer 128 -> 32, 64 rows, one slope a row: at least 20 times less; 40 repeats each.

    The variance with one tangent for the batch is m n |g|^2; with noise of each row's own it is
    below m / B mean |x|^2 |da|^2.
    """
    torch.manual_seed(0)
    model, x = nn.Linear(128, 32, bias=False), torch.randn(64, 128)
    batch = Batch((x,), torch.arange(64) % 32)
    weights = _square_error(model, batch, ProjectedForwardGradient(), 40)
    activities = _square_error(model, batch, ActivityForwardGradient(), 40)
    assert weights == pytest.approx(128 * 32, rel=0.5)
    assert weights / activities > 20


def test_the_variance_of_one_layer_has_a_closed_form() -> None:
    """Mean over rows of (m - 1) |x|^2 |da|^2 / B for signs: 400 repeats, within a tenth."""
    torch.manual_seed(0)
    model, x = nn.Linear(6, 4, bias=False).double(), torch.randn(8, 6).double()
    batch = Batch((x,), torch.arange(8) % 4)
    scores = model(x).detach()
    slope = scores.softmax(1) - nn.functional.one_hot(batch.targets, 4)
    exact = (slope.T @ x / 8).square().sum()
    squares = slope.square().sum(1) * x.square().sum(1)
    expected = float(3 * squares.mean() / 8 / exact)
    found = _square_error(model, batch, ActivityForwardGradient(), 400)
    assert found == pytest.approx(expected, rel=0.1)


def test_parameters_that_feed_no_layer_are_refused() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.bend = nn.Linear(4, 3), nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) * torch.cumsum(self.bend, 0)

    oracle: Any = ModelOracle(
        Engine(Scaled(), cross_entropy), Batch((torch.ones(2, 4),), torch.arange(2))
    )
    estimator, plan = ActivityForwardGradient(), Plan.uniform(2, 1)
    with pytest.raises(UsageError, match="ActivityForwardGradient has no gradient of bend"):
        estimator.estimate(oracle, oracle.params, None, key=Key.root(0), plan=plan)


def test_an_unknown_law_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ActivityForwardGradient\(law=...\) must be one of"):
        ActivityForwardGradient(law="cauchy")
