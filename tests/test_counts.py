"""From scores to whole numbers."""

from __future__ import annotations

import math

import pytest
import torch

from fwdlearn.counts import divide
from fwdlearn.keys import Key


@pytest.mark.parametrize(
    ("score", "total", "least", "counts"),
    [
        ([1, 0, 3], 9, 1, [2, 1, 6]),
        ([1, 1, 1], 7, 1, [3, 2, 2]),
        ([0, 0, 0], 6, 2, [2, 2, 2]),
        ([0, 0, 0], 6, 0, [2, 2, 2]),
        ([5, 1, 1], 3, 1, [1, 1, 1]),
        ([1, 0, 1], 5, 0, [3, 0, 2]),
        ([math.nan, 1, math.inf], 9, 1, [1, 7, 1]),
        ([-1, 1], 4, 1, [1, 3]),
        ([0, 1e300], 8, 1, [1, 7]),
        ([4], 3, 1, [3]),
    ],
)
def test_known_divisions(score: list[float], total: int, least: int, counts: list[int]) -> None:
    assert divide(torch.tensor(score, dtype=torch.float64), total, least).tolist() == counts


def test_it_minimises_the_sum_of_squares_over_counts() -> None:
    # Against the solution of the real-valued problem by bisection, and its whole-numbered price.
    for trial in range(20):
        score = Key.root(trial).uniform(17) ** 3
        counts = divide(score, 100, 2)
        assert int(counts.sum()) == 100 and int(counts.min()) >= 2
        low, high = 0.0, 1e9
        for _ in range(200):
            middle = (low + high) / 2
            above = float((middle * score).clamp(min=2).sum()) > 100
            low, high = (low, middle) if above else (middle, high)
        exact = (low * score).clamp(min=2)
        assert float((counts - exact).abs().max()) < 1
        best = float((score.square() / exact).sum())
        assert float((score.square() / counts).sum()) <= 1.05 * best


def test_too_little_is_refused() -> None:
    with pytest.raises(ValueError, match="3 rows of at least 2 take more than 5"):
        divide(torch.ones(3), 5, 2)
