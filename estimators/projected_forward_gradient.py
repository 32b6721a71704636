"""The projected forward gradient: the batch's gradient, projected on a few random tangents.

Paper: M. Rostami and S. Kia, "Projected forward gradient-guided Frank-Wolfe algorithm via variance
reduction" (arXiv 2403.12511), where it is the oracle of an averaged Frank-Wolfe method. Pair it
with `fwdlearn.optim.FrankWolfe`.

Update, for the loss f of the batch and m tangents u, the same for all rows:

    grad = 1/m sum_k  <grad f(theta), u_k> u_k

Symbols: u `directions`, m `tangents`, <grad f, u> the sum over rows of `weight` times `slopes`.

It is unbiased. E |grad|^2 is (d + m + 1) / m |grad f|^2 for Gaussian tangents of d independent
entries, (d + m - 1) / m for those of signs: noise in proportion to the gradient, which a method
whose steps do not shrink with the gradient, such as Frank-Wolfe, has to average away.

Differs from the paper in: tangents of signs unless the law says otherwise, which add less noise;
any number of tangents; rows with fewer than m use the first ones.

Cost: a query, with its slope, for each (row, tangent) pair. No memory but that of a pass: no graph,
and the tangents are drawn again for the update.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from fwdlearn.allocator import Plan
from fwdlearn.directions import Directions
from fwdlearn.estimator import Estimate, Estimator, Traits
from fwdlearn.gradient import DirectionGradient
from fwdlearn.keys import Key
from fwdlearn.laws import check_law
from fwdlearn.oracle import SlopeOracle


@dataclass(frozen=True)
class ProjectedForwardGradient(Estimator):
    """Exact slopes of the batch's loss along tangents that all rows share; for `FrankWolfe`.

    Rows share their tangents whatever the plan says, so that m numbers and a key are the whole
    estimate, and m of `FrankWolfe`'s averaging is known: `info["tangents"]`. Where rows may have
    tangents of their own, `ForwardGradient` gets more out of the same queries.

    Args:
        law: "rademacher", or "gaussian" as in the paper.
        rank: of the tangents of matrices (at least 1), or None for independent entries.

    Raises:
        ValueError: a setting is out of range.
        NonFiniteError: most slopes are not finite.

    Example:
        >>> ProjectedForwardGradient().traits.target
        'gradient'
    """

    law: str = "rademacher"
    rank: int | None = None

    traits = Traits(SlopeOracle, "weights", "gradient", queries_per_direction=1)

    def __post_init__(self) -> None:
        check_law("ProjectedForwardGradient", self.law, self.rank)

    def estimate(
        self,
        oracle: SlopeOracle,
        params: Mapping[str, Tensor],
        state: Any,
        *,
        key: Key,
        plan: Plan,
    ) -> tuple[Estimate, Any]:
        """See `Estimator.estimate`; there is no state."""
        start, tangents = oracle.queries, int(plan.counts.max())
        directions = Directions(key, params, tangents, self.law, self.rank)
        number = _place(plan)
        losses, slopes = oracle.slopes(plan.row, directions, number)
        losses, slopes = losses.double(), slopes.double()
        weight, nonfinite = plan.finite(losses.isfinite() & slopes.isfinite())
        slopes = torch.where(weight > 0, slopes, 0.0)
        coefficients = slopes.new_zeros(tangents).index_add_(0, number, weight * slopes)
        grad = DirectionGradient(directions, coefficients)
        info = {
            "variance": (coefficients.square() * (grad.square_norms() - 1)).sum(),
            "coef_abs": slopes.abs().mean(),
            "nonfinite": torch.tensor(nonfinite),
            "tangents": torch.tensor(tangents),
        }
        loss = (weight * torch.where(weight > 0, losses, 0.0)).sum()
        rows = {"square_slope": plan.square_slopes(slopes, weight)}
        return Estimate(grad, loss, oracle.queries - start, info, rows), state

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(), cls(law="gaussian"), cls(law="gaussian", rank=1)]


def _place(plan: Plan) -> Tensor:
    """int64 [pairs]: which of its row's pairs each one is."""
    counts = plan.counts.to(plan.row.device)
    first = counts.cumsum(0) - counts
    return torch.arange(len(plan), device=plan.row.device) - first[plan.row]
