"""Losses under noise against a baseline: what every estimator that asks for losses begins with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fwdlearn.allocator import Plan
from fwdlearn.directions import Directions
from fwdlearn.errors import UsageError
from fwdlearn.gradient import DirectionGradient
from fwdlearn.oracle import LossOracle

BASELINES = ("clean", "leave-one-out", "antithetic")

# (row, number, scale), each [queries] -> losses [queries].
Ask = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass
class Differences:
    """Asks for noisy losses, compares them, and keeps count.

    Args:
        owner: name of the estimator, for errors.
        sigma: scale of the noise.
        baseline: one of `BASELINES`.
        clean: the clean losses, [rows].
        plan: which rows get which numbers of the noise.

    Attributes:
        nonfinite: queries dropped so far.
        weight: of the pairs in the last answer, 0 for those that were dropped.
    """

    owner: str
    sigma: float
    baseline: str
    clean: Tensor
    plan: Plan
    nonfinite: int = 0
    _sizes: list[Tensor] = field(default_factory=list)
    _squares: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.clean, self.weight = self.clean.double(), self.plan.weight
        if self.baseline == "leave-one-out" and self.plan.fewest < 2:
            raise UsageError(
                f"{self.owner}(baseline='leave-one-out') needs two directions a row or more; "
                "raise the allocator's directions, or use baseline='clean'."
            )

    def coefficients(self, ask: Ask) -> Tensor:
        """float64 [pairs]: weight of the plan times difference over sigma; 0 where not finite."""
        plan, least, each = self.plan, 1, 1
        row, number, clean = plan.row, plan.direction, self.clean[plan.row]
        scale = torch.full((len(plan),), self.sigma, dtype=torch.float64, device=row.device)
        if self.baseline == "antithetic":
            # The two sides of a pair are of one row and stay adjacent: they run in one block.
            row, number, each = row.repeat_interleave(2), number.repeat_interleave(2), 2
            scale = torch.stack((scale, -scale), 1).flatten()
            up, down = ask(row, number, scale).double().view(-1, 2).unbind(1)
            valid = up.isfinite() & down.isfinite() & clean.isfinite()
            slopes = (up - down) / (2 * self.sigma)
        else:
            losses = ask(row, number, scale).double()
            valid, baseline = losses.isfinite() & clean.isfinite(), clean
            if self.baseline == "leave-one-out":
                baseline, least = plan.others(losses, valid), 2
            slopes = (losses - baseline) / self.sigma
        weight, dropped = plan.finite(valid, least)
        self.weight = weight
        self.nonfinite += each * dropped
        slopes = torch.where(weight > 0, slopes, 0.0)
        self._sizes.append(slopes.abs().mean())
        self._squares.append(plan.square_slopes(slopes, weight, least))
        return weight * slopes

    def along(self, oracle: LossOracle, directions: Directions) -> DirectionGradient:
        """The gradient from losses along directions of the weights."""
        pairs = self.coefficients(
            lambda row, number, scale: oracle.losses(row, directions, number, scale)
        )
        sums = pairs.new_zeros(self.plan.directions)
        return DirectionGradient(directions, sums.index_add_(0, self.plan.direction, pairs))

    def weighted(self, values: Tensor) -> Tensor:
        """Values of rows, [rows, ...], times the rows' weights; 0 where the loss is not finite."""
        kept, weight = self.clean.isfinite(), self.plan.row_weight
        if weight is None:
            weight = torch.full_like(self.clean, 1 / self.plan.rows)
        weight = weight.to(kept.device)
        weight = torch.where(kept, weight * (weight.sum() / weight[kept].sum()), 0.0)
        shape = (-1, *[1] * (values.dim() - 1))
        return torch.where(kept.view(shape), values, 0.0) * weight.view(shape).to(values.dtype)

    @property
    def loss(self) -> Tensor:
        """The mean of the clean losses that are finite."""
        return self.weighted(self.clean).sum()

    @property
    def info(self) -> dict[str, Tensor]:
        """`coef_abs` and `nonfinite` of `Estimate.info`; the first where anything was asked."""
        sizes = {"coef_abs": torch.stack(self._sizes).mean()} if self._sizes else {}
        return {**sizes, "nonfinite": torch.tensor(self.nonfinite)}

    @property
    def rows(self) -> dict[str, Tensor]:
        """What `Estimate.rows` tells: layers perturbed apart make up one direction."""
        return {"square_slope": torch.stack(self._squares).sum(0)} if self._squares else {}
