"""What a linear minimisation oracle answers with: a point of the set, in its shortest form."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


class Vertex(ABC):
    """A point s of a set that minimises <s, direction>. Points are contiguous tensors."""

    @abstractmethod
    def dot(self, direction: Tensor) -> Tensor:
        """Scalar <s, direction>."""

    @abstractmethod
    def pull(self, point: Tensor, step: float) -> None:
        """point <- (1 - step) point + step s, in place; `step` lies in [0, 1]."""

    def dense(self, like: Tensor) -> Tensor:
        """s written out, with the shape and dtype of `like`."""
        point = torch.zeros_like(like, memory_format=torch.contiguous_format)
        self.pull(point, 1.0)
        return point


@dataclass(frozen=True)
class Entries(Vertex):
    """Zero but for a few entries; a step touches those alone, beside the scaling.

    Args:
        index: int64 [count], places in the flattened point, each at most once.
        values: [count].
    """

    index: Tensor
    values: Tensor

    def dot(self, direction: Tensor) -> Tensor:
        return torch.dot(direction.reshape(-1)[self.index], self.values)

    def pull(self, point: Tensor, step: float) -> None:
        point.mul_(1 - step).view(-1).index_add_(0, self.index, self.values, alpha=step)


@dataclass(frozen=True)
class Outer(Vertex):
    """The matrix left right^T; a step is one update of rank one.

    Args:
        left: [m], with the radius and the sign.
        right: [n].
    """

    left: Tensor
    right: Tensor

    def dot(self, direction: Tensor) -> Tensor:
        return torch.dot(direction.reshape(len(self.left), -1) @ self.right, self.left)

    def pull(self, point: Tensor, step: float) -> None:
        matrix = point.view(len(self.left), -1)
        matrix.addr_(self.left, self.right, beta=1 - step, alpha=step)


@dataclass(frozen=True)
class Multiple(Vertex):
    """A multiple of the direction itself.

    Args:
        direction: as the oracle was asked.
        factor: s = factor * direction.
    """

    direction: Tensor
    factor: float

    def dot(self, direction: Tensor) -> Tensor:
        return self.factor * torch.dot(self.direction.reshape(-1), direction.reshape(-1))

    def pull(self, point: Tensor, step: float) -> None:
        point.mul_(1 - step).add_(self.direction, alpha=step * self.factor)


@dataclass(frozen=True)
class Dense(Vertex):
    """Every entry written out: one temporary as large as the point."""

    values: Tensor

    def dot(self, direction: Tensor) -> Tensor:
        return torch.dot(self.values.reshape(-1), direction.reshape(-1))

    def pull(self, point: Tensor, step: float) -> None:
        point.lerp_(self.values, step)
