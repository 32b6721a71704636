"""Directions that are given whole, such as guesses at a gradient, beside those drawn at random."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor

from fwdlearn.directions import Directions, independent
from fwdlearn.errors import UsageError
from fwdlearn.factors import Factors, LowRank, Site
from fwdlearn.keys import Key


class GivenDirections(Directions):
    """A family whose directions are dense tensors of the caller's.

    Every oracle takes it where it takes random directions, in a block of its own: a block is of one
    family.

    Args:
        params: name -> tensor; only shapes, dtypes and devices are read.
        values: name -> [count, *shape], of any size; they are taken to the parameter's dtype, so
            that what is measured is what is applied. Zero in parameters that are not named.

    Raises:
        UsageError: nothing is named, a name is none of the parameters, or a shape does not fit.

    Example:
        >>> params = {"w": torch.zeros(2, 2), "b": torch.zeros(2)}
        >>> GivenDirections(params, {"b": torch.ones(1, 2)}).dense("w", torch.tensor([0])).shape
        torch.Size([1, 2, 2])
    """

    values: Mapping[str, Tensor]

    def __init__(self, params: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
        if not values:
            raise UsageError("GivenDirections(values=...) must name a parameter at least.")
        count = len(next(iter(values.values())))
        for name, value in values.items():
            if name not in params:
                raise UsageError(
                    f"GivenDirections(values=...) names {name!r}, which is no trainable parameter; "
                    f"the first of them are {', '.join(list(params)[:3])}."
                )
            shape = (count, *params[name].shape)
            if value.shape != shape:
                raise UsageError(
                    f"GivenDirections(values=...) must have shape {shape} for {name!r}, one "
                    f"direction after the other, got {tuple(value.shape)}."
                )
        super().__init__(Key(0, 0), params, count, law="given", rank=None)
        filled = {
            name: values[name].to(like)
            if name in values
            else like.new_zeros(()).expand(count, *like.shape)
            for name, like in params.items()
        }
        # The class is frozen.
        object.__setattr__(self, "values", filled)

    def __post_init__(self) -> None:
        """No law to check."""

    @cached_property
    def sites(self) -> Mapping[str, Site]:
        return independent(self.params)

    @property
    def entries(self) -> Mapping[str, Tensor]:
        """None: they are what they are everywhere."""
        return {}

    @cached_property
    def bytes_per_direction(self) -> int:
        return sum(value.numel() * value.element_size() for value in self.params.values())

    @property
    def expanded(self) -> None:
        return None

    def at(self, ids: Tensor | slice, together: bool = True) -> GivenFactors:
        """Some of the directions; they need not be expanded, together or not."""
        return GivenFactors(self, {name: value[ids] for name, value in self.values.items()})

    def factors(self, name: str, ids: Tensor | slice) -> Tensor:
        """[len(ids), *shape]."""
        return self.values[name][ids]

    def square_norms(self, ids: Tensor) -> Tensor:
        """float64 [len(ids)]: |E|^2 over all parameters."""
        total = torch.zeros(self.count, dtype=torch.float64, device=self.device)
        for value in self.values.values():
            total += value.double().reshape(self.count, -1).square().sum(1)
        return total[ids]


class GivenFactors(Factors):
    """Some directions of a given family, parameter by parameter."""

    def __init__(self, family: GivenDirections, values: Mapping[str, Tensor]) -> None:
        super().__init__(family, slice(0, 0))
        self._values = values

    def __getitem__(self, name: str) -> Tensor:
        """[count, *shape]."""
        return self._values[name]

    def picked(self, name: str, entries: Tensor) -> LowRank:
        raise TypeError("directions that are given have no factors to pick from")

    def numbers(self) -> tuple[dict[torch.dtype, Tensor], dict[str, Tensor]]:
        """The directions themselves."""
        return {}, dict(self._values)

    def given(self, buffers: Mapping[torch.dtype, Tensor], raws: Mapping[str, Tensor]) -> Factors:
        """The same with directions from elsewhere, in the form that `numbers` gives."""
        assert isinstance(self.family, GivenDirections)
        return GivenFactors(self.family, raws)
