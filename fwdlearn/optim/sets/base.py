"""The one interface of every constraint set."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from fwdlearn.optim.sets.vertex import Vertex


class ConstraintSet(ABC):
    """A convex compact set of tensors, for points of any shape. Subclasses are frozen dataclasses.

    Attributes:
        couples: whether one tensor's limits depend on another tensor. `FrankWolfe` updates one
            tensor at a time and refuses such sets.
    """

    couples: ClassVar[bool] = False

    @abstractmethod
    def vertex(self, direction: Tensor) -> Vertex:
        """The linear minimisation oracle: a point s of the set with the least <s, direction>."""

    @abstractmethod
    def diameter(self, shape: torch.Size) -> float:
        """The largest Euclidean distance between two points of that shape."""

    @abstractmethod
    def excess(self, point: Tensor) -> float:
        """How far the limits are exceeded, relative to the set's size: at most 0 inside.

        A convex function of the point, so that along a step towards a vertex it can be bounded
        without being computed.
        """

    @abstractmethod
    def project(self, point: Tensor) -> Tensor:
        """The nearest point of the set, where a class does not say otherwise; a new tensor."""

    @abstractmethod
    def settle(self, point: Tensor) -> float:
        """Puts back, in place, a point that rounding has carried outside.

        Returns:
            An upper bound of `excess`, now at most 0 up to the rounding of one operation.
        """

    def rounding(self, point: Tensor) -> float:
        """How much a step can raise `excess` by rounding alone."""
        # Scaling and adding round twice each, scalars included.
        return 4 * torch.finfo(point.dtype).eps

    def distance(self, point: Tensor) -> float:
        """The Euclidean distance to `project(point)`: 0 inside."""
        if self.excess(point) <= 0:
            return 0.0
        exact = point.double()
        return float(torch.linalg.vector_norm(exact - self.project(exact)))

    def contains(self, point: Tensor, tolerance: float = 1e-6) -> bool:
        """Whether a point lies inside.

        Args:
            tolerance: excess that still counts as inside, relative to the set's size.
        """
        return self.excess(point) <= tolerance

    @classmethod
    @abstractmethod
    def examples(cls) -> list[Self]:
        """Instances for tests: small and large, and other settings where there are any."""


@dataclass(frozen=True)
class Ball(ConstraintSet):
    """All points whose norm is at most the radius.

    Args:
        radius: positive.
    """

    radius: float

    def __post_init__(self) -> None:
        if not 0 < self.radius < float("inf"):
            raise ValueError(
                f"{type(self).__name__}(radius=...) must be positive, got {self.radius!r}."
            )

    @abstractmethod
    def norm(self, point: Tensor) -> float:
        """The norm, of `radius` on the boundary, in double precision."""

    def excess(self, point: Tensor) -> float:
        return self.norm(point) / self.radius - 1

    def settle(self, point: Tensor) -> float:
        excess, rounding = self.excess(point), self.rounding(point)
        if excess > -rounding:
            # Further than need be: a norm may take an SVD, and is not needed again for some steps.
            point.mul_((1 - 8 * rounding) / (1 + excess))
            excess = -7 * rounding
        return excess

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(1.0), cls(30.0)]
