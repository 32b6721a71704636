"""Chains and rows for the measurements of Moonwalk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fwdlearn.models.built import weights_from
from fwdlearn.moonwalk import CausalConv1d, Chain, Dense, Layer, LeakyReLU, Reshape, cnn, mlp

WIDTH = 256


def losses(targets: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda output: F.cross_entropy(output, targets, reduction="none")


def rows(shape: tuple[int, ...], count: int, dtype: torch.dtype = torch.float32) -> Any:
    with weights_from(1):
        x = torch.randn(count, *shape, dtype=torch.float64).to(dtype)
        return x, torch.randint(10, (count,))


def perceptron(depth: int) -> Chain:
    return mlp(WIDTH, WIDTH, depth, 10)


def couplings(depth: int) -> Chain:
    return cnn((8, 32, 32), (32,), depth, 10)


def gaussian(cutoff: float) -> Chain:
    """Random square matrices, of conditions in the hundreds."""
    with weights_from(0):
        layers: list[Layer] = []
        for _ in range(64):
            dense = Dense(64, 64, cutoff=cutoff)
            nn.init.normal_(dense.weight, std=1 / 8)
            layers += [dense, LeakyReLU(0.5)]
        return Chain([*layers, Dense(64, 10)])


def ramp(first: int, last: int) -> Chain:
    """Widths from one to the other: submersive where it narrows."""
    widths = torch.linspace(first, last, 65).round().int().tolist()
    with weights_from(0):
        layers: list[Layer] = []
        for before, after in zip(widths[:-1], widths[1:], strict=True):
            layers += [Dense(before, after, gain=1.4), LeakyReLU(0.2)]
        return Chain([*layers, Dense(last, 10)])


def causal() -> Chain:
    """Causal convolutions over 32 steps."""
    with weights_from(0):
        layers: list[Layer] = []
        for _ in range(64):
            layers += [CausalConv1d(16, 16, 3), LeakyReLU(0.5)]
        return Chain([*layers, Reshape((16, 32), (512,)), Dense(512, 10)])
