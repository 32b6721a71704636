"""What is special to Neyman; the rest is in the conformance suite."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from fwdlearn.allocator import Feedback, Plan
from fwdlearn.allocators import Neyman
from fwdlearn.errors import UsageError
from fwdlearn.keys import Key

KEY = Key.root(0)


def told(slopes: list[float]) -> Feedback:
    return Feedback(1.0, 1.0, {}, 1.0, {"square_slope": torch.tensor(slopes).double()})


def seen(*examples: int) -> dict[str, Tensor]:
    return {"example": torch.tensor(examples)}


def test_counts_follow_the_signal() -> None:
    signals = {"loss": torch.tensor([4.0, 1.0, 0.0, 3.0]), "residual": torch.ones(4)}
    by_loss, _ = Neyman(5, "loss").allocate(4, signals, None, key=KEY)
    # One is at the floor; the others divide 19 as 4 : 1 : 3.
    assert by_loss.counts.tolist() == [10, 2, 1, 7]
    by_residual, _ = Neyman(5).allocate(4, signals, None, key=KEY)
    assert by_residual.counts.tolist() == [5] * 4
    assert Neyman(5, sharing="shared").allocate(4, signals, None, key=KEY)[0].directions == 5


def test_what_is_known_of_training_rows_runs_on() -> None:
    allocator = Neyman(3, "running", memory=0.75)
    state = allocator.init()
    plan, state = allocator.allocate(3, seen(7, 2, 9), state, key=KEY)
    assert plan.counts.tolist() == [3, 3, 3]
    state = allocator.observe(plan, seen(7, 2, 9), told([1.0, 16.0, float("nan")]), state)
    assert state["example"].tolist() == [2, 7] and state["mean"].tolist() == [16.0, 1.0]
    # Row 5 is new: it is taken to have the mean of the two that are known.
    plan, _ = allocator.allocate(3, seen(5, 7, 2), state, key=KEY)
    assert plan.counts.tolist() == [3, 1, 5]
    after = allocator.observe(plan, seen(5, 7, 2), told([9.0, 5.0, 0.0]), state)
    assert after["example"].tolist() == [2, 5, 7] and after["mean"].tolist() == [12.0, 9.0, 2.0]
    assert state["mean"].tolist() == [16.0, 1.0]


def test_running_needs_an_estimator_that_tells() -> None:
    allocator = Neyman(2, "running")
    silent = Feedback(1.0, 1.0, {}, 1.0)
    with pytest.raises(UsageError, match="does not report; signal='residual' needs nothing"):
        allocator.observe(Plan.uniform(2, 2), seen(0, 1), silent, allocator.init())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"directions": 0}, "Neyman(directions=...) must be at least 1, got 0."),
        ({"least": 5}, "Neyman(least=...) must lie between 1 and directions=4, got 5."),
        ({"least": 0}, "Neyman(least=...) must lie between 1 and directions=4, got 0."),
        ({"signal": "norm"}, "must be 'residual', 'loss' or 'running', got 'norm'."),
        ({"memory": 1.0}, "Neyman(memory=...) must lie in [0, 1), got 1.0."),
        ({"sharing": "all"}, "Neyman(sharing=...) must be 'private', 'shared' or a number"),
    ],
)
def test_refusals(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Neyman(**settings)
