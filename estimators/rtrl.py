"""Real-time recurrent learning: the exact gradient, one parameter at a time.

Paper: R. J. Williams and D. Zipser, "A learning algorithm for continually running fully recurrent
neural networks" (Neural Computation 1, 1989).

Update, for rows b with n_b of the d numbers of the parameters, i (B rows), and e_i their unit
vectors:

    grad = 1/B sum_b  d / n_b sum_i  (dL_b / d theta_i) e_i

With n_b = d it is the gradient, to the last digit, and nothing is random. What the paper calls the
influence of the parameters on the state is here the tangents of the state along all e_i: a network
that runs step by step carries them along, in memory that does not grow with the sequence, and can
learn within it (`trainer.every`). With fewer directions the numbers are drawn at random, and the
mean is the gradient.

Symbols: sqrt(d) e_i `directions`, dL / d theta_i `slopes` / sqrt(d), B n_b `1 / plan.weight`.

Differs from the paper in: any model; a row's loss for its target; numbers drawn where there are
fewer directions than numbers.

Cost: a query, with its slope, for each (row, direction) pair, so d queries a row for the gradient.
Memory: d^2 numbers for the directions, and those d tangents a row; a reference for small networks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from fwdlearn.allocator import Plan
from fwdlearn.errors import UsageError
from fwdlearn.estimator import Estimate, Estimator, Traits
from fwdlearn.given import GivenDirections
from fwdlearn.gradient import DirectionGradient
from fwdlearn.keys import Key
from fwdlearn.oracle import SlopeOracle

# More numbers than that are not a small network's.
_MOST = 4096


@dataclass(frozen=True)
class RTRL(Estimator):
    """Exact slopes along the parameters themselves: with as many directions, the exact gradient.

    Raises:
        UsageError: the parameters have more than 4096 numbers.

    Example:
        >>> RTRL().traits.target
        'gradient'
    """

    traits = Traits(SlopeOracle, "weights", "gradient", 1)

    def estimate(
        self,
        oracle: SlopeOracle,
        params: Mapping[str, Tensor],
        state: Any,
        *,
        key: Key,
        plan: Plan,
    ) -> tuple[Estimate, Any]:
        start, size = oracle.queries, sum(value.numel() for value in params.values())
        if size > _MOST:
            raise UsageError(
                f"RTRL has a direction for each of {size} numbers, and {_MOST} are the most it "
                "takes; ForwardGradient has as many directions as you like."
            )
        directions = GivenDirections(params, _units(params, size))
        number = plan.direction % size
        if bool((plan.counts % size).any()):
            drawn = (key.uniform(plan.directions) * size).long()
            number = drawn.to(plan.row.device)[plan.direction]
        losses, slopes = oracle.slopes(plan.row, directions, number)
        losses, slopes = losses.double(), slopes.double()
        weight, nonfinite = plan.finite(losses.isfinite() & slopes.isfinite())
        slopes = torch.where(weight > 0, slopes, 0.0)
        coefficients = slopes.new_zeros(size).index_add_(0, number, weight * slopes)
        loss = (weight * torch.where(weight > 0, losses, 0.0)).sum()
        info = {"coef_abs": slopes.abs().mean(), "nonfinite": torch.tensor(nonfinite)}
        grad = DirectionGradient(directions, coefficients)
        return Estimate(grad, loss, oracle.queries - start, info), state

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls()]


def _units(params: Mapping[str, Tensor], size: int) -> dict[str, Tensor]:
    """Name -> [size, *shape]: sqrt(size) times the unit vectors."""
    device = next(iter(params.values())).device
    parts = (size**0.5 * torch.eye(size, dtype=torch.float64, device=device)).split(
        [value.numel() for value in params.values()], 1
    )
    return {
        name: part.reshape(size, *value.shape)
        for (name, value), part in zip(params.items(), parts, strict=True)
    }
