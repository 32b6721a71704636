"""Random directions of which something is known: they lie in a basis, or have sizes of their own.

A direction of an m x n matrix with a basis V [n, k] is E = A V^T, for an m x k direction A of any
kind: the covariance is V V^T for every row of the matrix in place of the identity. A size
multiplies a direction in one parameter. Both count in the gradient as they do in the model, where
`scales` of `Directions` would be divided out: the mean of (g . E) E is g V V^T, times the size
squared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from fwdlearn.directions import Directions
from fwdlearn.factors import Factors, LowRank, Site, as_matrix


@dataclass(frozen=True)
class ShapedDirections(Directions):
    """A family of random directions, shaped by what is known of the parameters.

    Args:
        key, params, count, law: as for `Directions`; `scales` is not used.
        rank: of A, and of the directions of matrices that have no basis.
        bases: name of a matrix -> [n, k], columns that its rows move along. Only those that
            `matrices` names can have one.
        sizes: name -> factor on the direction there; 1 where a name is missing.

    Example:
        >>> from fwdlearn.keys import Key
        >>> params = {"w": torch.zeros(3, 4)}
        >>> basis = torch.eye(4)[:, :2]
        >>> family = ShapedDirections(Key.root(0), params, 1, bases={"w": basis})
        >>> family.dense("w", torch.tensor([0]))[0, :, 2:].any().item()
        False
    """

    bases: Mapping[str, Tensor] | None = None
    sizes: Mapping[str, float] | None = None

    @cached_property
    def drawn(self) -> Directions:
        """What chance decides: directions of the coordinates in each basis."""
        known, sides, params = self.bases or {}, matrices(self.params), {}
        for name, value in self.params.items():
            if name in known:
                value = value.new_zeros(()).expand(sides[name][0], known[name].shape[1])
            params[name] = value
        return Directions(self.key, params, self.count, self.law, self.rank)

    @cached_property
    def sites(self) -> Mapping[str, Site]:
        found = {}
        for name, site in self.drawn.sites.items():
            shape, rank = self.params[name].shape, site.rank
            if name in (self.bases or {}):
                rank = rank or site.shape[1]
            m, n = as_matrix(shape)
            numbers = rank * (m + n) if rank else m * n
            found[name] = replace(site, shape=shape, rank=rank, numbers=numbers)
        return found

    @cached_property
    def bytes_per_direction(self) -> int:
        return self.drawn.bytes_per_direction

    @property
    def signs(self) -> bool:
        return False

    @property
    def expanded(self) -> None:
        return None

    def at(self, ids: Tensor | slice, together: bool = True) -> ShapedFactors:
        return ShapedFactors(self, self.drawn.at(ids, together), self.bases or {})

    def square_norms(self, ids: Tensor) -> Tensor:
        """float64 [len(ids)]: |E|^2 over all parameters."""
        total = torch.zeros(len(ids), dtype=torch.float64, device=self.device)
        for name in self.sites:
            for chunk in self.chunks(name, len(ids)):
                factors = self.factors(name, ids[chunk])
                if isinstance(factors, Tensor):
                    total[chunk] += factors.double().reshape(len(factors), -1).square().sum(1)
                else:
                    total[chunk] += factors.square_norm()
        return total


class ShapedFactors(Factors):
    """Some directions of a shaped family, parameter by parameter."""

    def __init__(
        self, family: ShapedDirections, drawn: Factors, bases: Mapping[str, Tensor]
    ) -> None:
        super().__init__(family, drawn.ids, drawn.together)
        self.drawn, self.bases, self.sizes = drawn, bases, family.sizes or {}

    def __getitem__(self, name: str) -> LowRank | Tensor:
        """`LowRank`, or [count, *shape] where the directions are dense."""
        return self._shaped(name, self.drawn[name])

    def picked(self, name: str, entries: Tensor) -> LowRank:
        """See `Factors.picked`."""
        if self.drawn.family.sites[name].rank:
            found = self._shaped(name, self.drawn.picked(name, entries))
        else:
            whole = self.drawn[name]
            assert isinstance(whole, Tensor)
            number = torch.arange(len(entries), device=entries.device)[:, None]
            found = self._shaped(name, whole[number, entries])
        assert isinstance(found, LowRank)
        return found

    def numbers(self) -> tuple[dict[torch.dtype, Tensor], dict[str, Tensor]]:
        """Those of chance, and the bases, which change from step to step."""
        buffers, raws = self.drawn.numbers()
        return buffers, {**raws, **{f"{name} basis": value for name, value in self.bases.items()}}

    def given(self, buffers: Mapping[torch.dtype, Tensor], raws: Mapping[str, Tensor]) -> Factors:
        """The same with numbers and bases from elsewhere, in the form that `numbers` gives."""
        assert isinstance(self.family, ShapedDirections)
        bases = {name: raws[f"{name} basis"] for name in self.bases}
        drawn = {name: value for name, value in raws.items() if not name.endswith(" basis")}
        return ShapedFactors(self.family, self.drawn.given(buffers, drawn), bases)

    def _shaped(self, name: str, drawn: LowRank | Tensor) -> LowRank | Tensor:
        size = self.sizes.get(name, 1.0)
        # Whatever asks, an optimizer may work on it in place.
        with torch.inference_mode(False):
            if name not in self.bases:
                if isinstance(drawn, LowRank):
                    return replace(drawn, right=drawn.right * size)
                return drawn * size
            # Sizes go into a factor: the scale is that of the rank, as in every family.
            if isinstance(drawn, Tensor):
                rank = drawn.shape[2]
                right = (self.bases[name] * (size * rank**0.5)).to(drawn.dtype)
                return LowRank(drawn, right.expand(len(drawn), *right.shape), rank**-0.5)
            wide = torch.promote_types(drawn.right.dtype, torch.float32)
            right = (self.bases[name].to(wide) * size) @ drawn.right.to(wide)
            return replace(drawn, right=right.to(drawn.right.dtype))


def matrices(params: Mapping[str, Tensor], least: int = 2) -> dict[str, tuple[int, int]]:
    """Name -> (m, n) of the parameters that can have a basis, trailing dimensions flattened.

    Args:
        least: that both sides have, 2 or more.
    """
    sides = {name: as_matrix(value.shape) for name, value in params.items()}
    return {name: (m, n) for name, (m, n) in sides.items() if min(m, n) >= least}
