"""How far a run has come: all of a trainer's own that lasts from one step to the next."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fwdlearn.estimator import RESERVED, Estimate
from fwdlearn.steps import Carried

if TYPE_CHECKING:
    from fwdlearn.trainer import Trainer


@dataclass
class Window:
    """Sums over the steps since the last record."""

    steps: int = 0
    loss: float = 0.0
    square_norm: float = 0.0
    variance: float = 0.0
    queries: int = 0
    nonfinite: int = 0
    seconds: float = 0.0
    told: dict[str, float] = field(default_factory=dict)

    def add(self, estimate: Estimate, square_norm: float, seconds: float) -> None:
        info = estimate.info
        self.steps += 1
        loss, variance, nonfinite = estimate.figures
        self.loss += loss
        self.square_norm += square_norm
        self.variance += variance
        self.queries += estimate.queries
        self.nonfinite += nonfinite
        self.seconds += seconds
        self.told = {name: float(info[name]) for name in info if name not in RESERVED}

    def record(self) -> dict[str, Any]:
        return {
            "train.loss": self.loss / self.steps,
            "grad.norm": math.sqrt(self.square_norm / self.steps),
            # The squared norm of an estimate is that of the gradient plus the variance.
            "snr": (self.square_norm - self.variance) / self.variance if self.variance else None,
            "queries_per_second": self.queries / self.seconds if self.seconds else None,
            "nonfinite": self.nonfinite,
            # What else the estimator has to say of the last step.
            **{f"estimator.{name}": value for name, value in self.told.items()},
        }


@dataclass
class Pieces:
    """The state of an estimator where updates come within sequences.

    Args:
        state: of the estimator itself.
        carried: by its sequences.
    """

    state: Any
    carried: Carried


@dataclass
class Progress:
    """Where a run is.

    Args:
        state: of the estimator.
        plans: the state of the allocator.
        step: how many have been taken.
        spent: queries so far.
        scheduled: steps of the learning-rate schedule.
        seconds: that the run took until it was last continued.
        first: the loss of the first step.
        window: what the next record sums up.
        last: the last record.
        scores: of the last evaluation.
    """

    state: Any
    plans: Any
    step: int = 0
    spent: int = 0
    scheduled: int = 0
    seconds: float = 0.0
    first: float = math.nan
    window: Window = field(default_factory=Window)
    last: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)


class Journal:
    """What a trainer tells of each step, and asks where to go on. This one keeps nothing."""

    whole: Callable[[], AbstractContextManager[object]] = nullcontext
    """Around an update: a signal that would stop the run waits for its end."""

    def resume(self, trainer: Trainer, at: Progress) -> Progress:
        """Where to go on: the start, or wherever an earlier run came to.

        Args:
            trainer: with its first weights, its engine's rung chosen.
            at: the start.
        """
        return at

    def recorded(self, at: Progress) -> Estimate | None:
        """The estimate of the step `at.step`, where it is known and nothing else is to be done."""
        return None

    def append(self, at: Progress, estimate: Estimate) -> None:
        """Before the update of the step `at.step`."""

    def stepped(self, at: Progress) -> None:
        """After a step, its records and its evaluation."""
