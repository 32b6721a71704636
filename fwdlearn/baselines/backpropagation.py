"""Backpropagation in the clothes of an estimator: the same loop, batches, masks and optimizer.

Its gradient is that of the mean loss over the batch, all tensors of it alive at once, as reverse
mode leaves them. A row counts `PASSES` queries: one for its forward pass and two for the backward
pass, which is two products for each of the forward pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from fwdlearn.allocator import Plan
from fwdlearn.baselines.baseline import Baseline
from fwdlearn.estimator import Estimate, Traits
from fwdlearn.keys import Key
from fwdlearn.oracle import LossOracle

PASSES = 3
"""Queries that a row of a backward pass counts."""

_REMARK = (
    f"is no forward-only method: a row of a step counts {PASSES} queries, one for its forward pass "
    "and two for the backward pass."
)


@runtime_checkable
class GradientOracle(LossOracle, Protocol):
    """Answers with the gradient itself."""

    def gradient(self, every: int | None = None) -> tuple[Mapping[str, Tensor], Tensor]:
        """Name -> gradient of the mean loss over the batch, and that loss.

        Counts `PASSES` queries a row.

        Args:
            every: so many steps of a sequence know of each other; what came before them is a
                constant. None cuts nothing.
        """


@dataclass(frozen=True)
class Backpropagation(Baseline):
    """The exact gradient, by reverse mode; one batch's gradient whatever the plan."""

    traits = Traits(GradientOracle, "weights", "gradient", 0, queries_per_row=PASSES)
    remark = _REMARK

    def estimate(
        self, oracle: LossOracle, params: Mapping[str, Tensor], state: Any, *, key: Key, plan: Plan
    ) -> tuple[Estimate, Any]:
        assert isinstance(oracle, GradientOracle)
        start = oracle.queries
        grad, loss = oracle.gradient()
        info = {"variance": torch.zeros(())}
        return Estimate(grad, loss, oracle.queries - start, info), state

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls()]


@dataclass(frozen=True)
class TruncatedBackpropagation(Baseline):
    """Backpropagation through time that is cut every few steps: no credit passes a cut.

    With one step it is what published perturbation rules for recurrent networks were measured
    against. Memory is that of the steps between two cuts.

    Args:
        steps: between cuts, at least 1.

    Raises:
        ValueError: `steps` is out of range.
    """

    steps: int = 1
    traits = Traits(GradientOracle, "weights", "biased", 0, queries_per_row=PASSES)
    remark = _REMARK

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(
                f"TruncatedBackpropagation(steps=...) must be at least 1, got {self.steps!r}."
            )

    def estimate(
        self, oracle: LossOracle, params: Mapping[str, Tensor], state: Any, *, key: Key, plan: Plan
    ) -> tuple[Estimate, Any]:
        assert isinstance(oracle, GradientOracle)
        start = oracle.queries
        grad, loss = oracle.gradient(self.steps)
        info = {"variance": torch.zeros(())}
        return Estimate(grad, loss, oracle.queries - start, info), state

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(), cls(steps=4)]
