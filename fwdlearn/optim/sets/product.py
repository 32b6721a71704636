"""The product of sets: each tensor in its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fwdlearn.errors import UsageError
from fwdlearn.optim.sets.base import ConstraintSet
from fwdlearn.optim.sets.vertex import Vertex


@dataclass(frozen=True)
class Product:
    """Points that are lists of tensors, each in its own set.

        {(X_1, ..., X_n) : X_i in C_i}        LMO(D) = (LMO_1(D_1), ..., LMO_n(D_n))

    Diameter sqrt(sum of squares). The oracle separates, so one tensor can move while the others
    stay: a parameter group of `FrankWolfe` with a single set is the product of as many copies.

    Args:
        sets: one a tensor, in their order; none may couple tensors itself.

    Example:
        >>> from fwdlearn.optim.sets import L2Ball
        >>> Product((L2Ball(3.0), L2Ball(4.0))).diameter([torch.Size([2]), torch.Size([5])])
        10.0
    """

    sets: tuple[ConstraintSet, ...]

    def __post_init__(self) -> None:
        coupled = [type(each).__name__ for each in self.sets if each.couples]
        if coupled:
            raise UsageError(
                f"Product(sets=...) holds {coupled[0]}, which couples tensors, so its oracle does "
                "not separate; use sets of single tensors."
            )

    def vertices(self, directions: Sequence[Tensor]) -> list[Vertex]:
        """The linear minimisation oracle of each set."""
        return [each.vertex(d) for each, d in zip(self.sets, directions, strict=True)]

    def diameter(self, shapes: Sequence[torch.Size]) -> float:
        """The largest Euclidean distance between two lists of these shapes."""
        return math.hypot(*(s.diameter(shape) for s, shape in zip(self.sets, shapes, strict=True)))

    def distance(self, points: Sequence[Tensor]) -> float:
        """The Euclidean distance to the product: 0 inside."""
        return math.hypot(*(s.distance(x) for s, x in zip(self.sets, points, strict=True)))

    def contains(self, points: Sequence[Tensor], tolerance: float = 1e-6) -> bool:
        """Whether every tensor lies inside its set."""
        return all(s.contains(x, tolerance) for s, x in zip(self.sets, points, strict=True))

    def project(self, points: Sequence[Tensor]) -> list[Tensor]:
        """Each tensor projected onto its set."""
        return [s.project(x) for s, x in zip(self.sets, points, strict=True)]

    @classmethod
    def examples(cls) -> list[Product]:
        from fwdlearn.optim.sets.norms import L1Ball, L2Ball

        return [cls((L1Ball(2.0), L2Ball(0.5)))]
