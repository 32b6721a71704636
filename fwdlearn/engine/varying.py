"""Parameters as the folded pass sees them: one plain tensor, and what each row adds to it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fwdlearn.directions import LowRank
from fwdlearn.engine.queries import Queries


@dataclass(frozen=True)
class Varying:
    """A tensor without rows whose perturbation differs from row to row.

    Either `thin` is there and row r sees `plain + scale[r] * left[r] @ right[r].T` (as a matrix,
    `transposed` where the tensor is), or `delta` is, and row r sees `plain + delta[r]`.

    Args:
        plain: the unperturbed tensor.
        scale: float [rows].
        thin: factors, left [rows, m, rank] and right [rows, n, rank].
        delta: `wide` [rows, *plain.shape].
    """

    plain: Tensor
    scale: Tensor
    thin: LowRank | None = None
    delta: Tensor | None = None

    @property
    def rows(self) -> int:
        return len(self.scale)

    def transposed(self, plain: Tensor) -> Varying:
        """The transpose of a matrix; `plain` is its plain tensor, already transposed."""
        if self.thin is None:
            return Varying(plain, self.scale, delta=self.dense().transpose(1, 2))
        swapped = LowRank(self.thin.right, self.thin.left, self.thin.scale)
        return Varying(plain, self.scale, swapped)

    @property
    def wide(self) -> torch.dtype:
        """float32, or float64 for float64: sums in a narrower dtype would swallow the change."""
        return torch.promote_types(self.plain.dtype, torch.float32)

    def dense(self) -> Tensor:
        """`wide` [rows, *plain.shape]: what each row adds."""
        if self.delta is not None:
            return self.delta
        assert self.thin is not None
        scale = (self.scale * self.thin.scale).to(self.wide)[:, None, None]
        left, right = self.thin.left.to(self.wide), self.thin.right.to(self.wide)
        return (left * scale @ right.transpose(1, 2)).reshape(self.rows, *self.plain.shape)

    def batched(self) -> Tensor:
        """`wide` [rows, *plain.shape]: what each row sees."""
        return self.plain.to(self.wide) + self.dense()

    def narrowed(self, row: int) -> Tensor:
        """What one row sees, in the dtype of the plain tensor."""
        one = slice(row, row + 1)
        if self.delta is not None:
            value = self.plain.to(self.wide) + self.delta[row]
        else:
            assert self.thin is not None
            thin = LowRank(self.thin.left[one], self.thin.right[one], self.thin.scale)
            value = Varying(self.plain, self.scale[one], thin).batched()[0]
        return value.to(self.plain.dtype)

    def add_product(self, out: Tensor, x: Tensor) -> None:
        """Adds to `out` [rows, k, m] x [rows, k, n] times what each row adds, transposed."""
        if self.delta is not None:
            out += x @ self.delta.to(x.dtype).transpose(1, 2)
            return
        assert self.thin is not None
        left, right = self.thin.left.transpose(1, 2), self.thin.right.transpose(1, 2)
        scale = (self.scale * self.thin.scale).to(x.dtype)[:, None, None]
        if left.shape[1] == 1:
            # Matrix products of one column are far from the speed of memory; these two are at it.
            out.addcmul_(torch.linalg.vecdot(x, right).unsqueeze(2) * scale, left)
        else:
            out += (x @ right.transpose(1, 2) * scale) @ left


def perturbed(name: str, plain: Tensor, queries: Queries) -> Varying:
    """The parameter `name` as each query sees it."""
    factors = queries.directions.factors(name, queries.direction)
    if isinstance(factors, LowRank):
        return Varying(plain, queries.scale, factors)
    wide = torch.promote_types(plain.dtype, torch.float32)
    scale = queries.scale.to(wide).reshape(-1, *[1] * plain.dim())
    return Varying(plain, queries.scale, delta=factors * scale)
