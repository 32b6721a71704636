"""Additive coupling: any two maps, made invertible by what they are added to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fwdlearn.moonwalk.layer import Gradients, Layer

Halves = tuple[Tensor, Tensor]


class Coupling(Layer):
    """y1 = x1 + f(x2), y2 = x2 + g(y1), on the two halves of dimension 1.

    f and g may be any layers or chains: they are never inverted. Their parameter gradients, and
    the products with their Jacobians, come from backpropagation within the one coupling by the
    explicit products of its parts, whose activations live no longer than that.

    Leaves what f and g leave: one bit for each of their leaky ReLUs.

    Args:
        f: from the second half to the first.
        g: from the first half to the second.
    """

    invertible = True

    def __init__(self, f: Layer, g: Layer) -> None:
        super().__init__()
        self.f, self.g = f, g

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, 1)
        y1 = x1 + self.f(x2)
        return torch.cat([y1, x2 + self.g(y1)], 1)

    def observe(self, x: Tensor) -> tuple[Tensor, Any]:
        x1, x2 = x.chunk(2, 1)
        add, of_f = self.f.observe(x2)
        y1 = x1 + add
        add, of_g = self.g.observe(y1)
        return torch.cat([y1, x2 + add], 1), (of_f, of_g)

    def residual(self, x: Tensor) -> Any:
        return self.observe(x)[1]

    def vjp(self, residual: Any, h: Tensor) -> Tensor:
        h1, h2 = h.chunk(2, 1)
        h1 = h1 + self.g.vjp(residual[1], h2)
        return torch.cat([h1, h2 + self.f.vjp(residual[0], h1)], 1)

    def fragment(self, residual: Any, h: Tensor) -> None:
        return None

    def vijp(self, residual: Any, h: Tensor, fragment: None) -> Tensor:
        h1, h2 = h.chunk(2, 1)
        h2 = h2 - self.f.vjp(residual[0], h1)
        return torch.cat([h1 - self.g.vjp(residual[1], h2), h2], 1)

    def inverse(self, y: Tensor) -> Tensor:
        y1, y2 = y.chunk(2, 1)
        x2 = y2 - self.g(y1)
        return torch.cat([y1 - self.f(x2), x2], 1)

    def gradients(self, x: Tensor, h: Tensor) -> Gradients:
        return self.back(x, h)[1]

    def back(self, x: Tensor, h: Tensor) -> tuple[Tensor, Gradients]:
        (x1, x2), (h1, h2) = x.chunk(2, 1), h.chunk(2, 1)
        change, of_g = self.g.back(x1 + self.f(x2), h2)
        h1 = h1 + change
        change, of_f = self.f.back(x2, h1)
        return torch.cat([h1, h2 + change], 1), _named(of_f, of_g)

    def advance(self, x: Tensor, h: Tensor, fragment: None) -> tuple[Tensor, Tensor, Gradients]:
        # What each part needs is known before it runs, so each runs once.
        (x1, x2), (h1, h2) = x.chunk(2, 1), h.chunk(2, 1)
        add, change, of_f = self.f.pull(x2, h1)
        y1, h2 = x1 + add, h2 - change
        add, change, of_g = self.g.pull(y1, h2)
        y, h = torch.cat([y1, x2 + add], 1), torch.cat([h1 - change, h2], 1)
        return y, h, _named(of_f, of_g)


def _named(f: Gradients, g: Gradients) -> Gradients:
    return {f"{part}.{name}": v for part, of in (("f", f), ("g", g)) for name, v in of.items()}
