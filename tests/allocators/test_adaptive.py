"""What is special to the measured allocators; the rest is in the conformance suite."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch

from fwdlearn.allocator import Feedback, Plan
from fwdlearn.allocators import AdaptiveDirections, MeasuredSharing
from fwdlearn.errors import UsageError
from fwdlearn.keys import Key


def told(square: float, variance: float, slopes: float = 1.0) -> Feedback:
    return Feedback(1.0, square, {}, variance, {"square_slope": torch.full((8,), slopes).double()})


def settled(allocator: Any, feedback: Any, steps: int = 600) -> Any:
    """The state after many like steps; `feedback` is a function of directions a row."""
    state = allocator.init()
    for step in range(steps):
        plan, state = allocator.allocate(8, {}, state, key=Key.root(step))
        assert len(plan) == allocator.budget(8, state)
        state = allocator.observe(plan, {}, feedback(len(plan) / 8), state)
    return state


@pytest.mark.parametrize(("noise", "wanted"), [(20.0, 10.0), (6.0, 3.0), (0.1, 1.0), (1e4, 64.0)])
def test_directions_settle_where_the_ratio_is_the_target(noise: float, wanted: float) -> None:
    # A squared gradient of 1 and a variance of noise / n: the ratio is n / noise.
    state = settled(AdaptiveDirections(4, 0.5), lambda n: told(1 + noise / n, noise / n))
    assert state["directions"] == pytest.approx(wanted, rel=0.05)


def test_what_is_lost_in_noise_changes_nothing() -> None:
    state = settled(AdaptiveDirections(4, most=9), lambda n: told(1.0, 2.0))
    assert state["directions"] == 4


def test_the_number_moves_by_a_tenth_a_step() -> None:
    state = settled(AdaptiveDirections(4), lambda n: told(1e3 + 1e-3, 1e3), steps=3)
    assert state["directions"] == pytest.approx(4 * 1.1**3)


@pytest.mark.parametrize(("common", "sharing"), [(0.25, 2), (0.05, 6), (0.0, 8), (1.0, 1)])
def test_rows_share_as_far_as_the_error_allows(common: float, sharing: int) -> None:
    # |mean of 8 gradients|^2 = T + (S - T) / 8 for S = 1; the error grows by (m - 1) T.
    batch = common + (1 - common) / 8
    allocator = MeasuredSharing(2, tolerance=0.26)
    state = settled(allocator, lambda n: told(batch + 3.0, 3.0))
    plan, _ = allocator.allocate(8, {}, state, key=Key.root(0))
    assert plan.sharing == sharing and plan.counts.tolist() == [2] * 8


def test_they_need_an_estimator_that_tells() -> None:
    plan = Plan.uniform(8, 4)
    for allocator in (AdaptiveDirections(), MeasuredSharing()):
        name = type(allocator).__name__
        with pytest.raises(UsageError, match=f"{name} needs the variance of an estimate, which"):
            allocator.observe(plan, {}, Feedback(1.0, 1.0, {}, math.nan), allocator.init())
    with pytest.raises(UsageError, match="MeasuredSharing needs the squared slopes of each row"):
        MeasuredSharing().observe(plan, {}, Feedback(1.0, 1.0, {}, 1.0), MeasuredSharing().init())


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (AdaptiveDirections, {"target": 0.0}, "AdaptiveDirections(target=...) must be positive"),
        (AdaptiveDirections, {"most": 3}, "must be at least directions=4, got 3."),
        (AdaptiveDirections, {"least": 5}, "must lie between 1 and directions=4, got 5."),
        (AdaptiveDirections, {"signal": "x"}, "must be 'residual', 'loss' or None, got 'x'."),
        (AdaptiveDirections, {"memory": 1.0}, "(memory=...) must lie in [0, 1), got 1.0."),
        (MeasuredSharing, {"tolerance": -1.0}, "must not be negative, got -1.0."),
        (MeasuredSharing, {"directions": 0}, "MeasuredSharing(directions=...) must be at least 1"),
    ],
)
def test_refusals(kind: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        kind(**settings)
