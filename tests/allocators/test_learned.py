"""What is special to the learned allocators; the rest is in the conformance suite."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from fwdlearn.allocator import Feedback, Plan
from fwdlearn.allocators import BernoulliAllocator, GaussianAllocator
from fwdlearn.errors import UsageError
from fwdlearn.keys import Key

KINDS = (GaussianAllocator, BernoulliAllocator)


@pytest.mark.parametrize("kind", KINDS)
def test_score_is_the_gradient_of_the_log_density(kind: Any) -> None:
    allocator, feature = kind(4), Key.root(1).uniform(5) * 3
    parameters = torch.tensor(allocator._start()).double() + 0.1
    drawn = allocator._draw(parameters, feature, Key.root(2))
    # The reference differentiates torch's own densities.
    leaf = parameters.clone().requires_grad_()
    if kind is GaussianAllocator:
        mean, kernel, _ = allocator._law(leaf, feature)
        covariance = kernel + 1e-2 * torch.eye(5).double()
        law: Any = torch.distributions.MultivariateNormal(mean, covariance)
    else:
        heads = allocator._heads(leaf, feature)
        law = torch.distributions.Independent(torch.distributions.Bernoulli(heads), 1)
    exact = torch.stack(
        [torch.autograd.grad(law.log_prob(one), leaf, retain_graph=True)[0] for one in drawn]
    )
    torch.testing.assert_close(allocator._log_gradient(parameters, feature, drawn), exact)


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_to_follow_the_variance(kind: Any) -> None:
    """Rows with a large loss are those that vary; the proxy falls, towards Neyman's value."""
    allocator = kind(8, rate=0.05)
    state = allocator.init()
    # From a law that knows nothing of the losses.
    state["parameters"][:2] = torch.tensor([0.0, 1.0])

    def price(state: Any, key: Key) -> float:
        """The proxy's size over that of equal counts, over 40 plans."""
        total = 0.0
        for number in range(40):
            loss, variance = _rows(key.fold(number))
            plan, _ = allocator.allocate(32, {"loss": loss}, state, key=key.fold(number))
            total += float((variance / plan.counts).sum() / (variance / 8).sum()) / 40
        return total

    before = price(state, Key.root(9))
    for step in range(300):
        loss, variance = _rows(Key.root(3).fold(step))
        plan, state = allocator.allocate(32, {"loss": loss}, state, key=Key.root(4).fold(step))
        told = Feedback(1.0, 1.0, {}, 1.0, {"square_slope": variance})
        state = allocator.observe(plan, {"loss": loss}, told, state)
    after = price(state, Key.root(9))
    assert state["parameters"][0] > 0
    assert after < 0.75 * before and after < 0.8, (before, after)


def _rows(key: Key) -> tuple[Tensor, Tensor]:
    loss = key.uniform(32) ** 4 * 3
    return loss, loss.square()


@pytest.mark.parametrize("kind", KINDS)
def test_pooled_weighs_rows_by_their_counts(kind: Any) -> None:
    allocator = kind(4, pooled=True)
    signals = {"loss": torch.tensor([0.1, 2.0, 0.5, 1.0])}
    plan, _ = allocator.allocate(4, signals, allocator.init(), key=Key.root(0))
    assert allocator.reweights and not kind(4).reweights
    torch.testing.assert_close(plan.weight, torch.full((16,), 1 / 16).double())
    torch.testing.assert_close(plan.row_weight, plan.counts.double() / 16)


@pytest.mark.parametrize("kind", KINDS)
def test_no_rate_no_learning(kind: Any) -> None:
    allocator = kind(4, rate=0.0)
    state = allocator.init()
    loss, variance = _rows(Key.root(0))
    plan, drawn = allocator.allocate(32, {"loss": loss}, state, key=Key.root(1))
    told = Feedback(1.0, 1.0, {}, 1.0, {"square_slope": variance})
    after = allocator.observe(plan, {"loss": loss}, told, drawn)
    assert torch.equal(after["parameters"], state["parameters"])


def test_it_needs_an_estimator_that_tells() -> None:
    allocator = GaussianAllocator(2)
    with pytest.raises(UsageError, match="GaussianAllocator learns from the squared slopes"):
        allocator.observe(
            Plan.uniform(2, 2), {"loss": torch.ones(2)}, Feedback(1.0, 1.0, {}, 1.0), {}
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"directions": 0}, "GaussianAllocator(directions=...) must be at least 1, got 0."),
        ({"least": 9}, "GaussianAllocator(least=...) must lie between 1 and directions=4, got 9."),
        ({"draws": 1}, "GaussianAllocator(draws=...) must be at least 2, got 1."),
        ({"rate": -1.0}, "GaussianAllocator(rate=...) must not be negative, got -1.0."),
    ],
)
def test_refusals(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        GaussianAllocator(**settings)
