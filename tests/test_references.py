"""Closed-form facts of the straight-through and ReinMax gradients, by summing over all samples."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.references import one_hot, one_hot_sample, reinmax, straight_through

LOGITS = torch.tensor([0.3, -1.0, 0.8, 0.1], dtype=torch.float64)
SLOPE = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
BEND = torch.tensor(
    [[1.0, 0.5, 0.2, 0.0], [0.5, -2.0, 0.3, 1.0], [0.2, 0.3, 0.7, -1.0], [0.0, 1.0, -1.0, 1.5]],
    dtype=torch.float64,
)


def linear(x: Tensor) -> Tensor:
    return x @ SLOPE


def quadratic(x: Tensor) -> Tensor:
    return x @ SLOPE + x @ BEND @ x


def cubic(x: Tensor) -> Tensor:
    return quadratic(x) + (x @ SLOPE) ** 3


def exact(loss: Callable[[Tensor], Tensor]) -> Tensor:
    """The derivative of the mean loss over all samples."""
    logits = LOGITS.clone().requires_grad_()
    values = torch.stack([loss(unit) for unit in torch.eye(4).double()])
    return torch.autograd.grad(logits.softmax(0) @ values, logits)[0]


def mean(pass_through: Callable[[Tensor, Tensor], Tensor], loss: Callable[..., Tensor]) -> Tensor:
    """The mean of an estimate over all samples."""
    total = torch.zeros(4, dtype=torch.float64)
    for unit, probability in zip(torch.eye(4).double(), LOGITS.softmax(0), strict=True):
        logits = LOGITS.clone().requires_grad_()
        total += probability * torch.autograd.grad(loss(pass_through(logits, unit)), logits)[0]
    return total


def test_straight_through_is_exact_to_first_order() -> None:
    torch.testing.assert_close(mean(straight_through, linear), exact(linear), rtol=1e-12, atol=0)
    error = (mean(straight_through, quadratic) - exact(quadratic)).norm()
    assert error > 0.1 * exact(quadratic).norm()


def test_reinmax_is_exact_to_second_order() -> None:
    for loss in (linear, quadratic):
        torch.testing.assert_close(mean(reinmax, loss), exact(loss), rtol=1e-12, atol=1e-14)
    assert (mean(reinmax, cubic) - exact(cubic)).norm() > 0.01 * exact(cubic).norm()


@pytest.mark.parametrize("pass_through", [straight_through, reinmax])
def test_the_value_is_the_sample(pass_through: Callable[[Tensor, Tensor], Tensor]) -> None:
    sample = torch.eye(4).double()[2]
    assert torch.equal(pass_through(LOGITS, sample), sample)


def test_samples_follow_the_softmax() -> None:
    """100,000 samples, five standard errors."""
    generator = torch.Generator().manual_seed(0)
    samples = one_hot_sample(LOGITS.expand(100_000, 4), generator)
    assert torch.equal(samples.sum(1), torch.ones(100_000).double())
    pi = LOGITS.softmax(0)
    error = (pi * (1 - pi) / 100_000).sqrt()
    assert ((samples.mean(0) - pi).abs() < 5 * error).all()
    assert one_hot(LOGITS).tolist() == [0.0, 0.0, 1.0, 0.0]
