"""What is special to ConfidenceSkip; the rest is in the conformance suite."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from fwdlearn.allocators import ConfidenceSkip
from fwdlearn.keys import Key


def test_rows_are_drawn_with_their_probabilities() -> None:
    signals = {"residual": torch.tensor([0.9, 0.01, 0.02, 0.8, 0.03, 0.0, 0.05, 0.01])}
    allocator, repeats = ConfidenceSkip(3, keep=0.3), 2000
    drawn = torch.zeros(8)
    for repeat in range(repeats):
        plan, _ = allocator.allocate(8, signals, None, key=Key(repeat, 5))
        drawn += plan.counts > 0
        # Two surely and 6 * 0.3 of the others: 3 or 4 rows, which have the whole budget.
        assert int((plan.counts > 0).sum()) in (3, 4) and int(plan.counts.sum()) == 24
        expected = torch.tensor([1.0, 1 / 0.3] * 4)[[0, 1, 1, 0, 1, 1, 1, 1]].double() / 8
        torch.testing.assert_close(plan.row_weight, torch.where(plan.counts > 0, expected, 0.0))
    assert drawn[0] == drawn[3] == repeats
    others = drawn[torch.tensor([1, 2, 4, 5, 6, 7])] / repeats
    # Five standard deviations of a binomial: a false alarm in 300,000 runs for the six of them.
    assert float((others - 0.3).abs().max()) < 5 * (0.21 / repeats) ** 0.5


def test_somebody_is_always_drawn() -> None:
    allocator = ConfidenceSkip(2, keep=1e-6)
    for repeat in range(200):
        plan, _ = allocator.allocate(5, {"residual": torch.zeros(5)}, None, key=Key(repeat, 1))
        assert int((plan.counts > 0).sum()) in (1, 2) and int(plan.counts.sum()) == 10


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"directions": 0}, "ConfidenceSkip(directions=...) must be at least 1, got 0."),
        ({"threshold": 1.5}, "ConfidenceSkip(threshold=...) must lie in [0, sqrt(2)], got 1.5."),
        ({"keep": 0.0}, "must lie in (0, 1], got 0.0; a row that is never drawn would be missing"),
        ({"sharing": 0}, "ConfidenceSkip(sharing=...) must be"),
    ],
)
def test_refusals(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ConfidenceSkip(**settings)
