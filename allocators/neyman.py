"""Neyman: directions in proportion to the deviation of a row's estimate.

Paper: J. Neyman, "On the two different aspects of the representative method" (J. Royal Stat. Soc.
97, 1934), whose strata are the rows here. FLOPS (Ren et al., arXiv 2410.05966, 2024) allocates
queries to the same end by learning.

The squared error of an estimate with n_b directions for row b is a sum of v_b / n_b, with v_b the
variance along one direction. It is least, under a given sum of n_b, for

    n_b = max(least, factor * sqrt(v_b)),

and then 1 / (1 + CV^2) of that of equal counts, CV being the coefficient of variation of sqrt(v_b)
over the batch: no spread, no gain. v_b is proportional to the squared norm of the row's gradient,
of which the norm of softmax minus target is the part that the head sees.

Symbols: sqrt(v_b) `score`, n_b `counts`.

Differs from the papers in: a signal stands for sqrt(v_b), and no pilot queries are spent on it.
Counts are decided before the losses that they weigh, so the estimate stays unbiased.

Cost: the clean pass, one query a row, that "residual" and "loss" are read from; an estimator with
a clean baseline shares it. "running" costs no query, and 16 bytes for each training row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor

from fwdlearn.allocator import Allocator, Feedback, Plan
from fwdlearn.counts import check_counts, check_sharing, divide, sharing_rows
from fwdlearn.errors import UsageError
from fwdlearn.keys import Key


@dataclass(frozen=True)
class Neyman(Allocator):
    """More directions for rows whose estimates vary more.

    Args:
        directions: mean number of directions a row, at least 1.
        signal: what stands for the deviation of a row: "residual", the norm of softmax minus
            target; "loss"; or "running", the root of a running mean of squared slopes that the
            estimator told of the same training row in earlier steps.
        least: directions of every row, from 1 to `directions`.
        memory: of the running mean, in [0, 1): the weight of what was known before.
        sharing: as for Uniform.

    Example:
        >>> signals = {"residual": torch.tensor([0.0, 1.0, 0.5])}
        >>> plan, _ = Neyman(4).allocate(3, signals, None, key=Key.root(0))
        >>> plan.counts.tolist()
        [1, 7, 4]
    """

    directions: int = 4
    signal: Literal["residual", "loss", "running"] = "residual"
    least: int = 1
    memory: float = 0.5
    sharing: str | int = "private"

    def __post_init__(self) -> None:
        check_counts("Neyman", self.directions, self.least)
        check_sharing("Neyman", self.sharing)
        if self.signal not in ("residual", "loss", "running"):
            raise ValueError(
                f"Neyman(signal=...) must be 'residual', 'loss' or 'running', got {self.signal!r}."
            )
        if not 0 <= self.memory < 1:
            raise ValueError(f"Neyman(memory=...) must lie in [0, 1), got {self.memory!r}.")

    @property
    def signals(self) -> frozenset[str]:
        return frozenset({"example" if self.signal == "running" else self.signal})

    def init(self) -> Any:
        """Known training rows, in order, and the running mean of each."""
        if self.signal != "running":
            return None
        return {
            "example": torch.zeros(0, dtype=torch.int64),
            "mean": torch.zeros(0, dtype=torch.float64),
        }

    def allocate(
        self, rows: int, signals: Mapping[str, Tensor], state: Any, *, key: Key
    ) -> tuple[Plan, Any]:
        if self.signal == "running":
            known, value = _looked_up(state, signals["example"])
            # A row not met before is taken to be like the average of those that were.
            usual = value[known].mean() if known.any() else torch.tensor(1.0).double()
            score = torch.where(known, value, usual).sqrt()
        else:
            score = signals[self.signal]
        counts = divide(score, self.budget(rows, state), self.least)
        return Plan(counts, sharing_rows(self.sharing, rows)), state

    def observe(
        self, plan: Plan, signals: Mapping[str, Tensor], feedback: Feedback, state: Any
    ) -> Any:
        if self.signal != "running":
            return state
        if "square_slope" not in feedback.rows:
            raise UsageError(
                "Neyman(signal='running') learns from the squared slopes of each row, which this "
                "estimator does not report; signal='residual' needs nothing of the estimator."
            )
        new = feedback.rows["square_slope"].double()
        use = new.isfinite()
        example, new = signals["example"][use], new[use]
        known, old = _looked_up(state, example)
        new = torch.where(known, self.memory * old + (1 - self.memory) * new, new)
        kept = ~torch.isin(state["example"], example)
        every = torch.cat((state["example"][kept], example))
        order = every.argsort(stable=True)
        return {
            "example": every[order],
            "mean": torch.cat((state["mean"][kept], new))[order],
        }

    @classmethod
    def examples(cls) -> list[Self]:
        return [
            cls(),
            cls(6, "loss", least=2, sharing="shared"),
            cls(3, "running", sharing=2),
        ]


def _looked_up(state: Mapping[str, Tensor], example: Tensor) -> tuple[Tensor, Tensor]:
    """bool [n], which examples are known, and float64 [n], their means, 0 for the others."""
    ids, mean = state["example"], state["mean"]
    if not len(ids):
        return torch.zeros(len(example), dtype=torch.bool), torch.zeros(len(example)).double()
    place = torch.searchsorted(ids, example).clamp(max=len(ids) - 1)
    known = ids[place] == example
    return known, torch.where(known, mean[place], 0.0)
