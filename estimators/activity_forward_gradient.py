"""Activity-perturbed forward gradients: exact slopes along noise at the outputs of layers.

Paper: M. Ren, S. Kornblith, R. Liao and G. Hinton, "Scaling forward gradient with local losses"
(arXiv 2210.03310).

Update, for rows b with n_b noises u each (B rows), with u_l the part at layer l, a_l its output and
x_l its clean input:

    slope_bk = sum_l <dL_b / da_l, u_bkl>
    grad W_l = 1/B sum_b 1/n_b sum_k  slope_bk u_bkl x_bl^T

Symbols: u `noise`, 1 / (B n_b) `plan.weight`, the sum over k before x `NoiseSum`.

The noise has as many numbers as the layers have outputs, not as they have weights, and every row
has its own: for one dense layer of m outputs the squared error is about m / (B n) times
mean |x_b|^2 |dL_b / da|^2, where one tangent of the weights for the whole batch has m n' |grad W|^2
(n' inputs).

Differs from the paper in: exact for any number of layers at once, and no local losses (give the
model some, and the objective their sum); any layer with parameters.

Cost a step, n directions a row: n + 1 queries a row, of which n carry a tangent. Memory: a pass
with its tangents; nothing that grows with depth.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from fwdlearn.allocator import Plan
from fwdlearn.estimator import Estimate, Estimator, Traits
from fwdlearn.keys import Key
from fwdlearn.laws import check_law
from fwdlearn.noise import NoiseSum, SiteNoise
from fwdlearn.oracle import ActivationOracle, require_fed


@dataclass(frozen=True)
class ActivityForwardGradient(Estimator):
    """Exact slopes along random changes of all layers' outputs, put back by local products.

    Args:
        law: "rademacher" or "gaussian".

    Raises:
        ValueError: the law is unknown.
        UsageError: a parameter feeds no layer's output, or the model has no forward derivative.
        NonFiniteError: most slopes are not finite.

    Example:
        >>> ActivityForwardGradient().traits.target
        'gradient'
    """

    law: str = "rademacher"

    traits = Traits(ActivationOracle, "activations", "gradient", 1, 1)

    def __post_init__(self) -> None:
        check_law("ActivityForwardGradient", self.law, None)

    def estimate(
        self,
        oracle: ActivationOracle,
        params: Mapping[str, Tensor],
        state: Any,
        *,
        key: Key,
        plan: Plan,
    ) -> tuple[Estimate, Any]:
        """See `Estimator.estimate`; there is no state."""
        start = oracle.queries
        require_fed(oracle.left_out, "ActivityForwardGradient")
        noise = SiteNoise(key, oracle.sites, plan.directions, self.law)
        losses, slopes = oracle.noisy_slopes(plan.row, noise, plan.direction)
        losses, slopes = losses.double(), slopes.double()
        weight, nonfinite = plan.finite(losses.isfinite() & slopes.isfinite())
        slopes = torch.where(weight > 0, slopes, 0.0)
        found = oracle.gather(NoiseSum(noise, plan.row, plan.direction, weight * slopes, plan.rows))
        grad = {name: found[name].to(value.dtype) for name, value in params.items()}
        loss = (weight * torch.where(weight > 0, losses, 0.0)).sum()
        info = {"coef_abs": slopes.abs().mean(), "nonfinite": torch.tensor(nonfinite)}
        return Estimate(grad, loss, oracle.queries - start, info), state

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(), cls(law="gaussian")]
