"""A chain of layers: the model whose structure Moonwalk needs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from fwdlearn.errors import UsageError
from fwdlearn.moonwalk.layer import Gradients, Layer

# The name of a layer within its chain, and the layer.
Part = tuple[str, Layer]


class Chain(Layer):
    """Layers one after another; an ordinary module, with the parameter names of nn.Sequential.

    A chain is a layer, so it serves as the branch of a coupling. As a link of another chain it
    keeps its whole cotangent and is backpropagated through at once.

    Args:
        layers: each a layer of its own, no parameter in two of them.

    Raises:
        UsageError: something is no layer, or is there twice.

    Example:
        >>> import torch
        >>> from fwdlearn.moonwalk import Chain, Dense, LeakyReLU
        >>> chain = Chain([Dense(4, 4), LeakyReLU(), Dense(4, 2)])
        >>> [name for name, _ in chain.named_parameters()]
        ['0.weight', '0.bias', '2.weight', '2.bias']
        >>> chain(torch.ones(3, 4)).shape
        torch.Size([3, 2])
    """

    def __init__(self, layers: Iterable[Layer]) -> None:
        super().__init__()
        seen: set[int] = set()
        for number, layer in enumerate(layers):
            if not isinstance(layer, Layer):
                raise UsageError(
                    f"Chain needs layers of fwdlearn.moonwalk, got {type(layer).__name__} at "
                    f"place {number}; derive it from fwdlearn.moonwalk.Layer."
                )
            own = {id(layer), *(id(parameter) for parameter in layer.parameters())}
            if own & seen:
                raise UsageError(
                    f"Chain has a layer or a parameter twice, again at place {number}; gradients "
                    "are finished layer by layer, so each needs its own."
                )
            seen |= own
            self.add_module(str(number), layer)

    @property
    def parts(self) -> list[Part]:
        """The layers with their names, in order."""
        return [(name, layer) for name, layer in self.named_children() if isinstance(layer, Layer)]

    @property
    def invertible(self) -> bool:  # type: ignore[override]
        return all(layer.invertible for _, layer in self.parts)

    def forward(self, x: Tensor) -> Tensor:
        for _, layer in self.parts:
            x = layer(x)
        return x

    def observe(self, x: Tensor) -> tuple[Tensor, Any]:
        residuals = []
        for _, layer in self.parts:
            x, residual = layer.observe(x)
            residuals.append(residual)
        return x, residuals

    def residual(self, x: Tensor) -> Any:
        return self.observe(x)[1]

    def vjp(self, residual: Any, h: Tensor) -> Tensor:
        for (_, layer), one in zip(reversed(self.parts), reversed(residual), strict=True):
            h = layer.vjp(one, h)
        return h

    def inverse(self, y: Tensor) -> Tensor:
        for _, layer in reversed(self.parts):
            y = layer.inverse(y)
        return y

    def gradients(self, x: Tensor, h: Tensor) -> Gradients:
        return self.back(x, h)[1]

    def back(self, x: Tensor, h: Tensor) -> tuple[Tensor, Gradients]:
        return back(self.parts, inputs(self.parts, x), h)

    def pull(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Gradients]:
        return pull(self.parts, x, h)

    def advance(self, x: Tensor, h: Tensor, fragment: Tensor) -> tuple[Tensor, Tensor, Gradients]:
        y, _, found = self.pull(x, fragment)
        return y, fragment, found


def inputs(parts: Sequence[Part], x: Tensor) -> list[Tensor]:
    """The input of every layer."""
    found = [x]
    for _, layer in parts[:-1]:
        found.append(layer(found[-1]))
    return found


def back(parts: Sequence[Part], given: list[Tensor], h: Tensor) -> tuple[Tensor, Gradients]:
    """Backpropagation by explicit products: (inputs, h_y) -> (h_x, gradients); uses up `given`."""
    gradients: Gradients = {}
    for name, layer in reversed(parts):
        h, found = layer.back(given.pop(), h)
        gradients |= {f"{name}.{key}": value for key, value in found.items()}
    return h, gradients


def pull(parts: Sequence[Part], x: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Gradients]:
    """`back` with the output before it: (x, h_y) -> (y, h_x, gradients)."""
    given = inputs(parts, x)
    y = parts[-1][1](given[-1])
    return y, *back(parts, given, h)
