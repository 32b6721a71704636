"""Pooling over disjoint windows: surjective, though nothing of it can be inverted."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fwdlearn.moonwalk.layer import Layer


class MeanPool2d(Layer):
    """The mean of each window of [rows, channels, height, width]. Leaves nothing.

    Args:
        size: of a window, in pixels; it must divide height and width.
    """

    def __init__(self, size: int = 2) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return windows(x, self.size).mean(-1)

    def vjp(self, residual: None, h: Tensor) -> Tensor:
        share = h / self.size**2
        return share.repeat_interleave(self.size, -2).repeat_interleave(self.size, -1)

    def fragment(self, residual: None, h: Tensor) -> None:
        return None

    def vijp(self, residual: None, h: Tensor, fragment: None) -> Tensor:
        return windows(h, self.size).sum(-1)


class MaxPool2d(Layer):
    """The largest of each window of [rows, channels, height, width]. Leaves one byte a window.

    Args:
        size: of a window, in pixels, at most 15; it must divide height and width.
    """

    def __init__(self, size: int = 2) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, self.size)

    def residual(self, x: Tensor) -> Tensor:
        return windows(x, self.size).argmax(-1).byte()

    def vjp(self, residual: Tensor, h: Tensor) -> Tensor:
        spread = h.new_zeros(*h.shape, self.size**2)
        spread.scatter_(-1, residual.long().unsqueeze(-1), h.unsqueeze(-1))
        height, width = h.shape[-2:]
        spread = spread.unflatten(-1, (self.size, self.size)).movedim(-2, -3)
        return spread.reshape(*h.shape[:-2], height * self.size, width * self.size)

    def fragment(self, residual: Tensor, h: Tensor) -> None:
        return None

    def vijp(self, residual: Tensor, h: Tensor, fragment: None) -> Tensor:
        return windows(h, self.size).gather(-1, residual.long().unsqueeze(-1)).squeeze(-1)


def windows(x: Tensor, size: int) -> Tensor:
    """[..., height, width] -> [..., height / size, width / size, size * size]."""
    tiles = x.unflatten(-1, (-1, size)).unflatten(-3, (-1, size))
    return tiles.movedim(-3, -2).flatten(-2)
