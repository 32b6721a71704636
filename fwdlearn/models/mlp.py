"""A multilayer perceptron: linear layers with an activation between them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from fwdlearn.data.types import DataInfo
from fwdlearn.errors import UsageError
from fwdlearn.models.activation import activation_named
from fwdlearn.models.built import Built, weights_from
from fwdlearn.models.decorrelation import decorrelated


class MLP(nn.Module):
    """Maps [rows, ...], flattened, to [rows, outputs]."""

    def __init__(self, widths: Sequence[int], activation: nn.Module, bias: bool) -> None:
        super().__init__()
        pairs = zip(widths[:-1], widths[1:], strict=True)
        self.layers = nn.ModuleList(nn.Linear(m, n, bias=bias) for m, n in pairs)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for i, layer in enumerate(self.layers):
            x = layer(x if i == 0 else self.activation(x))
        return x


def mlp(
    info: DataInfo,
    hidden: Sequence[int] = (64,),
    activation: str = "relu",
    bias: bool = True,
    decorrelation: float | None = None,
    seed: int = 0,
) -> Built:
    """Builds a multilayer perceptron for features or images.

    Args:
        info: of the data; images are flattened.
        hidden: width of each hidden layer, at least 1; empty for a linear model.
        activation: `relu`, `gelu`, `silu`, `tanh` or `threshold` (1 above 0, else 0).
        bias: whether the linear layers have biases.
        decorrelation: size of a step of the layers that decorrelate the inputs of the linear ones
            (1e-3 is a start), or None for no such layers.
        seed: of the weights, drawn as torch draws them for `nn.Linear`.

    Raises:
        UsageError: text data, or an argument out of range.
    """
    if info.kind in ("text", "language"):
        raise UsageError("mlp reads features or images, not text; models.transformers reads text.")
    if info.kind in ("sequence", "tokens"):
        raise UsageError(f"mlp reads features or images, not {info.kind}; recurrent reads those.")
    if any(width < 1 for width in hidden):
        raise UsageError(f"mlp(hidden=...) must hold widths of at least 1, got {list(hidden)!r}.")
    widths = [math.prod(info.shape), *hidden, info.outputs]
    with weights_from(seed):
        model: nn.Module = MLP(widths, activation_named(activation, "mlp"), bias)
        if decorrelation is not None:
            model = decorrelated(model, decorrelation)
        return Built(model.eval())
