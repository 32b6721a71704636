"""What a layer of a chain offers: itself and explicit products with its Jacobian.

With A = dy/dx at one row and row vectors h for cotangents, backpropagation goes h_x = h_y A; the
inverse-forward sweep goes the other way, h_y = h_x A^+, and that is `vijp`. Where A erases a part
of h_y (its left null space is not zero), `fragment` is that part.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from fwdlearn.errors import UsageError

Gradients = dict[str, Tensor]


class Layer(nn.Module):
    """A map x -> y with its products, all written as forward operations: no graph is ever made.

    x is [rows, *in], y is [rows, *out], a cotangent has the shape of what it belongs to. A
    cotangent may be of a wider dtype than x; parameter gradients come in the parameters' dtype.

    A residual is what `vjp` and `vijp` need to know of the point, as small as can be: nothing for
    a linear map, one bit a unit for a leaky ReLU. The defaults describe a layer of which nothing
    can be undone: its fragment is the whole cotangent, which is exact and costs one activation.
    """

    invertible = False

    def residual(self, x: Tensor) -> Any:
        """What the products need to know of the point."""
        return None

    @abstractmethod
    def vjp(self, residual: Any, h: Tensor) -> Tensor:
        """h_y [rows, *out] -> h_x [rows, *in], the transposed product h_y A."""

    def fragment(self, residual: Any, h: Tensor) -> Any:
        """The part of h_y [rows, *out] that h_y A no longer shows, or None for nothing."""
        return h

    def vijp(self, residual: Any, h: Tensor, fragment: Any) -> Tensor:
        """h_x [rows, *in] and the fragment -> h_y [rows, *out]; undoes `vjp`."""
        return fragment

    def gradients(self, x: Tensor, h: Tensor) -> Gradients:
        """Parameter name -> gradient, from the input and the cotangent of the output."""
        return {}

    def inverse(self, y: Tensor) -> Tensor:
        """y [rows, *out] -> x [rows, *in], where `invertible`."""
        raise UsageError(
            f"{type(self).__name__} cannot be inverted; the first phase by residuals or by "
            "tangents does without."
        )

    def jvp(self, x: Tensor, tangents: Tensor) -> Tensor:
        """Tangents [count, rows, *in] at x -> tangents [count, rows, *out]."""
        return torch.func.vmap(lambda t: torch.func.jvp(self, (x,), (t,))[1])(tangents)

    def advance(self, x: Tensor, h: Tensor, fragment: Any) -> tuple[Tensor, Tensor, Gradients]:
        """One step of the inverse-forward sweep: (x, h_x) -> (y, h_y, parameter gradients)."""
        h = self.vijp(self.residual(x), h, fragment)
        return self(x), h, self.gradients(x, h)

    def observe(self, x: Tensor) -> tuple[Tensor, Any]:
        """x -> (y, residual), for layers where one makes the other cheaper."""
        return self(x), self.residual(x)

    def back(self, x: Tensor, h: Tensor) -> tuple[Tensor, Gradients]:
        """One step of backpropagation, within this layer: (x, h_y) -> (h_x, gradients)."""
        return self.vjp(self.residual(x), h), self.gradients(x, h)

    def pull(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Gradients]:
        """`back` with the output before it: (x, h_y) -> (y, h_x, gradients)."""
        return self(x), *self.back(x, h)
