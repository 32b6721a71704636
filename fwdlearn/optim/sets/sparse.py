"""The K-sparse polytope: the convex hull of vectors with K equal entries.

Paper: S. Pokutta, C. Spiegel and M. Zimmer, "Deep neural network training with Frank-Wolfe" (arXiv
2010.07243), which uses it for the layers of networks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from fwdlearn.optim.sets.base import Ball
from fwdlearn.optim.sets.vertex import Entries, Vertex


@dataclass(frozen=True)
class KSparsePolytope(Ball):
    """The convex hull of the vectors with `nonzeros` entries of +radius or -radius.

        {x : |x|_1 <= K radius, max |x_i| <= radius}        LMO(d)_i = -radius sign(d_i)

    for the K entries of largest |d_i|, and 0 for the others. Diameter 2 radius sqrt(K). An update
    changes K entries, beside the scaling. Between `L1Ball` (K = 1) and `LInfBall` (K = n).

    Args:
        radius: positive, of a single entry.
        nonzeros: K, at least 1; all entries where there are fewer.
    """

    nonzeros: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.nonzeros, bool) or self.nonzeros < 1:
            raise ValueError(
                f"KSparsePolytope(nonzeros=...) must be at least 1, got {self.nonzeros!r}."
            )

    def norm(self, point: Tensor) -> float:
        largest = float(torch.linalg.vector_norm(point, math.inf))
        total = float(torch.linalg.vector_norm(point, 1, dtype=torch.float64))
        return max(largest, total / self.nonzeros)

    def vertex(self, direction: Tensor) -> Vertex:
        flat = direction.reshape(-1)
        count = min(self.nonzeros, len(flat))
        # The largest of |d| are among the largest and the least of d, with no |d| written out.
        ends = [flat.topk(count, largest=end).indices for end in (True, False)]
        index = torch.cat(ends).unique()
        index = index[flat[index].abs().topk(count).indices]
        return Entries(index, -self.radius * flat[index].sign())

    def diameter(self, shape: torch.Size) -> float:
        return 2 * self.radius * math.sqrt(min(self.nonzeros, shape.numel()))

    def project(self, point: Tensor) -> Tensor:
        # max(|x| - shift, 0) cut at the radius; its sum falls as the shift grows.
        sizes, total = point.abs(), self.radius * self.nonzeros

        def cut(shift: float) -> Tensor:
            return (sizes - shift).clamp_(0, self.radius)

        low, high = 0.0, float(sizes.max())
        if float(cut(0.0).sum(dtype=torch.float64)) <= total:
            high = 0.0
        while low < (middle := (low + high) / 2) < high:
            above = float(cut(middle).sum(dtype=torch.float64)) > total
            low, high = (middle, high) if above else (low, middle)
        return cut(high) * point.sign()

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(1.0, 3), cls(0.5, 10**6)]
