"""The one interface of every gradient estimator."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Self

from torch import Tensor

from fwdlearn.allocator import Plan
from fwdlearn.keys import Key

State = Any
# The protocol that `traits.needs` names; a subclass writes it out.
Oracle = Any


@dataclass(frozen=True)
class Traits:
    """What an estimator needs and what it promises.

    Args:
        needs: the oracle protocol that it asks: LossOracle, SlopeOracle or ActivationOracle.
        perturbs: where the noise goes.
        target: what the mean of its estimates equals: the "gradient" itself, the gradient of the
            loss "smoothed" by the noise, or neither ("biased").
        queries_per_direction: queries for each (row, direction) pair of the plan.
        queries_per_row: queries for each row beside those. The first is a clean pass: losses at
            the unperturbed point, which an allocator's signals share.
    """

    needs: type
    perturbs: Literal["weights", "activations"]
    target: Literal["gradient", "smoothed", "biased"]
    queries_per_direction: int
    queries_per_row: int = 0

    def queries(self, plan: Plan) -> int:
        """What a plan costs."""
        return self.cost(plan.rows, len(plan))

    def cost(self, rows: int, pairs: int, measured: bool = False) -> int:
        """What so many (row, direction) pairs cost, with a clean pass for signals if `measured`."""
        per_row = max(self.queries_per_row, int(measured))
        return self.queries_per_direction * pairs + per_row * rows


RESERVED = ("variance", "coef_abs", "nonfinite", "tangents")
"""Names in `Estimate.info` that mean the same whoever gives them."""


@dataclass(frozen=True)
class Estimate:
    """An estimated gradient.

    Args:
        grad: parameter name -> tensor of its shape; may be built one tensor at a time.
        loss: scalar, with the same weighting over rows as `grad`.
        queries: read off the oracle.
        info: flat scalars; those beside the reserved ones go to the log. Reserved: `variance`
            (estimate of the trace of the covariance of `grad`), `coef_abs` (mean size of the loss
            differences over sigma, or of the slopes), `nonfinite` (queries dropped because their
            loss was not finite), `tangents` (directions that `grad` is the mean of, where they are
            not those of the plan).
        rows: per-row figures, float64 [rows], nan where a row has none. Reserved: `square_slope`
            (estimate of the mean squared slope of the row's loss along a direction, so of its
            squared gradient).
    """

    grad: Mapping[str, Tensor]
    loss: Tensor
    queries: int
    info: Mapping[str, Tensor] = field(default_factory=dict)
    rows: Mapping[str, Tensor] = field(default_factory=dict)

    @cached_property
    def figures(self) -> tuple[float, float, int]:
        """`loss`, `variance` (nan if not given) and `nonfinite` (0), read off the device once."""
        variance, nonfinite = self.info.get("variance"), self.info.get("nonfinite")
        return (
            float(self.loss),
            math.nan if variance is None else float(variance),
            0 if nonfinite is None else int(nonfinite),
        )


class Estimator(ABC):
    """Turns answers of an oracle into a gradient. Subclasses are frozen dataclasses.

    The oracle perturbs, forbids backward and counts queries; an estimator holds the coefficient
    formula and nothing else.
    """

    @property
    def traits(self) -> Traits:
        """What it needs and promises: a class attribute, or a property where settings decide."""
        raise AttributeError(f"{type(self).__name__} must say its traits (see Traits).")

    def init(self, params: Mapping[str, Tensor]) -> State:
        """The state before the first step."""
        return None

    @abstractmethod
    def estimate(
        self,
        oracle: Oracle,
        params: Mapping[str, Tensor],
        state: State,
        *,
        key: Key,
        plan: Plan,
    ) -> tuple[Estimate, State]:
        """One estimate of the gradient of the mean loss over the plan's rows.

        Args:
            oracle: answers queries about one batch; it satisfies `traits.needs`.
            params: name -> tensor, read only.
            state: from `init` or the last call.
            key: names all randomness.
            plan: which rows get which directions, with which weight.
        """

    @classmethod
    @abstractmethod
    def examples(cls) -> list[Self]:
        """Instances for `fwdlearn.testing.check_estimator`: the default and some unlike it."""
