"""Node perturbation with measured activities.

Paper: S. Dalm, M. van Gerven and N. Ahmad, "Effective learning with node perturbation in deep
neural networks" (arXiv 2310.00965).

Noise of size sigma enters the output of every layer at once. What it changes there is measured,
`da_l = a_l(noisy) - a_l(clean)`: the layer's own noise and whatever reached it from below. For
rows b with n_b noisy passes each (B rows), with x_l the clean input of layer l,

    grad W_l = 1/B sum_b 1/n_b sum_k  N (L_bk - L_b) da_bkl / (sum_m |da_bkm|^2)  x_bl^T

Symbols: da `shift.outputs`, N the number of outputs of all layers `units`, N (L_bk - L_b) /
sum |da|^2 `coefficients`, 1 / (B n_b) `plan.weight`.

To first order its mean is C_l g_l, with g_l the gradient by the layer's output and C_l the
covariance of da_l over the mean variance of an output: never uphill, and the gradient itself where
nothing comes from below. It needs no knowledge of the noise, which is its point: noise may come
from the device and not from us. Where the noise is known, `NodePerturbation` is unbiased.

Differs from the paper in: several noisy passes of a row; Rademacher noise by default; any layer
with parameters, not only fully connected ones. The factor is N, as E[v v^T / |v|^2] = 1 / N wants
it; older code of the authors has its square root.

Cost a step, n directions a row: n + 1 queries a row. Memory: beside the clean pass with the inputs
and outputs of its layers, one sum of the size of those outputs, and a block of noisy passes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from fwdlearn.allocator import Plan
from fwdlearn.directions import check_law
from fwdlearn.errors import UsageError
from fwdlearn.estimator import Estimate, Estimator, Traits
from fwdlearn.keys import Key
from fwdlearn.noise import GivenNoise, NoiseSum, SiteNoise
from fwdlearn.oracle import ActivationOracle


@dataclass(frozen=True)
class ActivityNodePerturbation(Estimator):
    """Noise at all layers at once, and the changes of activity that it causes (ANP).

    Args:
        sigma: size of the noise, positive; changes of single precision activities below 1e-3 of
            their size are rounded away.
        law: "rademacher" or "gaussian".

    Raises:
        ValueError: a setting is out of range.
        UsageError: a parameter feeds no layer's output.

    Example:
        >>> ActivityNodePerturbation(sigma=0.001).traits.target
        'biased'
    """

    sigma: float = 1e-2
    law: str = "rademacher"

    traits = Traits(ActivationOracle, "activations", "biased", 1, 1)

    def __post_init__(self) -> None:
        if not 0 < self.sigma < math.inf:
            raise ValueError(
                f"ActivityNodePerturbation(sigma=...) must be positive, got {self.sigma!r}."
            )
        check_law("ActivityNodePerturbation", self.law, None)

    def estimate(
        self,
        oracle: ActivationOracle,  # type: ignore[override]
        params: Mapping[str, Tensor],
        state: Any,
        *,
        key: Key,
        plan: Plan,
    ) -> tuple[Estimate, Any]:
        start = oracle.queries
        for name, why in oracle.left_out.items():
            raise UsageError(
                f"ActivityNodePerturbation has no gradient of {name}: {why}. Set its "
                "requires_grad to False, or choose an estimator that perturbs weights."
            )
        clean = oracle.clean(outputs=True)
        units = sum(math.prod(site.shape) for site in oracle.sites.values())
        noise = SiteNoise(key, oracle.sites, plan.directions, self.law)
        sums = {name: torch.zeros_like(value) for name, value in clean.outputs.items()}
        coefficients = plan.weight.new_zeros(len(plan))
        valid = torch.zeros(len(plan), dtype=torch.bool, device=plan.row.device)
        for shift in oracle.noisy_shifts(clean, plan.row, noise, plan.direction, self.sigma):
            row = plan.row[shift.queries]
            square = sum(
                value.reshape(len(value), -1).double().square().sum(1)
                for value in shift.outputs.values()
            )
            change = shift.losses.double() - clean.losses[row].double()
            ratio = units * change / square
            good = valid[shift.queries] = ratio.isfinite()
            coefficients[shift.queries] = torch.where(good, ratio, 0.0)
            _add(sums, GivenNoise(shift.outputs), row, torch.nonzero(good).flatten(), ratio)
        weight, nonfinite = plan.finite(valid)
        # The queries of a row that count have one weight.
        share = weight.new_zeros(plan.rows).scatter_reduce_(0, plan.row, weight, "amax")
        for value in sums.values():
            value.mul_(share.to(value.dtype).view(-1, *[1] * (value.dim() - 1)))
        grad = clean.gather(sums)
        made = {name: grad[name].to(value.dtype) for name, value in params.items()}
        losses = torch.where(weight > 0, clean.losses[plan.row], 0.0)
        info = {
            "coef_abs": coefficients.abs().mean() * self.sigma,
            "nonfinite": torch.tensor(nonfinite),
        }
        return Estimate(made, (weight * losses).sum(), oracle.queries - start, info), state

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(), cls(sigma=0.2, law="gaussian"), cls(sigma=1e-3)]


def _add(
    sums: dict[str, Tensor], shifts: GivenNoise, row: Tensor, index: Tensor, ratio: Tensor
) -> None:
    """Adds ratio times shift of some queries of a block to the sums of their rows."""
    if not len(index):
        return
    first, last = int(row.min()), int(row.max())
    terms = NoiseSum(shifts, row[index] - first, index, ratio[index], last + 1 - first)
    for name in terms:
        sums[name][first : last + 1].add_(terms[name])
