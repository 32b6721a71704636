"""Inner products of directions with each other, without writing low-rank ones out."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fwdlearn.directions import Directions

# Numbers of directions that are worked on at once, in bytes.
_BYTES = 64 * 2**20


def gram(family: Directions, ids: Tensor) -> Tensor:
    """All inner products among the directions of some sets.

    For k low-rank directions of an m x n matrix it takes about k^2 (m + n) operations, for dense
    ones k^2 m n.

    Args:
        ids: int64 [sets, k].

    Returns:
        float64 [sets, k, k].

    Example:
        >>> from fwdlearn.keys import Key
        >>> family = Directions(Key.root(0), {"w": torch.zeros(3, 2)}, count=2)
        >>> gram(family, torch.tensor([[0, 1]])).diagonal(dim1=1, dim2=2)
        tensor([[6., 6.]], dtype=torch.float64)
    """
    sets, k = ids.shape
    total = torch.zeros(sets, k, k, dtype=torch.float64, device=family.device)
    for name, site in family.sites.items():
        for chunk in _chunks(sets, 8 * k * site.numbers):
            some = ids[chunk]
            factors = family.factors(name, some.flatten())
            if isinstance(factors, Tensor):
                flat = factors.double().view(len(some), k, -1)
                total[chunk] += flat @ flat.mT
                continue
            inner = torch.ones((), dtype=torch.float64, device=family.device)
            for side in (factors.left, factors.right):
                # [sets, k * rank, m]
                flat = side.double().mT.reshape(len(some), k * site.rank, -1)
                inner = inner * (flat @ flat.mT)
            pairs = inner.view(len(some), k, site.rank, k, site.rank).sum((2, 4))
            total[chunk] += pairs * factors.scale**2
    return total


def along(family: Directions, one: Directions) -> Tensor:
    """float64 [family.count]: the inner product of each direction with the first of `one`.

    Takes a product with every matrix for each direction, in the precision of the parameters.
    """
    total = torch.zeros(family.count, dtype=torch.float64, device=family.device)
    first = torch.zeros(1, dtype=torch.int64, device=family.device)
    for name in family.sites:
        value = one.dense(name, first)
        # Sums of many terms: float32 at least.
        value = value if value.dtype == torch.float64 else value.float()
        for chunk in family.chunks(name, family.count):
            factors = family.factors(name, chunk)
            if isinstance(factors, Tensor):
                total[chunk] += factors.to(value).reshape(len(factors), -1) @ value.flatten()
                continue
            matrix = value.view(factors.left.shape[1], factors.right.shape[1])
            thin = factors.left.to(value).mT @ matrix
            total[chunk] += (thin * factors.right.to(value).mT).sum((1, 2)) * factors.scale
    return total


def _chunks(count: int, size: int) -> Iterator[slice]:
    """Slices of `count` things of `size` bytes each that fit in a fixed space."""
    step = max(1, _BYTES // max(1, size))
    for start in range(0, count, step):
        yield slice(start, start + step)
