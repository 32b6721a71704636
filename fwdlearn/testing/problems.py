"""Small problems whose gradients are known in closed form.

A problem is a batch of rows at one point of the parameters. All numbers come from a key, all
arithmetic is float64, and no gradient here is made by automatic differentiation.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Self

import numpy as np
import torch
from torch import Tensor

from fwdlearn.keys import Key

Shapes = Mapping[str, tuple[int, ...]]


def numbers(key: Key, *shape: int) -> Tensor:
    """float64 [*shape], uniform with mean 0 and variance 1."""
    flat = key.uniform(math.prod(shape), "problem") * 2 - 1
    return (flat * math.sqrt(3)).reshape(shape)


def flatten(values: Mapping[str, Tensor]) -> Tensor:
    """[n, *shape] for each name -> [n, d], names in the order of the mapping."""
    return torch.cat([value.reshape(len(value), -1) for value in values.values()], 1)


def unflatten(flat: Tensor, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """[n, d] -> [n, *shape] for each name of `params`, in their order."""
    parts = flat.split([value.numel() for value in params.values()], 1)
    return {
        name: part.reshape(-1, *value.shape)
        for (name, value), part in zip(params.items(), parts, strict=True)
    }


class Problem(ABC):
    """Per-row losses around a point.

    Attributes:
        params: name -> float64 tensor, the point.
        rows: rows of the batch.
    """

    params: Mapping[str, Tensor]
    rows: int

    @abstractmethod
    def losses(self, values: Mapping[str, Tensor], row: Tensor) -> Tensor:
        """Losses of a block.

        Args:
            values: name -> [queries, *shape], each query's own parameters.
            row: int64 [queries].

        Returns:
            [queries].
        """

    @abstractmethod
    def gradients(self) -> dict[str, Tensor]:
        """Name -> float64 [rows, *shape]: each row's exact gradient at `params`."""

    def smoothed(self, sigma: float) -> dict[str, Tensor] | None:
        """Name -> float64 [rows, *shape]: the gradients of E L(params + sigma z), z standard normal
        in every entry; None where there is no closed form."""
        return None

    def gradient(self) -> dict[str, Tensor]:
        """Name -> float64 [*shape]: the gradient of the mean over rows."""
        return {name: value.mean(0) for name, value in self.gradients().items()}

    @property
    def size(self) -> int:
        """Number of parameters."""
        return sum(value.numel() for value in self.params.values())

    def clean_losses(self) -> Tensor:
        """float64 [rows] at `params`."""
        values = {n: v.expand(self.rows, *v.shape) for n, v in self.params.items()}
        return self.losses(values, torch.arange(self.rows))

    def scaled(self, factor: float) -> Problem:
        """Every loss times `factor`."""
        return _Affine(self, factor, 0.0)

    def shifted(self, constant: float) -> Problem:
        """Every loss plus `constant`."""
        return _Affine(self, 1.0, constant)

    def select(self, index: Sequence[int]) -> Problem:
        """The rows `index`, in that order."""
        return _Selected(self, index)


class _Affine(Problem):
    def __init__(self, problem: Problem, factor: float, constant: float) -> None:
        self.params, self.rows = problem.params, problem.rows
        self._problem, self._factor, self._constant = problem, factor, constant

    def losses(self, values: Mapping[str, Tensor], row: Tensor) -> Tensor:
        return self._factor * self._problem.losses(values, row) + self._constant

    def gradients(self) -> dict[str, Tensor]:
        return {name: self._factor * value for name, value in self._problem.gradients().items()}


class _Selected(Problem):
    def __init__(self, problem: Problem, index: Sequence[int]) -> None:
        self.params, self.rows = problem.params, len(index)
        self._problem, self._index = problem, torch.tensor(index)

    def losses(self, values: Mapping[str, Tensor], row: Tensor) -> Tensor:
        return self._problem.losses(values, self._index[row])

    def gradients(self) -> dict[str, Tensor]:
        return {name: value[self._index] for name, value in self._problem.gradients().items()}


def point(key: Key, shapes: Shapes) -> dict[str, Tensor]:
    """A random point: name -> float64 tensor."""
    return {name: numbers(key.fold(name), *shape) for name, shape in shapes.items()}


class Quadratic(Problem):
    """L_b = offset_b + slope_b . t + t . curvature_b t / 2, where t = theta - params.

    Args:
        params: the point.
        slopes: [rows, d], the gradients there.
        offsets: [rows], the losses there.
        curvature: [rows, d, d], symmetric, or None for a linear loss.
    """

    def __init__(
        self,
        params: Mapping[str, Tensor],
        slopes: Tensor,
        offsets: Tensor,
        curvature: Tensor | None = None,
    ) -> None:
        self.params, self.rows = params, len(slopes)
        self._slopes, self._offsets, self._curvature = slopes, offsets, curvature
        self._point = flatten({name: value.unsqueeze(0) for name, value in params.items()})

    @classmethod
    def random(cls, key: Key, rows: int, shapes: Shapes) -> Self:
        """Unit-sized slopes and losses; curvature of norm about one."""
        params = point(key.fold("point"), shapes)
        d = sum(value.numel() for value in params.values())
        half = numbers(key.fold("curvature"), rows, d, d) / (2 * math.sqrt(d))
        slopes = numbers(key.fold("slopes"), rows, d)
        return cls(params, slopes, numbers(key.fold("offsets"), rows) + 2, half + half.mT)

    def losses(self, values: Mapping[str, Tensor], row: Tensor) -> Tensor:
        moved = flatten({name: values[name] for name in self.params}) - self._point
        losses = self._offsets[row] + (self._slopes[row] * moved).sum(1)
        if self._curvature is not None:
            bent = (self._curvature[row] @ moved.unsqueeze(2)).squeeze(2)
            losses = losses + (bent * moved).sum(1) / 2
        return losses

    def gradients(self) -> dict[str, Tensor]:
        return unflatten(self._slopes, self.params)

    def smoothed(self, sigma: float) -> dict[str, Tensor]:
        # Symmetric noise adds a constant to a quadratic and nothing to its gradient.
        return self.gradients()


