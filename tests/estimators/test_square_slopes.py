"""What estimators tell of rows: the mean squared slope, whatever the counts and the baseline."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fwdlearn.allocator import Plan
from fwdlearn.estimators import SPSA, ForwardGradient, RandomPerturbation
from fwdlearn.keys import Key
from fwdlearn.testing import Linear, slope_oracle


@pytest.mark.parametrize(
    "estimator",
    [
        RandomPerturbation(),
        RandomPerturbation(baseline="leave-one-out"),
        SPSA(law="gaussian"),
        ForwardGradient(),
    ],
    ids=lambda one: repr(one)[:40],
)
def test_it_is_the_squared_gradient_on_average(estimator: Any) -> None:
    # On a linear loss the mean squared slope along a direction of identity covariance.
    problem = Linear.random(Key.root(1), 4, {"w": (3, 2), "bias": (2,)})
    exact = torch.cat([g.flatten(1) for g in problem.gradients().values()], 1).square().sum(1)
    plan, found, repeats = (
        Plan.included(torch.tensor([2, 6, 0, 3]), torch.ones(4).double()),
        [],
        800,
    )
    state = estimator.init(problem.params)
    for repeat in range(repeats):
        oracle = slope_oracle(problem)
        key = Key(repeat, 3)
        made, state = estimator.estimate(oracle, oracle.params, state, key=key, plan=plan)
        found.append(made.rows["square_slope"])
    sample = torch.stack(found)
    assert bool(sample[:, 2].isnan().all())
    some = torch.tensor([0, 1, 3])
    z = (sample.mean(0) - exact)[some] / (sample.std(0)[some] / repeats**0.5)
    # Three comparisons at five standard errors: a false alarm in 600,000 runs.
    assert float(z.abs().max()) < 5
