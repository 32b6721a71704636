"""Closed-form facts of projected forward gradients; the rest is in the conformance suite."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from scipy import stats

from fwdlearn.allocator import Plan
from fwdlearn.directions import Directions
from fwdlearn.estimator import Estimate
from fwdlearn.estimators import ProjectedForwardGradient
from fwdlearn.keys import Key
from fwdlearn.testing import Linear, Problem, Quadratic, slope_oracle

KEY = Key.root(1)


def ask(
    estimator: ProjectedForwardGradient, problem: Problem, plan: Plan, key: Key = KEY
) -> Estimate:
    oracle = slope_oracle(problem)
    return estimator.estimate(oracle, oracle.params, None, key=key, plan=plan)[0]


@pytest.mark.parametrize("sharing", [1, 3])
def test_it_is_the_batchs_gradient_along_tangents_that_all_rows_share(sharing: int) -> None:
    problem = Quadratic.random(Key.root(2), 3, {"w": (4, 3), "bias": (4,)})
    estimate = ask(ProjectedForwardGradient(), problem, Plan.uniform(3, 2, sharing))
    family = Directions(KEY, problem.params, 2, "rademacher", None)
    tangents = {name: family.dense(name, torch.arange(2)) for name in problem.params}
    exact = problem.gradient()
    slopes = sum((tangents[n] * exact[n]).reshape(2, -1).sum(1) for n in exact)
    for name in exact:
        expected = torch.einsum("k,k...->...", slopes / 2, tangents[name])
        torch.testing.assert_close(estimate.grad[name], expected)
    assert int(estimate.info["tangents"]) == 2
    assert estimate.queries == 6


@pytest.mark.parametrize(("law", "more"), [("gaussian", 1), ("rademacher", -1)])
@pytest.mark.parametrize("m", [1, 5])
def test_second_moment(law: str, more: int, m: int) -> None:
    """E |grad|^2 = (d + m +- 1) / m |g|^2; 800 repeats, false alarms one in a million."""
    d, repeats = 40, 800
    problem = Linear.random(Key.root(2), 1, {"v": (d,)})
    square = problem.gradient()["v"].square().sum()
    estimator: Any = ProjectedForwardGradient(law)
    norms = [
        ask(estimator, problem, Plan.uniform(1, m), KEY.fold(number)).grad["v"].square().sum()
        for number in range(repeats)
    ]
    ratios = torch.stack(norms) / square
    expected = (d + m + more) / m
    z = (ratios.mean() - expected) / (ratios.std() / repeats**0.5)
    assert abs(float(z)) < stats.norm.isf(1e-6 / 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"law": "cauchy"}, "ProjectedForwardGradient(law=...) must be one of rademacher, "),
        ({"rank": 0}, "ProjectedForwardGradient(rank=...) must be a positive integer, or None"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ProjectedForwardGradient(**settings)
