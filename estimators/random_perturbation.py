"""Random perturbation of the weights: finite differences along random directions.

Papers: J. C. Spall, "Multivariate stochastic approximation using a simultaneous perturbation
gradient approximation" (IEEE TAC 37, 1992), two-sided; Y. Nesterov and V. Spokoiny, "Random
gradient-free minimization of convex functions" (Found. Comput. Math. 17, 2017), one-sided;
W. Kool, H. van Hoof and M. Welling, "Buy 4 REINFORCE samples, get a baseline for free" (2019),
leave-one-out; B. Sarkar et al., "Evolution strategies at the hyperscale" (arXiv 2511.16652),
low-rank directions.

Update, for rows b with n_b directions z each (B rows):

    grad = 1/B sum_b 1/n_b sum_k  (L_b(theta + sigma z_bk) - baseline_bk) / sigma * z_bk

Symbols: theta `params`, z `directions`, sigma `sigma`, 1 / (B n_b) `plan.weight`, the factor
before z `slopes`.

Differs from the papers in: many directions a step; directions are private to a row unless the plan
shares them; matrices get rank-one Rademacher directions, of identity covariance; a baseline is
always subtracted, since without one the variance grows with (L / sigma)^2.

Cost a step, n directions a row: n queries a row with `leave-one-out`, n + 1 with `clean`, 2 n for
SPSA. No memory beside the thin factors. For small sigma, the one-sided form has half the variance
of the two-sided one at equal queries, and a bias of order sigma only where z is not symmetric.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor

from fwdlearn.allocator import Plan
from fwdlearn.directions import Directions, scales_of
from fwdlearn.errors import UsageError
from fwdlearn.estimator import Estimate, Estimator, Traits
from fwdlearn.gradient import DirectionGradient
from fwdlearn.keys import Key
from fwdlearn.laws import check_law
from fwdlearn.oracle import LossOracle


@dataclass(frozen=True)
class RandomPerturbation(Estimator):
    """One-sided differences along random directions.

    Args:
        sigma: size of the perturbation, positive.
        baseline: "clean" subtracts each row's unperturbed loss (one more query a row);
            "leave-one-out" subtracts the mean of the same row's other queries (free, needs two
            directions a row or more).
        law: "rademacher" or "gaussian".
        rank: of the directions of matrices (at least 1), or None for independent entries.
        scales: pattern of parameter names -> factor on sigma there, positive; the first pattern
            that matches counts. A parameter with a large gradient and little to learn drowns the
            others: perturb it less.

    Raises:
        ValueError: a setting is out of range.
        UsageError: "leave-one-out" with a plan that gives some row a single direction.

    Example:
        >>> RandomPerturbation(sigma=0.01).traits.queries_per_row
        1
    """

    sigma: float = 1e-3
    baseline: Literal["clean", "leave-one-out"] = "clean"
    law: str = "rademacher"
    rank: int | None = 1
    scales: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        _check(self)
        if self.baseline not in ("clean", "leave-one-out"):
            raise ValueError(
                "RandomPerturbation(baseline=...) must be 'clean' or 'leave-one-out', got "
                f"{self.baseline!r}."
            )

    @property
    def traits(self) -> Traits:
        return Traits(LossOracle, "weights", "smoothed", 1, int(self.baseline == "clean"))

    def estimate(
        self, oracle: LossOracle, params: Mapping[str, Tensor], state: Any, *, key: Key, plan: Plan
    ) -> tuple[Estimate, Any]:
        start = oracle.queries
        directions = _directions(self, key, params, plan)
        losses = oracle.losses(plan.row, directions, plan.direction, self.sigma).double()
        valid, least = losses.isfinite(), 1
        if self.baseline == "clean":
            clean = oracle.losses(torch.arange(plan.rows, device=plan.row.device)).double()
            baseline = clean[plan.row]
            valid &= baseline.isfinite()
            centre = baseline
        else:
            if plan.fewest < 2:
                raise UsageError(
                    "RandomPerturbation(baseline='leave-one-out') needs two directions a row or "
                    "more; raise the allocator's directions, or use baseline='clean'."
                )
            baseline, least, centre = plan.others(losses, valid), 2, losses
        weight, nonfinite = plan.finite(valid, least)
        slopes = torch.where(weight > 0, (losses - baseline) / self.sigma, 0.0)
        loss = (weight * torch.where(weight > 0, centre, 0.0)).sum()
        queries = oracle.queries - start
        made = _estimate(directions, plan, weight, slopes, loss, queries, nonfinite, least)
        return made, state

    @classmethod
    def examples(cls) -> list[Self]:
        return [
            cls(),
            cls(sigma=0.5, baseline="leave-one-out"),
            cls(sigma=0.02, law="gaussian", rank=2),
            cls(sigma=0.1, rank=None),
        ]


@dataclass(frozen=True)
class SPSA(Estimator):
    """Two-sided (central) differences along random directions.

    Args:
        sigma: size of the perturbation, positive.
        law: "rademacher" or "gaussian".
        rank: of the directions of matrices (at least 1), or None for independent entries.
        scales: pattern of parameter names -> factor on sigma there, positive; the first pattern
            that matches counts. A parameter with a large gradient and little to learn drowns the
            others: perturb it less.

    Raises:
        ValueError: a setting is out of range.

    Example:
        >>> SPSA().traits.queries_per_direction
        2
    """

    sigma: float = 1e-3
    law: str = "rademacher"
    rank: int | None = 1
    scales: Mapping[str, float] | None = None

    traits = Traits(LossOracle, "weights", "smoothed", queries_per_direction=2)

    def __post_init__(self) -> None:
        _check(self)

    def estimate(
        self, oracle: LossOracle, params: Mapping[str, Tensor], state: Any, *, key: Key, plan: Plan
    ) -> tuple[Estimate, Any]:
        start = oracle.queries
        directions = _directions(self, key, params, plan)
        # The two sides of a pair stay adjacent, so that they run in the same block.
        signs = torch.tensor([1.0, -1.0], dtype=torch.float64, device=plan.row.device)
        scale = (self.sigma * signs).repeat(len(plan))
        row, direction = plan.row.repeat_interleave(2), plan.direction.repeat_interleave(2)
        up, down = oracle.losses(row, directions, direction, scale).double().view(-1, 2).unbind(1)
        weight, nonfinite = plan.finite(up.isfinite() & down.isfinite())
        slopes = torch.where(weight > 0, (up - down) / (2 * self.sigma), 0.0)
        loss = (weight * torch.where(weight > 0, (up + down) / 2, 0.0)).sum()
        queries = oracle.queries - start
        return _estimate(directions, plan, weight, slopes, loss, queries, 2 * nonfinite), state

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(), cls(sigma=0.5), cls(sigma=0.05, law="gaussian"), cls(sigma=0.1, rank=None)]


def _check(estimator: RandomPerturbation | SPSA) -> None:
    owner = type(estimator).__name__
    if not 0 < estimator.sigma < float("inf"):
        raise ValueError(f"{owner}(sigma=...) must be positive, got {estimator.sigma!r}.")
    check_law(owner, estimator.law, estimator.rank)
    for pattern, scale in (estimator.scales or {}).items():
        if not 0 < scale < float("inf"):
            raise ValueError(
                f"{owner}(scales=...) must be positive, got {scale!r} for {pattern!r}."
            )


def _directions(
    estimator: RandomPerturbation | SPSA, key: Key, params: Mapping[str, Tensor], plan: Plan
) -> Directions:
    scales = scales_of(type(estimator).__name__, estimator.scales, params)
    law, rank = estimator.law, estimator.rank
    return Directions(key, params, plan.directions, law, rank, scales)


def _estimate(
    directions: Directions,
    plan: Plan,
    weight: Tensor,
    slopes: Tensor,
    loss: Tensor,
    queries: int,
    nonfinite: int,
    least: int = 1,
) -> Estimate:
    coefficients = slopes.new_zeros(plan.directions)
    coefficients.index_add_(0, plan.direction, weight * slopes)
    # Directions are independent: the covariance of the sum is the sum of the covariances, and
    # identity covariance makes the mean of c^2 the squared mean of c z.
    grad = DirectionGradient(directions, coefficients)
    info = {
        "variance": (coefficients.square() * (grad.square_norms() - 1)).sum(),
        "coef_abs": slopes.abs().mean(),
        "nonfinite": torch.tensor(nonfinite),
    }
    rows = {"square_slope": plan.square_slopes(slopes, weight, least)}
    return Estimate(grad, loss, queries, info, rows)
