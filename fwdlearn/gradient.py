"""What an estimate carries: a gradient that is built one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fwdlearn.directions import Directions


class DirectionGradient(Mapping[str, Tensor]):
    """The sum of coefficient times direction, formed when a name is asked for.

    A direction of size s in a parameter counts 1 / s^2 there: the coefficients are slopes along
    the whole direction, and the result is a gradient whatever the sizes.

    A low-rank family costs one matrix product per tensor, with inner dimension
    directions x rank. Sums run in float32 (float64 for float64 parameters).

    Args:
        directions: the family.
        coefficients: [directions.count], one scalar a direction.
    """

    def __init__(self, directions: Directions, coefficients: Tensor) -> None:
        if coefficients.shape != (directions.count,):
            raise ValueError(
                f"DirectionGradient needs one coefficient for each of {directions.count} "
                f"directions, got shape {tuple(coefficients.shape)}."
            )
        self.directions = directions
        self.coefficients = coefficients

    def __getitem__(self, name: str) -> Tensor:
        family = self.directions
        site = family.sites[name]
        dtype = torch.float64 if site.dtype == torch.float64 else torch.float32
        total: Tensor | None = None
        for chunk in family.chunks(name, family.count):
            factors = family.factors(name, chunk)
            coefficients = self.coefficients[chunk].to(family.device, dtype) / site.scale**2
            if isinstance(factors, Tensor):
                part = torch.tensordot(coefficients, factors.to(dtype), 1)
                total = part if total is None else total.add_(part)
                continue
            weighted = factors.left.to(dtype) * (coefficients * factors.scale)[:, None, None]
            # [m, directions * rank] and [directions * rank, n]; views where the rank is one.
            left = weighted.transpose(1, 2).flatten(0, 1).T
            right = factors.right.to(dtype).transpose(1, 2).flatten(0, 1)
            # In place, so that one dense gradient is alive and no second one beside it.
            total = left @ right if total is None else total.addmm_(left, right)
        if total is None:
            return torch.zeros(site.shape, dtype=dtype, device=family.device)
        return total.reshape(site.shape)

    def square_norms(self) -> Tensor:
        """float64 [directions]: |direction|^2 as it enters the gradient."""
        family = self.directions
        ids = torch.arange(family.count, device=family.device)
        inverse = {name: 1 / site.scale for name, site in family.sites.items()}
        return replace(family, scales=inverse).square_norms(ids)

    def __iter__(self) -> Iterator[str]:
        return iter(self.directions.sites)

    def __len__(self) -> int:
        return len(self.directions.sites)