class Linear(Quadratic):
    """L_b = offset_b + slope_b . (theta - params): differences are exact at every sigma."""

    @classmethod
    def random(cls, key: Key, rows: int, shapes: Shapes) -> Self:
        """Unit-sized slopes and losses."""
        params = point(key.fold("point"), shapes)
        d = sum(value.numel() for value in params.values())
        slopes = numbers(key.fold("slopes"), rows, d)
        return cls(params, slopes, numbers(key.fold("offsets"), rows) + 2)


class Logistic(Problem):
    """L_b = log(1 + exp(-input_b . theta)): smooth, convex, bent away from zero."""

    def __init__(self, params: Mapping[str, Tensor], inputs: Tensor) -> None:
        self.params, self.rows, self._inputs = params, len(inputs), inputs

    @classmethod
    def random(cls, key: Key, rows: int, shapes: Shapes) -> Self:
        """Inputs (their sign is the label) and margins of about unit size."""
        params = point(key.fold("point"), shapes)
        d = sum(value.numel() for value in params.values())
        return cls(params, numbers(key.fold("inputs"), rows, d))

    def losses(self, values: Mapping[str, Tensor], row: Tensor) -> Tensor:
        theta = flatten({name: values[name] for name in self.params})
        return torch.nn.functional.softplus(-(self._inputs[row] * theta).sum(1))

    def gradients(self) -> dict[str, Tensor]:
        return unflatten(-torch.sigmoid(-self._margin()).unsqueeze(1) * self._inputs, self.params)

    def smoothed(self, sigma: float) -> dict[str, Tensor]:
        # The loss depends on one normal number alone, so Gauss-Hermite nodes integrate it.
        nodes, weights = _hermite(80)
        spread = sigma * self._inputs.norm(dim=1)
        margins = self._margin().unsqueeze(1) + spread.unsqueeze(1) * nodes
        mean = (torch.sigmoid(-margins) * weights).sum(1)
        return unflatten(-mean.unsqueeze(1) * self._inputs, self.params)

    def _margin(self) -> Tensor:
        theta = flatten({name: value.unsqueeze(0) for name, value in self.params.items()})
        return (self._inputs * theta).sum(1)


@lru_cache
def _hermite(count: int) -> tuple[Tensor, Tensor]:
    nodes, weights = np.polynomial.hermite_e.hermegauss(count)
    return torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())


class MLP(Problem):
    """Cross-entropy of a network with one tanh layer, gradient by the chain rule written out.

    Args:
        params: "hidden.weight" [h, n], "hidden.bias" [h], "head.weight" [c, h], "head.bias" [c].
        inputs: [rows, n].
        labels: int64 [rows] in [0, c).
    """

    def __init__(self, params: Mapping[str, Tensor], inputs: Tensor, labels: Tensor) -> None:
        self.params, self.rows = params, len(inputs)
        self._inputs, self._labels = inputs, labels

    @classmethod
    def random(
        cls, key: Key, rows: int, inputs: int = 4, hidden: int = 5, classes: int = 3
    ) -> Self:
        """Weights of variance 1 / inputs, labels in turn."""
        shapes = {
            "hidden.weight": (hidden, inputs),
            "hidden.bias": (hidden,),
            "head.weight": (classes, hidden),
            "head.bias": (classes,),
        }
        params = {
            name: value / math.sqrt(value.shape[-1])
            for name, value in point(key.fold("point"), shapes).items()
        }
        return cls(params, numbers(key.fold("inputs"), rows, inputs), torch.arange(rows) % classes)

    def losses(self, values: Mapping[str, Tensor], row: Tensor) -> Tensor:
        logits, _ = self._forward(values, self._inputs[row])
        return torch.nn.functional.cross_entropy(logits, self._labels[row], reduction="none")

    def gradients(self) -> dict[str, Tensor]:
        values = {n: v.expand(self.rows, *v.shape) for n, v in self.params.items()}
        logits, hidden = self._forward(values, self._inputs)
        error = logits.softmax(1) - torch.nn.functional.one_hot(self._labels, logits.shape[1])
        inner = (error @ self.params["head.weight"]) * (1 - hidden**2)
        exact = {
            "hidden.weight": inner.unsqueeze(2) * self._inputs.unsqueeze(1),
            "hidden.bias": inner,
            "head.weight": error.unsqueeze(2) * hidden.unsqueeze(1),
            "head.bias": error,
        }
        return {name: exact[name] for name in self.params}

    @staticmethod
    def _forward(values: Mapping[str, Tensor], inputs: Tensor) -> tuple[Tensor, Tensor]:
        inner = values["hidden.weight"] @ inputs.unsqueeze(2).to(values["hidden.weight"].dtype)
        hidden = torch.tanh(inner.squeeze(2) + values["hidden.bias"])
        logits = (values["head.weight"] @ hidden.unsqueeze(2)).squeeze(2) + values["head.bias"]
        return logits, hidden
