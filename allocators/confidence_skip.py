"""ConfidenceSkip: rows that the model is sure of go without directions, by chance.

Paper: the idea of spending no work on examples that are classified already is that of A. H. Jiang
et al., "Accelerating deep learning by focusing on the biggest losers" (arXiv 1910.00762, 2019);
the correction is D. G. Horvitz and D. J. Thompson's (J. Am. Stat. Assoc. 47, 1952).

A row whose residual |softmax - target| lies below a threshold is drawn with probability p, every
other row surely. A drawn row counts 1 / (B p_b) in place of 1 / B, so the mean of the estimate is
the gradient of the mean loss over all B rows.

Symbols: p_b `probability`.

Differs from the papers in: nothing is dropped for good. Rows are drawn systematically along a
random order, so their number varies by less than one; the budget goes to those that are drawn.

Cost: the clean pass, one query a row, that the residual is read from; an estimator with a clean
baseline shares it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from fwdlearn.allocator import Allocator, Plan
from fwdlearn.counts import check_counts, check_sharing, divide, sharing_rows
from fwdlearn.keys import Key


@dataclass(frozen=True)
class ConfidenceSkip(Allocator):
    """Directions for the rows that the model is not sure of, and now and then for the others.

    Args:
        directions: mean number of directions a row, at least 1; those that are drawn get more.
        threshold: the residual below which a row may go without, in [0, sqrt(2)]. A row of two
            classes with probability 0.9 has a residual of 0.14.
        keep: probability of drawing such a row, in (0, 1].
        sharing: as for Uniform.

    Example:
        >>> signals = {"residual": torch.tensor([0.9, 0.01, 0.7, 0.02])}
        >>> plan, _ = ConfidenceSkip(3, keep=0.5).allocate(4, signals, None, key=Key.root(0))
        >>> plan.counts.tolist(), [round(float(w), 3) for w in plan.row_weight]
        ([4, 0, 4, 4], [0.25, 0.0, 0.25, 0.5])
    """

    directions: int = 4
    threshold: float = 0.1
    keep: float = 0.25
    sharing: str | int = "private"

    signals = frozenset({"residual"})

    def __post_init__(self) -> None:
        check_counts("ConfidenceSkip", self.directions)
        check_sharing("ConfidenceSkip", self.sharing)
        if not 0 <= self.threshold <= 2**0.5:
            raise ValueError(
                f"ConfidenceSkip(threshold=...) must lie in [0, sqrt(2)], got {self.threshold!r}."
            )
        if not 0 < self.keep <= 1:
            raise ValueError(
                f"ConfidenceSkip(keep=...) must lie in (0, 1], got {self.keep!r}; a row that is "
                "never drawn would be missing from the mean."
            )

    def allocate(
        self, rows: int, signals: Mapping[str, Tensor], state: Any, *, key: Key
    ) -> tuple[Plan, Any]:
        sure = signals["residual"].double() < self.threshold
        # At least one row is expected, so that one is drawn; rounding must not decide otherwise.
        keep = min(1.0, max(self.keep, (1 + 1e-9) / rows))
        probability = torch.where(sure, keep, 1.0).double()
        drawn = _systematic(probability, key)
        counts = torch.zeros(rows, dtype=torch.int64)
        counts[drawn] = divide(torch.ones(int(drawn.sum())), self.budget(rows, state), 1)
        return Plan.included(counts, probability, sharing_rows(self.sharing, rows)), state

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(), cls(3, threshold=1.0, keep=0.5, sharing=2), cls(2, keep=0.01)]


def _systematic(probability: Tensor, key: Key) -> Tensor:
    """bool [rows]: row b with exactly its probability, and as many as expected, to within one."""
    order = key.permutation(len(probability))
    stop = probability[order].cumsum(0) + key.uniform(1)
    before = torch.cat((key.uniform(1), stop[:-1]))
    drawn = torch.empty(len(order), dtype=torch.bool)
    drawn[order] = stop.floor() > before.floor()
    # Rounding of the sums must not lose a row that is sure to be drawn.
    return drawn | (probability == 1)
