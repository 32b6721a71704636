"""Measured: how many directions a step has, and how many rows share one, from measured noise.

Papers: S. De, A. Yadav, D. Jacobs and T. Goldstein, "Automated inference with adaptive batches"
(AISTATS 2017), which grow until the gradient stands out of its noise; S. McCandlish et al., "An
empirical model of large-batch training" (arXiv 1812.06162, 2018), the noise scale.

With n directions a row, v / n the trace of the covariance of an estimate, and G the squared norm of
the batch's gradient, the signal-to-noise ratio is n G / v. `AdaptiveDirections` takes the n that
brings it to a target:

    n = target * v / G,   between `least` and `most`.

With m rows to a set of directions, S the mean squared norm of a row's gradient and T that of the
gradient of all data, the squared error of an estimate is 1 + (m - 1) T / S times that of private
directions. `MeasuredSharing` takes the largest m that keeps this below 1 + tolerance.

Symbols: v `noise`, G `signal`, S `square_slope`, T what |estimate|^2 - variance leaves when the
part of the rows' own disagreement, S / rows, is taken off.

Differs from the papers in: the noise is that of the directions, not of the choice of rows, and is
known in every step at no cost. A step's number is decided by the steps before it: to go on until
its own queries look good would favour those that do, and bias the estimate.

Cost: no queries, four numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor

from fwdlearn.allocator import Allocator, Feedback, Plan
from fwdlearn.counts import check_counts, check_sharing, divide, sharing_rows
from fwdlearn.errors import UsageError
from fwdlearn.keys import Key

# The largest change of the number of directions in a step: what is measured is noisy itself.
_PACE = 1.1


@dataclass(frozen=True)
class AdaptiveDirections(Allocator):
    """As many directions as the signal-to-noise ratio of the last steps calls for.

    While the running mean of the signal is below zero, lost in its own noise, the number stays.

    Args:
        directions: mean number of directions a row in the first step, at least 1.
        target: signal-to-noise ratio of an estimate that is good enough, positive.
        least: directions of every row, from 1 to `directions`.
        most: mean number of directions a row that is never exceeded, at least `directions`.
        signal: what stands for the deviation of a row, as for Neyman: "residual" or "loss"; None
            gives every row the same number.
        memory: of the running means, in [0, 1).
        sharing: as for Uniform.

    Raises:
        UsageError: in training, where the estimator does not report its variance.

    Example:
        >>> allocator = AdaptiveDirections(2, target=0.5)
        >>> state = allocator.init()
        >>> plan, state = allocator.allocate(3, {}, state, key=Key.root(0))
        >>> told = Feedback(1.0, 5.0, {}, 4.0)  # a squared gradient of 1 under a variance of 4
        >>> state = allocator.observe(plan, {}, told, state)  # on the way from 2 to 4
        >>> round(state["directions"], 2), allocator.budget(3, state)
        (2.2, 7)
    """

    directions: int = 4
    target: float = 0.5
    least: int = 1
    most: int = 64
    signal: Literal["residual", "loss"] | None = None
    memory: float = 0.98
    sharing: str | int = "private"

    def __post_init__(self) -> None:
        owner = "AdaptiveDirections"
        check_counts(owner, self.directions, self.least)
        check_sharing(owner, self.sharing)
        _check_memory(owner, self.memory)
        if not 0 < self.target < math.inf:
            raise ValueError(f"{owner}(target=...) must be positive, got {self.target!r}.")
        if isinstance(self.most, bool) or self.most < self.directions:
            raise ValueError(
                f"{owner}(most=...) must be at least directions={self.directions}, got {self.most}."
            )
        if self.signal not in (None, "residual", "loss"):
            raise ValueError(
                f"{owner}(signal=...) must be 'residual', 'loss' or None, got {self.signal!r}."
            )

    @property
    def signals(self) -> frozenset[str]:
        return frozenset() if self.signal is None else frozenset({self.signal})

    def init(self) -> Any:
        """Running means, the steps they hold, and directions a row of the next step."""
        return {"signal": 0.0, "noise": 0.0, "steps": 0, "directions": float(self.directions)}

    def budget(self, rows: int, state: Any) -> int:
        return round(rows * state["directions"])

    def allocate(
        self, rows: int, signals: Mapping[str, Tensor], state: Any, *, key: Key
    ) -> tuple[Plan, Any]:
        score = torch.ones(rows) if self.signal is None else signals[self.signal]
        counts = divide(score, self.budget(rows, state), self.least)
        return Plan(counts, sharing_rows(self.sharing, rows)), state

    def observe(
        self, plan: Plan, signals: Mapping[str, Tensor], feedback: Feedback, state: Any
    ) -> Any:
        variance = _variance("AdaptiveDirections", feedback)
        mean = len(plan) / plan.rows
        signal = _running(state["signal"], feedback.square_norm - variance, self.memory)
        noise = _running(state["noise"], variance * mean, self.memory)
        # The same share of both is missing at the start.
        known = signal > 0
        wanted = self.target * noise / signal if known else state["directions"]
        paced = min(max(wanted, state["directions"] / _PACE), state["directions"] * _PACE)
        directions = min(max(paced, float(self.least)), float(self.most))
        steps = state["steps"] + 1
        return {"signal": signal, "noise": noise, "steps": steps, "directions": directions}

    @classmethod
    def examples(cls) -> list[Self]:
        return [
            cls(),
            cls(3, 2.0, least=2, most=9, signal="residual", memory=0.0),
            cls(2, 0.1, signal="loss", sharing="shared"),
        ]


@dataclass(frozen=True)
class MeasuredSharing(Allocator):
    """As many rows to a set of directions as the noise of an estimate hardly shows.

    Sharing makes calls of a black box larger and fewer, and sums of directions shorter; private
    directions have the smallest error. For estimators that perturb weights.

    Args:
        directions: directions of every row, at least 1.
        tolerance: by how much the squared error may exceed that of private directions, at least 0.
        memory: of the running means, in [0, 1).

    Raises:
        UsageError: in training, where the estimator reports neither its variance nor the squared
            slopes of rows.

    Example:
        >>> plan, _ = (made := MeasuredSharing(2)).allocate(3, {}, made.init(), key=Key.root(0))
        >>> plan.sharing
        1
    """

    directions: int = 4
    tolerance: float = 0.25
    memory: float = 0.95

    def __post_init__(self) -> None:
        check_counts("MeasuredSharing", self.directions)
        _check_memory("MeasuredSharing", self.memory)
        if not 0 <= self.tolerance < math.inf:
            raise ValueError(
                f"MeasuredSharing(tolerance=...) must not be negative, got {self.tolerance!r}."
            )

    def init(self) -> Any:
        """Running means of S and T, of which nothing is known yet."""
        return {"rows": 0.0, "common": 0.0, "known": False}

    def allocate(
        self, rows: int, signals: Mapping[str, Tensor], state: Any, *, key: Key
    ) -> tuple[Plan, Any]:
        sharing = 1
        if state["known"]:
            ratio = state["common"] / state["rows"] if state["rows"] > 0 else 0.0
            extra = self.tolerance / ratio if ratio > 0 else math.inf
            sharing = 1 + int(min(extra, rows - 1))
        return Plan.uniform(rows, self.directions, sharing), state

    def observe(
        self, plan: Plan, signals: Mapping[str, Tensor], feedback: Feedback, state: Any
    ) -> Any:
        variance = _variance("MeasuredSharing", feedback)
        if "square_slope" not in feedback.rows:
            raise UsageError(
                "MeasuredSharing needs the squared slopes of each row, which this estimator does "
                "not report; Uniform(sharing=...) takes a number."
            )
        square = feedback.rows["square_slope"]
        of_rows = float(square[square.isfinite()].double().mean())
        if plan.rows == 1 or not math.isfinite(of_rows):
            return state
        batch = feedback.square_norm - variance
        common = (batch - of_rows / plan.rows) / (1 - 1 / plan.rows)
        return {
            "rows": _running(state["rows"], of_rows, self.memory),
            "common": _running(state["common"], common, self.memory),
            "known": True,
        }

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(), cls(2, 1.0, memory=0.0)]


def _check_memory(owner: str, memory: float) -> None:
    if not 0 <= memory < 1:
        raise ValueError(f"{owner}(memory=...) must lie in [0, 1), got {memory!r}.")


def _running(old: float, new: float, memory: float) -> float:
    return memory * old + (1 - memory) * new


def _variance(owner: str, feedback: Feedback) -> float:
    if math.isnan(feedback.variance):
        raise UsageError(
            f"{owner} needs the variance of an estimate, which this estimator does not report; "
            "Uniform takes a fixed number of directions."
        )
    return feedback.variance
