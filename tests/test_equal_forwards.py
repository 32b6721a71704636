"""The benchmark of equal forwards: what a step costs, and which rates are tried."""

from __future__ import annotations

import pytest

from benchmarks.equal_forwards import METHODS, Method, rates
from fwdlearn.keys import Key


@pytest.mark.parametrize("name", list(METHODS))
def test_a_step_costs_what_it_says(name: str) -> None:
    method: Method = METHODS[name]
    if method.estimator is None:
        # Two sides of one direction.
        assert method.forwards == 2
        return
    allocator = method.allocator(method.directions)
    plan, _ = allocator.allocate(16, {}, allocator.init(), key=Key.root(0))
    assert method.estimator.traits.queries(plan) == 16 * method.forwards


def test_rates_are_a_factor_of_three_apart_around_the_middle() -> None:
    assert rates(1e-3, 5) == pytest.approx([1e-3 / 9, 1e-3 / 3, 1e-3, 3e-3, 9e-3])
