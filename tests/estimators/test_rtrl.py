"""The exact gradient through time, by forward passes."""

from __future__ import annotations

import pytest
import torch

from fwdlearn.allocator import Plan
from fwdlearn.errors import UsageError
from fwdlearn.estimators import RTRL
from fwdlearn.keys import Key

from .test_causal_node_perturbation import ask, exact, oracle


def test_with_all_directions_it_is_the_gradient() -> None:
    made = oracle(rows=3, steps=9, units=4)
    size = sum(value.numel() for value in made.params.values())
    estimate, wanted = ask(RTRL(), made, Plan.uniform(3, size)), exact(made)
    for name, value in wanted.items():
        torch.testing.assert_close(estimate.grad[name], value, rtol=1e-9, atol=1e-12)
    assert estimate.queries == 3 * size


def test_with_fewer_its_mean_is() -> None:
    made = oracle(rows=2, steps=5, units=2)
    size = sum(value.numel() for value in made.params.values())
    wanted, mean = exact(made), {name: torch.zeros_like(v) for name, v in made.params.items()}
    draws = 2000
    for number in range(draws):
        grad = ask(RTRL(), made, Plan.uniform(2, size // 4), Key.root(number)).grad
        for name in mean:
            mean[name] += grad[name] / draws
    square = sum(float(value.square().sum()) for value in wanted.values())
    error = sum(float((mean[name] - value).square().sum()) for name, value in wanted.items())
    # The squared error of one is at most d / n times the squared gradients of the rows, which are
    # some four times that of their mean; its own deviation is a few hundredths of that.
    assert error / square < 4 * 4 / draws


def test_a_large_network_is_refused() -> None:
    with pytest.raises(UsageError, match="RTRL has a direction for each of 4608 numbers"):
        ask(RTRL(), oracle(units=64), Plan.uniform(1, 1))
