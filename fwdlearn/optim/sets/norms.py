"""Balls of the entrywise norms: l1, l2, l-infinity and all between.

Papers: M. Jaggi, "Revisiting Frank-Wolfe: projection-free sparse convex optimization" (ICML 2013),
the linear minimisation oracles as dual norms; J. Duchi et al., "Efficient projections onto the
l1-ball for learning in high dimensions" (ICML 2008).

A linear minimisation oracle gives s with <s, d> = -radius |d|_q, where 1/p + 1/q = 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from fwdlearn.optim.sets.base import Ball
from fwdlearn.optim.sets.simplex import project_simplex
from fwdlearn.optim.sets.vertex import Dense, Entries, Multiple, Vertex


@dataclass(frozen=True)
class _Entrywise(Ball):
    """A ball of a p-norm of the entries."""

    order: ClassVar[float]

    def norm(self, point: Tensor) -> float:
        return float(torch.linalg.vector_norm(point, self.order, dtype=torch.float64))


@dataclass(frozen=True)
class L1Ball(_Entrywise):
    """Entries whose absolute values sum to at most the radius: sparse weights.

        {x : |x|_1 <= radius}        LMO(d) = -radius sign(d_i) e_i,  i = argmax |d|

    Diameter 2 radius. An update changes one entry, beside the scaling: after k steps from zero at
    most k entries are not zero.

    Args:
        radius: positive.

    Example:
        >>> L1Ball(30.0).vertex(torch.tensor([1.0, -2.0])).dense(torch.zeros(2))
        tensor([ 0., 30.])
    """

    order = 1

    def vertex(self, direction: Tensor) -> Vertex:
        flat = direction.reshape(-1)
        # Two passes instead of one over |d|, which would be a temporary as large as d.
        most, least = flat.argmax(), flat.argmin()
        index = torch.where(flat[most] >= -flat[least], most, least).view(1)
        return Entries(index, -self.radius * flat[index].sign())

    def diameter(self, shape: torch.Size) -> float:
        return 2 * self.radius

    def project(self, point: Tensor) -> Tensor:
        if self.excess(point) <= 0:
            return point.clone()
        sizes = project_simplex(point.reshape(-1).abs(), self.radius)
        return sizes.view(point.shape) * point.sign()


@dataclass(frozen=True)
class L2Ball(_Entrywise):
    """Entries whose Euclidean norm is at most the radius.

        {x : |x|_2 <= radius}        LMO(d) = -radius d / |d|_2

    Diameter 2 radius. Normalised gradient descent with decay; no temporary.

    Args:
        radius: positive.
    """

    order = 2

    def vertex(self, direction: Tensor) -> Vertex:
        norm = self.norm(direction)
        return Multiple(direction, -self.radius / norm if norm else 0.0)

    def diameter(self, shape: torch.Size) -> float:
        return 2 * self.radius

    def project(self, point: Tensor) -> Tensor:
        return point / max(1.0, self.norm(point) / self.radius)


@dataclass(frozen=True)
class LInfBall(_Entrywise):
    """Entries of at most the radius in absolute value.

        {x : max |x_i| <= radius}        LMO(d) = -radius sign(d)

    Diameter 2 radius sqrt(n). Sign descent with decay.

    Args:
        radius: positive.
    """

    order = math.inf

    def vertex(self, direction: Tensor) -> Vertex:
        return Dense(direction.sign().mul_(-self.radius))

    def diameter(self, shape: torch.Size) -> float:
        return 2 * self.radius * math.sqrt(shape.numel())

    def project(self, point: Tensor) -> Tensor:
        return point.clamp(-self.radius, self.radius)


@dataclass(frozen=True)
class LpBall(Ball):
    """Entries whose p-norm is at most the radius, for p > 1.

        {x : |x|_p <= radius}        LMO(d)_i = -radius sign(d_i) |d_i|^(q-1) / |d|_q^(q-1)

    with 1/p + 1/q = 1. Diameter 2 radius n^(1/2 - 1/p) for p >= 2, else 2 radius.

    `project` scales towards zero, which for p other than 2 is not the nearest point, so that
    `distance` is an upper bound of the distance.

    Args:
        radius: positive.
        p: more than 1 and finite; `L1Ball` and `LInfBall` are the limits.
    """

    p: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 < self.p < math.inf:
            raise ValueError(
                f"LpBall(p=...) must be more than 1 and finite, got {self.p!r}; the limits are "
                "L1Ball and LInfBall."
            )

    def norm(self, point: Tensor) -> float:
        # Relative to the largest entry, so that no power overflows.
        largest = float(torch.linalg.vector_norm(point, math.inf))
        if not largest:
            return 0.0
        return largest * float(
            torch.linalg.vector_norm(point / largest, self.p, dtype=torch.float64)
        )

    def vertex(self, direction: Tensor) -> Vertex:
        largest = torch.linalg.vector_norm(direction, math.inf)
        if not largest:
            return Dense(torch.zeros_like(direction))
        sizes = (direction.abs() / largest).pow_(1 / (self.p - 1))
        return Dense(sizes.mul_(direction.sign()).mul_(-self.radius / self.norm(sizes)))

    def diameter(self, shape: torch.Size) -> float:
        return 2 * self.radius * shape.numel() ** max(0.0, 1 / 2 - 1 / self.p)

    def project(self, point: Tensor) -> Tensor:
        return point / max(1.0, self.norm(point) / self.radius)

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(1.0, 1.5), cls(3.0, 4.0)]
