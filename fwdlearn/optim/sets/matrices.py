"""Balls of matrix norms: nuclear (low rank) and spectral (bounded gain).

Papers: M. Jaggi and M. Sulovsky, "A simple algorithm for nuclear norm regularized problems" (ICML
2010); M. Jaggi, "Revisiting Frank-Wolfe" (ICML 2013); G. Golub and W. Kahan, "Calculating the
singular values and pseudo-inverse of a matrix" (SIAM J. Numer. Anal. 2, 1965).

A tensor counts as the matrix [m, n] of its first dimension and all others; a vector as a column,
whose one singular value is its Euclidean norm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fwdlearn.keys import Key
from fwdlearn.optim.sets.base import Ball
from fwdlearn.optim.sets.simplex import project_simplex
from fwdlearn.optim.sets.vertex import Dense, Outer, Vertex


def as_matrix(point: Tensor) -> Tensor:
    """[m, n]: the first dimension against all others."""
    return point.reshape(len(point) if point.dim() else 1, -1)


def _rank(shape: torch.Size) -> int:
    rows = shape[0] if shape else 1
    return min(rows, shape.numel() // rows)


@dataclass(frozen=True)
class _Singular(Ball):
    """A ball of a norm of the singular values."""

    def rounding(self, point: Tensor) -> float:
        # Errors of the entries are bounded in the Frobenius norm; this is its price in the others.
        return super().rounding(point) * math.sqrt(_rank(point.shape))

    def _singular_values(self, point: Tensor) -> Tensor:
        return torch.linalg.svdvals(as_matrix(point).double())


@dataclass(frozen=True)
class NuclearBall(_Singular):
    """Matrices whose singular values sum to at most the radius: low rank.

        {X : sum_i sigma_i(X) <= radius}        LMO(D) = -radius u v^T

    with u, v the singular vectors of D of its largest singular value. Diameter 2 radius. An update
    has rank one: after k steps from zero the rank is at most k.

    u and v come from Golub and Kahan's bidiagonalisation, a power iteration that keeps what it has
    seen. It starts from the same vector always, so that the oracle is a function of D. It is exact
    when `iterations` reaches min(m, n); else <LMO(D), D> is a little above its least value: by less
    than 1e-5 of it for pure noise of 1000 x 1000, and less where one direction stands out.

    Args:
        radius: positive.
        iterations: products with D and D^T, at least 1.
    """

    iterations: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.iterations, bool) or self.iterations < 1:
            raise ValueError(
                f"NuclearBall(iterations=...) must be at least 1, got {self.iterations!r}."
            )

    def norm(self, point: Tensor) -> float:
        return float(self._singular_values(point).sum())

    def vertex(self, direction: Tensor) -> Vertex:
        left, right = leading_pair(as_matrix(direction), self.iterations)
        return Outer(-self.radius * left, right)

    def diameter(self, shape: torch.Size) -> float:
        return 2 * self.radius

    def project(self, point: Tensor) -> Tensor:
        if self.excess(point) <= 0:
            return point.clone()
        left, values, right = torch.linalg.svd(as_matrix(point), full_matrices=False)
        values = project_simplex(values, self.radius)
        return ((left * values) @ right).view(point.shape)


@dataclass(frozen=True)
class SpectralBall(_Singular):
    """Matrices whose largest singular value is at most the radius: bounded gain.

        {X : sigma_1(X) <= radius}        LMO(D) = -radius U V^T,  D = U S V^T

    Diameter 2 radius sqrt(min(m, n)). The direction is the orthogonalised momentum of Muon. One
    full SVD a step, and temporaries of the size of the point.

    Args:
        radius: positive.
    """

    def norm(self, point: Tensor) -> float:
        return float(self._singular_values(point).max())

    def vertex(self, direction: Tensor) -> Vertex:
        left, _, right = torch.linalg.svd(as_matrix(direction), full_matrices=False)
        return Dense((left @ right).mul_(-self.radius).view(direction.shape))

    def diameter(self, shape: torch.Size) -> float:
        return 2 * self.radius * math.sqrt(_rank(shape))

    def project(self, point: Tensor) -> Tensor:
        if self.excess(point) <= 0:
            return point.clone()
        left, values, right = torch.linalg.svd(as_matrix(point), full_matrices=False)
        return ((left * values.clamp_(max=self.radius)) @ right).view(point.shape)

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(1.0), cls(30.0)]


def leading_pair(matrix: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Singular vectors u [m], v [n] of the largest singular value of a matrix [m, n].

    Args:
        matrix: floating point.
        iterations: dimension of the Krylov space that the shorter of the two is sought in.
    """
    rows, columns = matrix.shape
    if rows < columns:
        right, left = leading_pair(matrix.T, iterations)
        return left, right
    basis = matrix.new_zeros(min(iterations, columns), columns)
    images = matrix.new_zeros(len(basis), rows)
    # Entries of about 1, or squares would under- or overflow.
    low, high = torch.aminmax(matrix)
    scale = 1 / torch.maximum(-low, high).clamp(min=torch.finfo(matrix.dtype).tiny)
    following = _start(columns).to(matrix)
    for count in range(len(basis)):
        size = torch.linalg.vector_norm(following)
        for _ in range(2):  # twice, because once leaves what rounding let through
            following = following - basis[:count].T @ (basis[:count] @ following)
        rest = torch.linalg.vector_norm(following)
        if rest <= 8 * torch.finfo(matrix.dtype).eps * size:
            break  # rounding alone is left: the space is exhausted
        basis[count] = following / rest
        images[count] = matrix @ (scale * basis[count])
        following = matrix.T @ (scale * images[count])
    mixture, _, vectors = torch.linalg.svd(images, full_matrices=False)
    return vectors[0], normalize(mixture[:, 0] @ basis, dim=0)


@lru_cache(maxsize=64)
def _start(size: int) -> Tensor:
    """float64 [size]: fixed numbers that no structure of a matrix is orthogonal to."""
    return normalize(Key.root(0).uniform(size, "singular vectors") - 0.5, dim=0)
