"""The derivative of losses by what a model puts out: what the last layer has in place of noise."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from fwdlearn.engine.trace import Rows

# Numbers of tangents that are pushed together: what caches hold.
_AT_ONCE = 2**18


def by_output(losses: Callable[[Tensor], Tensor], output: Tensor, rows: int, where: Rows) -> Tensor:
    """[rows, ...]: derivatives of the losses of rows by their own outputs.

    Args:
        losses: output -> [rows], each of its own row's output.
        output: of all rows; its derivatives are found by forward mode, one for each number of a
            row, many of them in one call.
        rows: how many there are.
        where: they are in it.
    """
    value = output.clone()
    shape = where.first(value, rows).shape

    def along(tangent: Tensor) -> Tensor:
        return torch.func.jvp(losses, (value,), (tangent,))[1]

    slopes = []
    places: list[tuple[int, ...]] = list(product(*map(range, shape[1:])))
    size = max(1, _AT_ONCE // value.numel())
    for begin in range(0, len(places), size):
        some = places[begin : begin + size]
        tangents = value.new_zeros(len(some), *value.shape)
        for tangent, place in zip(tangents, some, strict=True):
            number: tuple[slice | int, ...] = (slice(None), *place)
            where.first(tangent, rows)[number] = 1
        slopes.append(_pushed(along, tangents))
    return torch.cat(slopes).T.reshape(shape)


def _pushed(along: Callable[[Tensor], Tensor], tangents: Tensor) -> Tensor:
    if len(tangents) > 1:
        try:
            return torch.func.vmap(along)(tangents)
        except (RuntimeError, NotImplementedError):
            # Anyone's objective: it may look at numbers, which are many at once here.
            pass
    return torch.stack([along(tangent) for tangent in tangents])
