"""Learned allocation: a random law of the counts, trained by its own likelihood ratio.

Paper: T. Ren et al., "FLOPS: Forward Learning with OPtimal Sampling" (ICLR 2025, arXiv
2410.05966). For a step of learning rate eta on a smooth loss, only this part of the expected
improvement depends on the counts n_b of the B rows, with v_b the variance along one direction:

    proxy = - 1/B^2 sum_b v_b / n_b .

The counts are drawn from a law p(. ; phi) of the losses, and phi ascends

    mean over draws of  (proxy - mean proxy) / deviation * grad_phi log p(draw; phi) .

    Gaussian    q ~ N(level + slope x, K),  K_bk = s^2 exp(-(x_b - x_k)^2 / 2 l^2) + jitter
    Bernoulli   m_b ~ Bernoulli(sigmoid(level + slope x_b))

with x_b the loss over the batch's mean loss. A negative q counts as none; whatever is above the
floor is divided in proportion to q, or in equal parts among the rows with m_b = 1.

Symbols: phi `parameters`, x `feature`, v_b the estimator's `square_slope`, n_b `counts`.

Differs from the paper in: v_b is what the estimator has told of the step that was just taken, so
that no pilot queries are spent and no count depends on the losses that it weighs; the losses are
relative, so that phi means the same as they fall; phi moves by Adam. The paper's released code
learns nothing, and pools the queries of all rows, which changes the objective: `pooled=True` does
that too, for comparison.

Cost: the clean pass, one query a row, that the loss is read from; an estimator with a clean
baseline shares it. `draws` vectors of B numbers are kept from one step to the next.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from fwdlearn.allocator import Allocator, Feedback, Plan
from fwdlearn.counts import check_counts, check_sharing, divide, sharing_rows
from fwdlearn.errors import UsageError
from fwdlearn.keys import Key

# What keeps the covariance invertible where losses are alike, in units of the mean count.
_JITTER = 1e-2
# Beyond these a law no longer explores, or is no law of the losses: s and l in the Gaussian.
_SMALLEST, _LARGEST = 0.05, 10.0


@dataclass(frozen=True)
class _Learned(Allocator):
    """What both laws have in common; see `BernoulliAllocator`."""

    directions: int = 4
    least: int = 1
    draws: int = 20
    rate: float = 0.02
    pooled: bool = False
    sharing: str | int = "private"

    signals = frozenset({"loss"})

    def __post_init__(self) -> None:
        owner = type(self).__name__
        check_counts(owner, self.directions, self.least)
        check_sharing(owner, self.sharing)
        if isinstance(self.draws, bool) or self.draws < 2:
            raise ValueError(f"{owner}(draws=...) must be at least 2, got {self.draws!r}.")
        if not 0 <= self.rate < math.inf:
            raise ValueError(f"{owner}(rate=...) must not be negative, got {self.rate!r}.")

    @property
    def reweights(self) -> bool:
        return self.pooled

    def init(self) -> Any:
        """The law's parameters, the moments of their gradients, and what the last step drew."""
        start = torch.tensor(self._start(), dtype=torch.float64)
        zero = torch.zeros_like(start)
        return {"parameters": start, "mean": zero, "square": zero, "steps": 0, "drawn": None}

    def allocate(
        self, rows: int, signals: Mapping[str, Tensor], state: Any, *, key: Key
    ) -> tuple[Plan, Any]:
        feature = _relative(signals["loss"])
        drawn = self._draw(state["parameters"], feature, key)
        spare = self.budget(rows, state) - self.least * rows
        counts = self.least + divide(self._score(drawn[0]), spare, 0)
        sharing = sharing_rows(self.sharing, rows)
        plan = Plan.pooled(counts, sharing) if self.pooled else Plan(counts, sharing)
        return plan, {**state, "drawn": drawn}

    def observe(
        self, plan: Plan, signals: Mapping[str, Tensor], feedback: Feedback, state: Any
    ) -> Any:
        if "square_slope" not in feedback.rows:
            raise UsageError(
                f"{type(self).__name__} learns from the squared slopes of each row, which this "
                "estimator does not report; Neyman needs nothing of the estimator."
            )
        drawn, feature = state["drawn"], _relative(signals["loss"])
        variance = feedback.rows["square_slope"].double().nan_to_num(0.0)
        spare = int(plan.counts.sum()) - self.least * plan.rows
        score = self._score(drawn)
        share = torch.where(score.sum(1, True) > 0, score, 1.0)
        counts = self.least + spare * share / share.sum(1, True)
        proxy = -(variance / counts).sum(1)
        deviation = float(proxy.std())
        if not 0 < deviation < math.inf:
            return {**state, "drawn": None}
        gain = (proxy - proxy.mean()) / deviation
        gradient = gain @ self._log_gradient(state["parameters"], feature, drawn) / len(drawn)
        return {**self._ascended(state, gradient), "drawn": None}

    def _ascended(self, state: Any, gradient: Tensor) -> Any:
        steps = state["steps"] + 1
        mean = 0.9 * state["mean"] + 0.1 * gradient
        square = 0.99 * state["square"] + 0.01 * gradient.square()
        size = (square / (1 - 0.99**steps)).sqrt() + 1e-12
        parameters = state["parameters"] + self.rate * mean / (1 - 0.9**steps) / size
        return {
            "parameters": self._bounded(parameters),
            "mean": mean,
            "square": square,
            "steps": steps,
        }

    @abstractmethod
    def _start(self) -> list[float]:
        """The law's parameters before the first step."""

    def _bounded(self, parameters: Tensor) -> Tensor:
        return parameters

    @abstractmethod
    def _draw(self, parameters: Tensor, feature: Tensor, key: Key) -> Tensor:
        """[draws, rows] from the law."""

    @abstractmethod
    def _score(self, drawn: Tensor) -> Tensor:
        """[..., rows], not negative: in what proportion draws divide what is above the floor."""

    @abstractmethod
    def _log_gradient(self, parameters: Tensor, feature: Tensor, drawn: Tensor) -> Tensor:
        """[draws, parameters]: of the logarithm of the law's density at the draws."""


