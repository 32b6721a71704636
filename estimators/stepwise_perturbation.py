"""Perturbation of recurrent networks as it was published: credit for the loss of the same step.

Paper: Y. Fernandez, S. Keemink and M. van Gerven, "Gradient-free training of recurrent neural
networks using random perturbations" (Front. Neurosci. 18, 2024, https://arxiv.org/abs/2405.08967).

For rows b with n_b noisy passes each (B rows), l_t the loss of step t, x_t the clean input of a
layer, a_t the outputs of all layers and N how many numbers these have:

    ANP  grad W = 1/B sum_b 1/n_b sum_k sum_t  N dl_bkt / |da_bkt|^2  da_bkt x_bt^T
    WP   grad W = 1/B sum_b 1/n_b sum_k sum_t  dl_bkt / sigma  E_bkt
    dl_bkt = l_t(noisy) - l_t(clean),   da_bkt = a_t(noisy) - a_t(clean)

ANP adds noise to the outputs of layers and measures what has changed, the echo of earlier noise
included; WP draws new weights E at every step. Both are here to be compared with. Neither gives
noise credit for what happens later, so none of them follows the gradient through time: WP and NP
(`CausalNodePerturbation(horizon=0, exact_head=False)`) have the mean of backpropagation truncated
after one step, ANP that times how far noise has spread. And the noise of all steps disturbs every
one of them: weights that stand still (`SPSA`) make WP the better for being simpler.

Symbols: N dl / |da|^2 `ratio`, da `shift`, E `family`, dl / sigma / (B n_b) `slopes`.

Differs from the paper in: scalars and norms for each row, not for the batch; one norm of all layers
and N, not its square root (as later work has it, and only so is an output without echo followed by
its gradient); sigma^2 for sigma; many noisy passes a row. DANP and DWP are these on a network with
decorrelated inputs (`fwdlearn.models`).

Cost a step, n directions a row: n + 1 queries a row, each through the whole sequence.
"""

from __future__ import annotations

import math
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
from fwdlearn.noise import GivenNoise, NoiseSum, SiteNoise
from fwdlearn.oracle import TimeOracle, require_fed


@dataclass(frozen=True)
class StepwiseActivityPerturbation(Estimator):
    """Noise in all layers at every step, the change that it makes, and that step's loss (ANP).

    Args:
        sigma: size of the noise, positive.
        law: "rademacher" or "gaussian".

    Raises:
        ValueError: a setting is out of range.
        UsageError: a parameter feeds no layer's output.

    Example:
        >>> StepwiseActivityPerturbation().traits.target
        'biased'
    """

    sigma: float = 1e-2
    law: str = "rademacher"

    traits = Traits(TimeOracle, "activations", "biased", 1, 1)

    def __post_init__(self) -> None:
        _check(self)

    def estimate(
        self,
        oracle: TimeOracle,
        params: Mapping[str, Tensor],
        state: Any,
        *,
        key: Key,
        plan: Plan,
    ) -> tuple[Estimate, Any]:
        start, sites = oracle.queries, dict(oracle.step_sites)
        require_fed(oracle.step_left_out, "StepwiseActivityPerturbation")

        def noise(step: int) -> SiteNoise:
            return SiteNoise(key.fold(step), sites, plan.directions, self.law)

        units = sum(math.prod(site.shape) for site in sites.values())
        every, seen = torch.arange(len(plan), device=plan.row.device), _Seen(plan)
        grad: dict[str, Tensor] = {}
        for moment in oracle.moments(plan.row, noise, plan.direction, self.sigma, shifts=True):
            change, weight = seen.change(moment.clean, moment.losses)
            square = torch.zeros_like(change)
            for shift in moment.shifts.values():
                square += shift.reshape(len(shift), -1).double().square().sum(1)
            # Noise of which nothing is left, by rounding, tells nothing.
            ratio = torch.where(square > 0, units * change / square, 0.0)
            shifts = GivenNoise(moment.shifts)
            total = NoiseSum(shifts, plan.row, every, weight * ratio, plan.rows)
            _add(grad, moment.gather(total))
        made = {name: grad[name].to(value.dtype) for name, value in params.items()}
        return seen.estimate(made, self.sigma, oracle.queries - start), state

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(), cls(sigma=0.2, law="gaussian")]


@dataclass(frozen=True)
class StepwiseWeightPerturbation(Estimator):
    """New noise in the weights at every step, and that step's loss (WP).

    Args:
        sigma: size of the noise, positive.
        law: "rademacher" or "gaussian".
        rank: of the directions of matrices (at least 1), or None for independent entries.

    Raises:
        ValueError: a setting is out of range.

    Example:
        >>> StepwiseWeightPerturbation().traits.perturbs
        'weights'
    """

    sigma: float = 1e-2
    law: str = "rademacher"
    rank: int | None = 1

    traits = Traits(TimeOracle, "weights", "biased", 1, 1)

    def __post_init__(self) -> None:
        _check(self, self.rank)

    def estimate(
        self,
        oracle: TimeOracle,
        params: Mapping[str, Tensor],
        state: Any,
        *,
        key: Key,
        plan: Plan,
    ) -> tuple[Estimate, Any]:
        start, seen = oracle.queries, _Seen(plan)

        def family(step: int) -> Directions:
            return Directions(key.fold(step), params, plan.directions, self.law, self.rank)

        grad: dict[str, Tensor] = {}
        for moment in oracle.moments(plan.row, family, plan.direction, self.sigma):
            change, weight = seen.change(moment.clean, moment.losses)
            slopes = change.new_zeros(plan.directions)
            slopes.index_add_(0, plan.direction, weight * change / self.sigma)
            _add(grad, DirectionGradient(family(moment.step), slopes))
        return seen.estimate(grad, self.sigma, oracle.queries - start), state

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(), cls(sigma=0.2, law="gaussian", rank=2), cls(sigma=0.1, rank=None)]


class _Seen:
    """The losses of the steps so far. A query that is no longer finite counts no more."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.weight, self.nonfinite = plan, plan.weight, 0
        self.total = torch.zeros_like(plan.weight)
        self.clean = self.total.new_zeros(plan.rows)

    def change(self, clean: Tensor, losses: Tensor) -> tuple[Tensor, Tensor]:
        """What noise has changed at a step, and the weights: float64 [pairs] both."""
        clean = clean.double()
        change = losses.double() - clean[self.plan.row]
        if not bool(change.isfinite().all()):
            valid = change.isfinite() & (self.weight > 0)
            self.weight, self.nonfinite = self.plan.finite(valid)
        change = torch.where(self.weight > 0, change, 0.0)
        self.total, self.clean = self.total + change, self.clean + clean
        return change, self.weight

    def estimate(self, grad: Mapping[str, Tensor], sigma: float, queries: int) -> Estimate:
        clean = torch.where(self.weight > 0, self.clean[self.plan.row], 0.0)
        size = self.total.abs().mean() / sigma
        info = {"coef_abs": size, "nonfinite": torch.tensor(self.nonfinite)}
        return Estimate(grad, (self.weight * clean).sum(), queries, info)


def _check(
    estimator: StepwiseActivityPerturbation | StepwiseWeightPerturbation, rank: int | None = None
) -> None:
    owner = type(estimator).__name__
    if not 0 < estimator.sigma < math.inf:
        raise ValueError(f"{owner}(sigma=...) must be positive, got {estimator.sigma!r}.")
    check_law(owner, estimator.law, rank)


def _add(grad: dict[str, Tensor], part: Mapping[str, Tensor]) -> None:
    for name in part:
        grad[name] = grad[name] + part[name] if name in grad else part[name]
