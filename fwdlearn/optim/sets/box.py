"""The box: entries between two limits.

Paper: E. Levitin and B. Polyak, "Constrained minimization methods" (USSR Computational Mathematics
and Mathematical Physics 6, 1966).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from fwdlearn.optim.sets.base import ConstraintSet
from fwdlearn.optim.sets.vertex import Dense, Vertex


@dataclass(frozen=True)
class Box(ConstraintSet):
    """Entries between two limits.

        {x : low <= x_i <= high}        LMO(d)_i = low where d_i > 0, else high

    Diameter (high - low) sqrt(n).

    Args:
        low: below `high`.
        high: finite.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if not -math.inf < self.low < self.high < math.inf:
            raise ValueError(
                f"Box(low=...) must be less than high, both finite, got {self.low!r} and "
                f"{self.high!r}."
            )

    def vertex(self, direction: Tensor) -> Vertex:
        low, high = (direction.new_tensor(limit) for limit in (self.low, self.high))
        return Dense(torch.where(direction > 0, low, high))

    def diameter(self, shape: torch.Size) -> float:
        return (self.high - self.low) * math.sqrt(shape.numel())

    def excess(self, point: Tensor) -> float:
        least, most = (float(limit) for limit in torch.aminmax(point))
        return max(most - self.high, self.low - least) / ((self.high - self.low) / 2)

    def project(self, point: Tensor) -> Tensor:
        return point.clamp(self.low, self.high)

    def settle(self, point: Tensor) -> float:
        point.clamp_(self.low, self.high)
        return 0.0

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(-1.0, 1.0), cls(0.25, 4.0)]