@dataclass(frozen=True)
class GaussianAllocator(_Learned):
    """Counts from a joint normal law whose mean is linear in the loss.

    Its four parameters are slope, level, log s and log l.

    Args:
        directions: mean number of directions a row, at least 1.
        least: directions of every row, from 1 to `directions`.
        draws: that the proxy is compared over in a step, at least 2; the first one is used.
        rate: step size of the law's parameters, at least 0; 0 leaves the law as it starts.
        pooled: weighs every query alike. This is *another objective*, in which rows with many
            directions weigh more; compare it with methods that weigh the rows alike.
        sharing: as for Uniform.

    Example:
        >>> allocator = GaussianAllocator(4)
        >>> signals = {"loss": torch.tensor([0.1, 2.0, 0.5])}
        >>> plan, _ = allocator.allocate(3, signals, allocator.init(), key=Key.root(0))
        >>> int(plan.counts.sum())
        12
    """

    def _start(self) -> list[float]:
        return [0.5, 0.5, math.log(0.3), math.log(0.5)]

    def _bounded(self, parameters: Tensor) -> Tensor:
        logs = parameters[2:].clamp(math.log(_SMALLEST), math.log(_LARGEST))
        return torch.cat((parameters[:2], logs))

    def _law(self, parameters: Tensor, feature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean [rows], kernel without jitter and squared distances [rows, rows]."""
        slope, level, s, length = (*parameters[:2], *parameters[2:].exp())
        square = (feature[:, None] - feature).square()
        return level + slope * feature, s**2 * torch.exp(-square / (2 * length**2)), square

    def _draw(self, parameters: Tensor, feature: Tensor, key: Key) -> Tensor:
        mean, kernel, _ = self._law(parameters, feature)
        root = torch.linalg.cholesky(kernel + _JITTER * torch.eye(len(feature)).double())
        return mean + _normal(key, self.draws, len(feature)) @ root.T

    def _score(self, drawn: Tensor) -> Tensor:
        return drawn.clamp(min=0)

    def _log_gradient(self, parameters: Tensor, feature: Tensor, drawn: Tensor) -> Tensor:
        mean, kernel, square = self._law(parameters, feature)
        inverse = torch.linalg.inv(kernel + _JITTER * torch.eye(len(feature)).double())
        pull = (drawn - mean) @ inverse

        def along(change: Tensor) -> Tensor:
            """By a parameter that moves the covariance so."""
            return ((pull @ change) * pull).sum(1) / 2 - (inverse * change).sum() / 2

        length = parameters[3].exp()
        by_level, by_slope = pull.sum(1), pull @ feature
        return torch.stack(
            (by_slope, by_level, along(2 * kernel), along(kernel * square / length**2)), 1
        )

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(), cls(6, least=2, sharing="shared"), cls(3, pooled=True)]


@dataclass(frozen=True)
class BernoulliAllocator(_Learned):
    """A coin for every row: heads takes a share of what is above the floor, tails takes none.

    Its two parameters are slope and level.

    Args:
        directions: mean number of directions a row, at least 1.
        least: directions of every row, from 1 to `directions`.
        draws: that the proxy is compared over in a step, at least 2; the first one is used.
        rate: step size of the law's parameters, at least 0; 0 leaves the law as it starts.
        pooled: weighs every query alike. This is *another objective*, in which rows with many
            directions weigh more; compare it with methods that weigh the rows alike.
        sharing: as for Uniform.

    Example:
        >>> allocator = BernoulliAllocator(4)
        >>> signals = {"loss": torch.tensor([0.1, 2.0, 0.5])}
        >>> plan, _ = allocator.allocate(3, signals, allocator.init(), key=Key.root(0))
        >>> int(plan.counts.sum())
        12
    """

    def _start(self) -> list[float]:
        return [2.0, -1.0]

    def _draw(self, parameters: Tensor, feature: Tensor, key: Key) -> Tensor:
        coins = key.uniform(self.draws * len(feature)).view(self.draws, -1)
        return (coins < self._heads(parameters, feature)).double()

    def _heads(self, parameters: Tensor, feature: Tensor) -> Tensor:
        return torch.sigmoid(parameters[1] + parameters[0] * feature)

    def _score(self, drawn: Tensor) -> Tensor:
        return drawn

    def _log_gradient(self, parameters: Tensor, feature: Tensor, drawn: Tensor) -> Tensor:
        rest = drawn - self._heads(parameters, feature)
        return torch.stack((rest @ feature, rest.sum(1)), 1)

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(), cls(6, least=2, draws=4, sharing=2), cls(3, pooled=True)]


def _relative(loss: Tensor) -> Tensor:
    """float64 [rows]: the losses over their mean, in [0, 10]; what is not finite counts as 0."""
    loss = loss.double()
    loss = torch.where(loss.isfinite(), loss, 0.0)
    mean = loss.abs().mean()
    return (loss / mean).clamp(0, 10) if mean > 0 else torch.ones_like(loss)


def _normal(key: Key, *shape: int) -> Tensor:
    """float64 [*shape], standard normal, on the CPU."""
    count = math.prod(shape)
    radius, angle = key.uniform(2 * count, "normal").view(2, -1)
    return (torch.sqrt(-2 * torch.log1p(-radius)) * torch.cos(2 * math.pi * angle)).view(shape)
