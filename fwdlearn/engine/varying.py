"""Parameters as the folded pass sees them: one plain tensor, and what each point adds to it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fwdlearn.factors import LowRank

# Numbers of a point from which a product with one column is faster alone than among others.
_ALONE = 2**16


@dataclass(frozen=True)
class Varying:
    """A tensor without rows whose perturbation differs from point to point.

    Either `thin` is there and point p sees `plain + scale[p] * left[p] @ right[p].T` (as a matrix,
    `transposed` where the tensor is), or `delta` is, and point p sees `plain + delta[p]`.
    A point is that of `group` consecutive rows.

    Args:
        plain: the unperturbed tensor.
        scale: float [points].
        thin: factors, left [points, m, rank] and right [points, n, rank].
        delta: `wide` [points, *plain.shape].
        group: rows of a point.
    """

    plain: Tensor
    scale: Tensor
    thin: LowRank | None = None
    delta: Tensor | None = None
    group: int = 1

    @property
    def points(self) -> int:
        return len(self.scale)

    def by_row(self) -> Varying:
        """The same with a point of its own for each row."""
        if self.group == 1:
            return self
        rows = self.points * self.group

        def each(value: Tensor) -> Tensor:
            if self.points == 1:
                return value.expand(rows, *value.shape[1:])
            return value.repeat_interleave(self.group, 0)

        thin, delta = self.thin, self.delta
        if thin is not None:
            thin = LowRank(each(thin.left), each(thin.right), thin.scale)
        if delta is not None:
            delta = each(delta)
        return Varying(self.plain, each(self.scale), thin, delta)

    def transposed(self, plain: Tensor) -> Varying:
        """The transpose of a matrix; `plain` is its plain tensor, already transposed."""
        if self.thin is None:
            return replace(self, plain=plain, delta=self.dense().transpose(1, 2))
        swapped = LowRank(self.thin.right, self.thin.left, self.thin.scale)
        return replace(self, plain=plain, thin=swapped)

    def to(self, dtype: torch.dtype) -> Varying:
        """The same with the factors in `dtype`."""
        thin = self.thin
        if thin is None or thin.left.dtype == dtype:
            return self
        return replace(self, thin=LowRank(thin.left.to(dtype), thin.right.to(dtype), thin.scale))

    @property
    def wide(self) -> torch.dtype:
        """float32, or float64 for float64: sums in a narrower dtype would swallow the change."""
        return torch.promote_types(self.plain.dtype, torch.float32)

    def dense(self) -> Tensor:
        """`wide` [points, *plain.shape]: what each point adds."""
        if self.delta is not None:
            return self.delta
        assert self.thin is not None
        scale = (self.scale * self.thin.scale).to(self.wide)[:, None, None]
        left, right = self.thin.left.to(self.wide), self.thin.right.to(self.wide)
        return (left * scale @ right.transpose(1, 2)).reshape(self.points, *self.plain.shape)

    def batched(self) -> Tensor:
        """`wide` [points, *plain.shape]: what each point sees."""
        return self.plain.to(self.wide) + self.dense()

    def narrowed(self, point: int) -> Tensor:
        """What one point sees, in the dtype of the plain tensor."""
        wide = self.plain.to(self.wide)
        if self.delta is not None:
            return (wide + self.delta[point]).to(self.plain.dtype)
        assert self.thin is not None
        left, right = self.thin.left[point].to(self.wide), self.thin.right[point].to(self.wide)
        left = left * (self.scale[point] * self.thin.scale).to(self.wide)
        flat = wide.view(len(left), len(right)) if wide.dim() != 2 else wide
        if left.shape[1] == 1:
            changed = torch.addcmul(flat, left, right.T)
        else:
            changed = torch.addmm(flat, left, right.T)
        return changed.view(self.plain.shape).to(self.plain.dtype)

    def inner(self, x: Tensor) -> Tensor:
        """`x` [points, k, n] times the right factors and the scale: [points, k, rank]."""
        assert self.thin is not None
        right, (points, k, n) = self.thin.right, x.shape
        wide = x.dtype in (torch.float32, torch.float64)
        if wide and x.device.type == "cpu" and right.shape[-1] == 1 and k * n >= _ALONE:
            inner = x.new_empty(points, k)
            for point in range(points):
                torch.mv(x[point], right[point, :, 0], out=inner[point])
            return inner.mul_(self._factor(x.dtype)[:, None]).unsqueeze(2)
        if not wide:
            # Measured in bfloat16: the usual way round wins, one point at a time loses by ten.
            return torch.bmm(x, right).mul_(self._factor(x.dtype)[:, None, None])
        # This way round a single column is as fast as memory; the other is a tenth of that.
        inner = torch.bmm(right.transpose(1, 2), x.transpose(1, 2))
        return inner.mul_(self._factor(x.dtype)[:, None, None]).transpose(1, 2)

    def _factor(self, dtype: torch.dtype) -> Tensor:
        assert self.thin is not None
        return (self.scale if self.thin.scale == 1 else self.scale * self.thin.scale).to(dtype)

    def product(self, x: Tensor, base: Tensor | None, out: Tensor) -> None:
        """Writes `base` plus `x` times the transpose of what each point adds.

        Args:
            x: [points, k, n].
            base: broadcasts against `out`, or None for zero; may be wider than `out`.
            out: [points, k, m].
        """
        if self.delta is not None:
            inner, left = x, self.delta.to(x.dtype).transpose(1, 2)
        else:
            assert self.thin is not None
            inner, left = self.inner(x), self.thin.left.transpose(1, 2)
        if base is None and left.shape[1] == 1:
            torch.mul(inner, left, out=out)
        elif base is not None and out.dtype not in (torch.float32, torch.float64):
            _product_on(base, inner, left, out)
        elif base is not None and left.shape[1] == 1:
            torch.addcmul(base, inner, left, out=out)
        else:
            torch.bmm(inner, left, out=out)
            if base is not None:
                out += base

    def copied(self, point: int, matrix: Tensor) -> Tensor:
        """[n, m]: `matrix`, the transpose of the plain tensor, as one point sees it."""
        assert self.thin is not None
        right = self.thin.right[point] * self._factor(matrix.dtype)[point]
        left = self.thin.left[point].T
        if left.shape[0] == 1:
            return torch.addcmul(matrix, right, left)
        return torch.addmm(matrix, right, left)

    def add_product(self, out: Tensor, x: Tensor) -> None:
        """Adds to `out` [points, k, m] what `product` gives."""
        if self.thin is not None and self.thin.left.shape[2] == 1:
            out.addcmul_(self.inner(x), self.thin.left.transpose(1, 2))
        elif self.thin is not None:
            out += self.inner(x) @ self.thin.left.transpose(1, 2)
        else:
            assert self.delta is not None
            out += x @ self.delta.to(x.dtype).transpose(1, 2)


def _product_on(base: Tensor, inner: Tensor, left: Tensor, out: Tensor) -> None:
    """Writes `base + inner @ left`, summed wide and rounded once.

    What makes up the base becomes more rows of `left`: two where it is wider than `out`, the
    second with what rounding takes from the first.
    """
    high = base.to(out.dtype)
    pieces = [high] if base.dtype == out.dtype else [high, (base - high).to(out.dtype)]
    rows = [piece.expand(len(left), 1, -1) for piece in pieces]
    ones = inner.new_ones(()).expand(*inner.shape[:2], len(rows))
    torch.bmm(torch.cat((inner, ones), 2), torch.cat((left, *rows), 1), out=out)
