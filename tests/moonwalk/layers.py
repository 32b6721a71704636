"""One of every kind of layer, and the shape of a row of its input."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fwdlearn.models.built import weights_from
from fwdlearn.moonwalk import (
    CausalConv1d,
    Chain,
    Conv2d,
    Coupling,
    Dense,
    Layer,
    LeakyReLU,
    MaxPool2d,
    MeanPool2d,
    Orthogonal,
    Patches2d,
    Permutation,
    ReLU,
    Reshape,
    Tanh,
)

Make = Callable[[], Layer]


def weak(layer: Layer) -> Layer:
    """With two singular values a thousandth of the others."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    with torch.no_grad():
        left, values, right = torch.linalg.svd(weight.flatten(1), full_matrices=False)
        values[-2:] *= 1e-3
        weight.copy_((left * values @ right).view_as(weight))
    return layer


def branch(size: int) -> Chain:
    return Chain([Dense(size, 5), LeakyReLU(), Dense(5, size)])


def image_branch(size: int) -> Chain:
    return Chain([Conv2d(size, 4), Tanh(), Conv2d(4, size)])


# Layers that leave no fragment.
SUBMERSIVE: dict[str, tuple[Make, tuple[int, ...]]] = {
    "dense square": (lambda: Dense(6, 6), (6,)),
    "dense narrowing": (lambda: Dense(6, 4, bias=False), (6,)),
    "dense on tokens": (lambda: Dense(6, 4), (3, 6)),
    "orthogonal": (lambda: Orthogonal(6), (6,)),
    "orthogonal without bias": (lambda: Orthogonal(6, bias=False), (6,)),
    "permutation": (lambda: Permutation([2, 0, 1]), (3, 4)),
    "reshape": (lambda: Reshape((3, 4), (2, 6)), (3, 4)),
    "leaky relu": (lambda: LeakyReLU(0.3), (7,)),
    "tanh": (lambda: Tanh(), (5,)),
    "coupling": (lambda: Coupling(branch(3), branch(3)), (6,)),
    "coupling of images": (lambda: Coupling(image_branch(2), image_branch(2)), (4, 5, 3)),
    "patches": (lambda: Patches2d(2, 8, 2), (2, 4, 6)),
    "patches narrowing": (lambda: Patches2d(2, 5, 2), (2, 4, 6)),
    "convolution 1 x 1": (lambda: Patches2d(3, 3, 1), (3, 2, 4)),
    "causal": (lambda: CausalConv1d(4, 4, 3, block=5), (4, 17)),
    "causal narrowing": (lambda: CausalConv1d(6, 4, 3), (6, 40)),
    "causal long": (lambda: CausalConv1d(3, 3, 6, block=1, bias=False), (3, 11)),
    "causal strided": (lambda: CausalConv1d(3, 5, 5, stride=2, block=3), (3, 14)),
    "strided patches": (lambda: CausalConv1d(3, 4, 2, stride=2), (3, 10)),
    "mean pooling": (lambda: MeanPool2d(2), (3, 4, 6)),
    "max pooling": (lambda: MaxPool2d(3), (2, 6, 3)),
}

# Layers that leave one, and how many numbers a row.
ERASING: dict[str, tuple[Make, tuple[int, ...], int]] = {
    "dense widening": (lambda: Dense(4, 7), (4,), 3),
    "dense weak": (lambda: weak(Dense(6, 6, cutoff=0.1)), (6,), 2),
    "dense weak and widening": (lambda: weak(Dense(4, 7, cutoff=0.1)), (4,), 5),
    "patches widening": (lambda: Patches2d(1, 6, 2), (1, 4, 6), 2 * 6),
    "patches weak": (lambda: weak(Patches2d(2, 8, 2, cutoff=0.1)), (2, 4, 6), 2 * 6),
    "causal widening": (lambda: CausalConv1d(2, 5, 3), (2, 13), 3 * 13),
    "causal strided widening": (lambda: CausalConv1d(2, 5, 3, stride=2), (2, 10), 5),
    "ordinary convolution": (lambda: Conv2d(2, 3), (2, 4, 5), 3 * 4 * 5),
    "chain": (lambda: Chain([Dense(4, 6), LeakyReLU(), Dense(6, 2)]), (4,), 2),
}
EVERY = {**SUBMERSIVE, **{name: entry[:2] for name, entry in ERASING.items()}}
EVERY["relu"] = (lambda: ReLU(), (9,))


def made(name: str, rows: int = 4) -> tuple[Layer, Tensor, Tensor]:
    """The layer in float64 with biases that are not zero, rows, and a cotangent of its output."""
    make, shape = EVERY[name]
    with weights_from(len(name)):
        layer = make().double()
        for key, parameter in layer.named_parameters():
            if key.endswith("bias"):
                nn.init.normal_(parameter)
        x = torch.randn(rows, *shape, dtype=torch.float64)
        with torch.no_grad():
            h = torch.randn_like(layer(x))
    return layer, x, h
