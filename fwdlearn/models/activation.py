"""The activations that our own models offer."""

from __future__ import annotations

from torch import Tensor, nn

from fwdlearn.errors import UsageError


class Threshold(nn.Module):
    """1 where the input is positive, else 0: no slope anywhere."""

    def forward(self, x: Tensor) -> Tensor:
        return (x > 0).to(x.dtype)


ACTIVATIONS: dict[str, type[nn.Module]] = {
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "threshold": Threshold,
}


def activation_named(name: str, model: str) -> nn.Module:
    """The activation called `name`; `model` is the factory that asks, for the message."""
    if name not in ACTIVATIONS:
        known = ", ".join(sorted(ACTIVATIONS))
        raise UsageError(f"{model}(activation=...) must be one of {known}, got {name!r}.")
    return ACTIVATIONS[name]()
