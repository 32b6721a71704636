"""The simplex: entries that are not negative and have a fixed sum.

Papers: M. Frank and P. Wolfe, "An algorithm for quadratic programming" (Naval Research Logistics
Quarterly 3, 1956); J. Duchi et al., "Efficient projections onto the l1-ball for learning in high
dimensions" (ICML 2008), for the projection by sorting.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from fwdlearn.optim.sets.base import ConstraintSet
from fwdlearn.optim.sets.vertex import Entries, Vertex


@dataclass(frozen=True)
class Simplex(ConstraintSet):
    """Entries of at least 0 with a fixed sum.

        {x : x_i >= 0, sum_i x_i = total}        LMO(d) = total e_i,  i = argmin d

    Diameter total sqrt(2). An update changes one entry, beside the scaling. An equality holds in
    floating point only up to rounding, so `excess` is seldom exactly 0.

    Args:
        total: the sum, positive.

    Example:
        >>> Simplex().vertex(torch.tensor([2.0, -1.0])).dense(torch.zeros(2))
        tensor([0., 1.])
    """

    total: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.total < float("inf"):
            raise ValueError(f"Simplex(total=...) must be positive, got {self.total!r}.")

    def vertex(self, direction: Tensor) -> Vertex:
        index = direction.reshape(-1).argmin().view(1)
        return Entries(index, direction.new_full((1,), self.total))

    def diameter(self, shape: torch.Size) -> float:
        return self.total * math.sqrt(2) if shape.numel() > 1 else 0.0

    def excess(self, point: Tensor) -> float:
        total = float(point.sum(dtype=torch.float64))
        return max(abs(total - self.total), -float(point.min())) / self.total

    def project(self, point: Tensor) -> Tensor:
        return project_simplex(point.reshape(-1), self.total).view(point.shape)

    def settle(self, point: Tensor) -> float:
        total = float(point.clamp_(min=0).sum(dtype=torch.float64))
        point.mul_(self.total / total)
        return 0.0

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(), cls(total=5.0)]


def project_simplex(values: Tensor, total: float) -> Tensor:
    """[n]: the point of the simplex nearest to `values` [n], max(values - shift, 0)."""
    ordered = values.sort(descending=True).values
    # With the j largest entries kept, this is the shift that makes them sum to the total; as
    # many are kept as stay positive under it.
    kept = torch.arange(1, len(values) + 1, device=values.device, dtype=values.dtype)
    shifts = (ordered.cumsum(0) - total) / kept
    shift = shifts[(ordered > shifts).sum() - 1]
    return (values - shift).clamp_(min=0)
