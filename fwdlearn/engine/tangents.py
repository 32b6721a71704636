"""Tangents of parameters: what each direction adds to them, the same for all rows or not."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fwdlearn.engine.trace import Rows, TraceError
from fwdlearn.factors import LowRank


@dataclass(frozen=True)
class Leaf:
    """How a parameter, or something made of parameters alone, moves along each direction.

    Either `thin` or `full` is there. Their first axis runs over the directions and, where `rows`
    is given, over the rows within each direction.

    Args:
        shape: of the tensor.
        count: directions.
        rows: how many rows have directions of their own; None where all rows share them.
        thin: factors, left [count * rows, m, rank] and right [count * rows, n, rank].
        full: [count * rows, *shape].
    """

    shape: torch.Size
    count: int
    rows: int | None
    thin: LowRank | None = None
    full: Tensor | None = None

    def dense(self) -> Tensor:
        """[count * rows, *shape]."""
        if self.full is not None:
            return self.full
        assert self.thin is not None
        return self.thin.dense().reshape(-1, *self.shape)

    def entries(self) -> Tensor:
        """[count, rows, *shape], with one row where all rows share."""
        return self.dense().view(self.count, self.rows or 1, *self.shape)

    def left(self, dtype: torch.dtype) -> Tensor:
        """[count, rows, m, rank], scaled; with one row where all rows share."""
        assert self.thin is not None
        left = self.thin.left.to(dtype)
        if self.thin.scale != 1:
            left = left * self.thin.scale
        return left.reshape(self.count, self.rows or 1, *left.shape[1:])

    def right(self, dtype: torch.dtype) -> Tensor:
        """[count, rows, n, rank], with one row where all rows share."""
        assert self.thin is not None
        right = self.thin.right.to(dtype)
        return right.reshape(self.count, self.rows or 1, *right.shape[1:])

    def transposed(self) -> Leaf:
        """Of the transposed matrix."""
        shape = torch.Size(reversed(self.shape))
        if self.thin is None:
            return replace(self, shape=shape, full=self.dense().transpose(1, 2))
        thin = LowRank(self.thin.right, self.thin.left, self.thin.scale)
        return replace(self, shape=shape, thin=thin)

    def along(self, dim: int, rows: Rows | None, tail: int = 0) -> Tensor:
        """[count, ...] that broadcasts against a tensor of `dim` axes once its rows are `spread`.

        Args:
            rows: where they lie in that tensor.
            tail: axes that follow those of the parameter.
        """
        ones = [1] * (dim - len(self.shape) - tail)
        value = self.entries().reshape(self.count, self.rows or 1, *ones, *self.shape, *[1] * tail)
        if self.rows is None or rows is None:
            return value.squeeze(1)
        if value.shape[2 + rows.axis] != 1:
            raise TraceError(
                f"a parameter of shape {tuple(self.shape)} varies along the rows of the batch"
            )
        if rows.flat:
            return value.movedim(1, 1 + rows.axis + int(rows.minor))
        return value.squeeze(2 + rows.axis).movedim(1, 1 + rows.axis)


def spread(value: Tensor, rows: Rows, count: int, lead: int = 0) -> Tensor:
    """A view in which the `count` rows have an axis of their own, where they lie.

    Args:
        lead: axes in front of those that `rows` counts.
    """
    if not rows.flat:
        return value
    axis = rows.axis + lead
    entries = value.shape[axis] // count
    return value.unflatten(axis, (entries, count) if rows.minor else (count, entries))


def first(value: Tensor, rows: Rows, count: int, lead: int = 0) -> Tensor:
    """A view with the rows as dimension `lead`."""
    shifted = replace(rows, axis=rows.axis + lead)
    return shifted.first(value, count).movedim(0, lead)


def last(value: Tensor, rows: Rows, lead: int = 0) -> Tensor:
    """Undoes `first`."""
    return replace(rows, axis=rows.axis + lead).last(value.movedim(lead, 0))


def aligned(tangent: Tensor, dim: int) -> Tensor:
    """[K, *shape] so that it broadcasts against tensors of `dim` axes."""
    missing = dim + 1 - tangent.dim()
    return tangent.reshape(len(tangent), *[1] * missing, *tangent.shape[1:]) if missing else tangent
