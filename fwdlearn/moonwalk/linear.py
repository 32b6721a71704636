"""Linear layers on features: dense, orthogonal, and those that only move numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fwdlearn.errors import UsageError
from fwdlearn.moonwalk.layer import Gradients, Layer
from fwdlearn.moonwalk.rank import Fragment, erased, keep, undo


class Dense(Layer):
    """y = x W^T + b on the last dimension. A layer that does not widen leaves nothing.

    A layer that widens leaves outputs - inputs numbers a row. The inverse multiplies errors by
    the condition of W. A cutoff bounds it: directions in which W is weaker than that are kept as
    a fragment too, at the price of a singular value decomposition a sweep.

    Args:
        inputs: width of x.
        outputs: width of y.
        bias: whether there is a b.
        gain: singular values of the first weights, which are orthogonal.
        cutoff: in [0, 1); singular values below `cutoff` times the largest count as zero.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        bias: bool = True,
        gain: float = 1.0,
        cutoff: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0 <= cutoff < 1:
            raise UsageError(f"Dense(cutoff=...) must lie in [0, 1), got {cutoff!r}.")
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self.cutoff = cutoff
        nn.init.orthogonal_(self.weight, gain)

    @property
    def invertible(self) -> bool:  # type: ignore[override]
        return self.weight.shape[0] == self.weight.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def vjp(self, residual: None, h: Tensor) -> Tensor:
        return h @ self.weight.to(h.dtype)

    def fragment(self, residual: None, h: Tensor) -> Fragment | None:
        return keep(h, erased(self.weight.to(h.dtype), self.cutoff))

    def vijp(self, residual: None, h: Tensor, fragment: Fragment | None) -> Tensor:
        return undo(h, self.weight.to(h.dtype), fragment)

    def gradients(self, x: Tensor, h: Tensor) -> Gradients:
        return affine(x, h.to(x.dtype), self.bias is not None)

    def inverse(self, y: Tensor) -> Tensor:
        if not self.invertible:
            return super().inverse(y)
        if self.bias is not None:
            y = y - self.bias
        return torch.linalg.solve(self.weight.T, y, left=False)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, cutoff={self.cutoff}"


class Orthogonal(Layer):
    """y = x W^T + b with W orthogonal, the Cayley transform of a skew-symmetric matrix.

    W = (I + S)^-1 (I - S), S = P - P^T, P the parameter: every rotation without a half turn. The
    inverse is the transpose, so errors do not grow, however long it is trained.

    Args:
        size: width of x and y.
        bias: whether there is a b.
    """

    invertible = True

    def __init__(self, size: int, bias: bool = True) -> None:
        super().__init__()
        self.skew = nn.Parameter(torch.randn(size, size) / math.sqrt(size))
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """W [size, size]."""
        one, skew = self._parts(dtype)
        return torch.linalg.solve(one + skew, one - skew)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix(x.dtype), self.bias)

    def vjp(self, residual: None, h: Tensor) -> Tensor:
        return h @ self.matrix(h.dtype)

    def fragment(self, residual: None, h: Tensor) -> None:
        return None

    def vijp(self, residual: None, h: Tensor, fragment: None) -> Tensor:
        return h @ self.matrix(h.dtype).T

    def gradients(self, x: Tensor, h: Tensor) -> Gradients:
        return self._gradients(x, h.to(x.dtype), self.matrix(x.dtype))

    def advance(self, x: Tensor, h: Tensor, fragment: None) -> tuple[Tensor, Tensor, Gradients]:
        matrix = self.matrix(x.dtype)
        exact = matrix if h.dtype == x.dtype else self.matrix(h.dtype)
        h = h @ exact.T
        return F.linear(x, matrix, self.bias), h, self._gradients(x, h.to(x.dtype), matrix)

    def _gradients(self, x: Tensor, h: Tensor, matrix: Tensor) -> Gradients:
        # (I + S) W = I - S gives dW = -(I + S)^-1 dS (I + W).
        found = affine(x, h, self.bias is not None)
        one, skew = self._parts(x.dtype)
        pulled = torch.linalg.solve(one - skew, found.pop("weight") @ (one + matrix).T)
        return {"skew": pulled.T - pulled, **found}

    def inverse(self, y: Tensor) -> Tensor:
        return (y if self.bias is None else y - self.bias) @ self.matrix(y.dtype)

    def _parts(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        half = self.skew.to(dtype)
        return torch.eye(len(half), dtype=dtype, device=half.device), half - half.T


class Permutation(Layer):
    """y[:, i] = x[:, order[i]].

    Args:
        order: a permutation of the features or channels.
    """

    invertible = True
    order: Tensor
    back_order: Tensor

    def __init__(self, order: Sequence[int]) -> None:
        super().__init__()
        if sorted(order) != list(range(len(order))):
            raise UsageError(f"Permutation(order=...) must be a permutation, got {list(order)}.")
        self.register_buffer("order", torch.tensor(order), persistent=False)
        self.register_buffer("back_order", torch.tensor(order).argsort(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x[:, self.order]

    def vjp(self, residual: None, h: Tensor) -> Tensor:
        return h[:, self.back_order]

    def fragment(self, residual: None, h: Tensor) -> None:
        return None

    def vijp(self, residual: None, h: Tensor, fragment: None) -> Tensor:
        return h[:, self.order]

    def inverse(self, y: Tensor) -> Tensor:
        return y[:, self.back_order]


class Reshape(Layer):
    """The same numbers of a row in another shape.

    Args:
        inputs: shape of a row of x.
        outputs: shape of a row of y.
    """

    invertible = True

    def __init__(self, inputs: Sequence[int], outputs: Sequence[int]) -> None:
        super().__init__()
        if math.prod(inputs) != math.prod(outputs):
            raise UsageError(f"Reshape cannot turn rows of {inputs} into rows of {outputs}.")
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(-1, *self.outputs)

    def vjp(self, residual: None, h: Tensor) -> Tensor:
        return self.inverse(h)

    def fragment(self, residual: None, h: Tensor) -> None:
        return None

    def vijp(self, residual: None, h: Tensor, fragment: None) -> Tensor:
        return self(h)

    def inverse(self, y: Tensor) -> Tensor:
        return y.reshape(-1, *self.inputs)


def affine(x: Tensor, h: Tensor, bias: bool) -> Gradients:
    """Gradients of y = x W^T + b from x [..., inputs] and h_y [..., outputs]."""
    x, h = x.flatten(0, -2), h.flatten(0, -2)
    found = {"weight": h.T @ x}
    return {**found, "bias": h.sum(0)} if bias else found
